"""The sections of a run file, each with its keys, defaults and bounds.

What the library takes as well is said once, in `npeff.options`: a section is such a type, or makes one of its values,
which checks their bounds and gives their defaults.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from npeff.options.labels import Labels, LabelSpec
from npeff.options.sketch import SketchSpec
from npeff.options.solver import SolverOptions

IMPORTED_TASK = "imported"
"""Name of the task of an imported run, which no model belongs to."""


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True)


class TaskConfig(Section):
    name: str
    """A built-in task (``digits``, ``huggingface-sequence-classification``) or ``my_package.my_task:MyTask``."""
    options: dict[str, Any] = {}
    """Keyword arguments of the task's constructor."""


class ParametersConfig(Section):
    include: tuple[str, ...] = ("*",)
    """Globs on parameter names: what the Fishers are taken with respect to."""
    exclude: tuple[str, ...] = ()
    """Globs on parameter names, taken out of what ``include`` matches."""


class DiagonalConfig(Section):
    mean: bool = False
    """Write the data set's diagonal Fisher, the mean over its examples, to ``diagonal_fisher.safetensors``."""
    top_entries: PositiveInt | None = None
    """Store the so many largest entries of every example's diagonal, and its norm."""
    groups: bool = False
    """Store the sums of every example's diagonal over each output unit of every layer, and its norm."""


class FishersConfig(Section):
    labels: Labels = LabelSpec.kind
    """How the expectation over labels is taken. ``exact``: one row per class but one. ``truncated``: the largest
    eigenpairs. ``sampled``: labels drawn from the model, unbiased; what language models need. ``empirical``: the given
    labels, which gives no Fisher matrix."""
    rank: int | None = LabelSpec.rank
    """Rows of an example: the most that ``truncated`` keeps, the draws of ``sampled``; of these two only."""
    kept_trace: float = LabelSpec.kept_trace
    """``truncated``: share of the trace at which an example has rows enough, so that some have fewer than ``rank``."""
    sketch: SketchSpec = SketchSpec()
    diagonal: DiagonalConfig = DiagonalConfig()
    """What is kept of the diagonals of the Fishers, which are exact whatever the sketch: nothing unless asked for."""
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the stored (normalised) factors."""
    shard_size: PositiveInt = 256
    """Examples in one shard: one task of one actor, one file, one completion record."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Examples in one forward pass; batches never cross a shard's border. ``auto`` finds it once, on the largest
    examples, and records it in the store. A worker with several CPU cores computes up to four batches at a time."""
    memory_limit_mb: PositiveInt = 2048
    """Memory that batches may take beside the model, those of a worker together, where their size is found."""

    @model_validator(mode="after")
    def _labels_have_what_they_need(self) -> Self:
        self.label_spec(seed=0)
        return self

    def label_spec(self, seed: int) -> LabelSpec:
        """The options of the labels, of a run with this seed."""
        return LabelSpec(kind=self.labels, rank=self.rank, kept_trace=self.kept_trace, seed=seed)


class FactorizationConfig(Section):
    n_components: int
    """Number of components K."""
    kind: Literal["fishers", "diagonal_groups", "diagonal_entries"] = "fishers"
    """What is factorized. ``fishers``: the low-rank Fishers (NPEFF). ``diagonal_groups``: their diagonals, summed over
    output units; ``diagonal_entries``: the largest entries of the diagonals (D-NPEFF). The latter two need
    ``fishers.diagonal.groups`` and ``fishers.diagonal.top_entries``."""
    max_iterations: int = SolverOptions.max_iterations
    """Passes over the Fishers, rejected steps included."""
    tolerance: PositiveFloat = SolverOptions.tolerance
    """Stop when accepted steps lower the loss by less than this, relatively."""
    n_starts: int = SolverOptions.n_starts
    """Seeded initializations tried on a subsample; the best is used."""
    subsample: int = SolverOptions.subsample
    """Examples in that subsample."""
    held_out_fraction: Fraction = 1 / 3
    """Share of the examples that the components are not fitted on, so that they can be verified there."""
    checkpoint_every: PositiveInt = 5
    """Iterations between checkpoints: what a crash can cost."""
    memory_limit_mb: PositiveInt = 4096
    """Memory, of a GPU where workers have one, in which a worker keeps its share of the Fishers. A share that takes
    more, in half precision where that is how it is stored, is read from the store in every pass. Changes no result."""
    l1: float = SolverOptions.l1
    """Sparsity of the coefficients: a component that explains less than this share of a Fisher's norm, alone, gets
    none. The penalty is 2·l1·Σ ‖F̂_i‖·W_ij."""
    orthogonality: float = SolverOptions.orthogonality
    """Pressure against components that are alike: this much of the explained share is given up for a mean squared
    cosine that is lower by one."""
    start_from: str | None = None
    """Directory of a run with the same model, parameters, sketch and seed: start from its components, as many."""
    expand: str | None = None
    """Directory of such a run: its components are the first ones, and stay; ``n_components`` counts them too."""
    examples: Literal["all", "mispredicted"] = "all"
    """Which examples to fit on, and to report on; all of them get coefficients."""
    example_weights: str | None = None
    """Column of the examples' table (metadata of the task, say) with their weights in the loss, 0 or more."""
    metrics: Literal["none", "jsonl", "tensorboard"] = "none"
    """Where the history goes, besides its table, while it is made: ``metrics/factorize.jsonl``, or TensorBoard events
    in ``metrics/`` (``pip install tensorboard``)."""
    stability_examples: NonNegativeInt = 4096
    """Examples, at most, whose two halves the components are fitted to again, to see which come back: the column
    ``stability`` of the table of components. 0 leaves it null."""

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        self.solver_options(seed=0)
        if self.start_from is not None and self.expand is not None:
            raise ValueError("start_from and expand exclude each other: remove one")
        for name in ("l1", "orthogonality", "start_from", "expand", "examples", "example_weights"):
            if self.kind != "fishers" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for kind: fishers: remove it")
        return self

    def solver_options(self, seed: int, **changes: Any) -> SolverOptions:
        """The options of the solver, of a run with this seed, but for ``changes``."""
        shared = [field.name for field in fields(SolverOptions) if field.name in type(self).model_fields]
        return SolverOptions(**{name: getattr(self, name) for name in shared} | {"seed": seed} | changes)


class SelectionConfig(Section):
    components: tuple[PositiveInt, ...] = (8, 16, 24, 32, 48, 64)
    """Numbers of components that ``npeff select`` tries at first: a list, or a text such as ``8:64:8``."""
    refine: bool = True
    """Whether to try further ones between the best of these and its neighbours, until these are next to it."""
    seeds: PositiveInt = 3
    """For each number and seed there are three fits: of all examples, and of the two halves of a split of its own."""
    max_examples: PositiveInt = 4096
    """Examples that a fit is of, at most, and as many held-out ones that it is judged on."""
    max_iterations: PositiveInt = 40
    tolerance: PositiveFloat = 1e-4
    n_starts: PositiveInt = 2
    """These three as in ``factorization``; less is asked of the many fits of a search."""

    @field_validator("components", mode="before")
    @classmethod
    def _numbers_of_a_text(cls, value: Any) -> Any:
        return component_numbers(value) if isinstance(value, str) else value

    @field_validator("components")
    @classmethod
    def _there_are_some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("give at least one number of components to try, such as 8:64:8")
        return tuple(sorted(set(value)))


def component_numbers(text: str) -> tuple[int, ...]:
    """The numbers that ``8,16,24`` lists, or ``8:64:8`` goes through, its end among them (and the step 1 unless given).

    Raises:
        ValueError: it is neither.
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            ends = [int(number) for number in part.split(":")]
            if len(ends) > 3 or (len(ends) == 3 and ends[2] < 1) or min(ends) < 1:
                raise ValueError
            numbers += ends if len(ends) == 1 else range(ends[0], ends[1] + 1, *ends[2:])
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{text!r} are no numbers of components: give 8,16,32 or 8:64:8 (from, to, step)")
    return tuple(numbers)


class LiftConfig(Section):
    memory_limit_mb: PositiveInt = 2048
    """Directions accumulated at one time by one actor may take this much memory; decides the block of components."""
    components: tuple[NonNegativeInt, ...] | None = None
    """Components to lift, and so to verify; all unless given. A later lift of others adds them."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored directions; ``float16`` takes half the disk."""
    polish_steps: NonNegativeInt = 0
    """Further steps of alternating least squares in all parameters, coefficients fixed: two passes over the examples
    each. They sharpen what a narrow sketch blurs, and need the directions of all components."""

    @model_validator(mode="after")
    def _all_are_polished(self) -> Self:
        if self.polish_steps and self.components is not None:
            raise ValueError("polish_steps needs the directions of all components: remove components")
        return self

    @field_validator("components")
    @classmethod
    def _each_once(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and not value:
            raise ValueError("give at least one component to lift, or leave it out for all")
        return None if value is None else tuple(sorted(set(value)))


class VerificationConfig(Section):
    top_examples: PositiveInt = 32
    """Examples with a component's largest coefficients that its direction should move."""
    baseline_examples: PositiveInt = 200
    """Random examples, disjoint from the top ones, that it should not."""
    target_kl: PositiveFloat = 0.1
    """Mean KL divergence (nats) on the top examples that the step size is chosen for."""
    epsilon: PositiveFloat | None = None
    """A step of this length along every (unit) direction, instead of one for each that reaches `target_kl`."""
    selectivity_examples: NonNegativeInt = 8
    """Top examples of every component whose KL is measured while the model is moved along each of the others: the
    selectivity matrix. 0 leaves its table empty."""
    correlation_examples: NonNegativeInt = 500
    """Examples at most, drawn at random, over which coefficients and KLs are ranked and compared. 0 leaves that out."""
    orthogonalize: Literal["none", "semi"] = "none"
    """``semi``: every direction is first made orthogonal to those of heavier components that overlap with it, so that
    only what it has for itself is tested."""
    ablation: bool = False
    """Also take out of the parameters their own part along every direction: the table ``ablation``."""
    ablation_origin: str | None = None
    """A safetensors file of parameters, such as those before fine-tuning, that this part is counted from; zero unless
    given."""

    @model_validator(mode="after")
    def _origin_is_of_an_ablation(self) -> Self:
        if self.ablation_origin is not None and not self.ablation:
            raise ValueError("ablation_origin goes with ablation: true")
        return self


class RepairConfig(Section):
    top_examples: PositiveInt = 64
    """Of a component, with a known label: among them wrong predictions are counted, and to be mended."""
    significance: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    """Components are tried whose wrong predictions are over-represented at this false discovery rate."""
    kl_steps: tuple[PositiveFloat, ...] = (0.03, 0.1, 0.3, 1.0)
    """Mean KLs on the top examples for which steps of both signs are tried."""
    max_harm: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Share of the tuning examples' right predictions that all edits together may break."""
    max_edits: PositiveInt = 3
    """Components to move along, one after the other, as long as it helps."""
    joint_passes: NonNegativeInt = 40
    """Then steps along all lifted components are sought together, from where those one after the other have led, and
    taken where they mend more: gradients of the tuning examples for each of three weights of what must not be broken.
    0: not at all. Nothing is sought where no component stands for mistakes."""

    @field_validator("kl_steps")
    @classmethod
    def _in_order(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("give at least one mean KL to try, such as [0.1]")
        return tuple(sorted(set(value)))


class ReportConfig(Section):
    top_examples: PositiveInt = 12
    """Examples shown on a component's card."""


class ExecutorConfig(Section):
    kind: Literal["ray", "serial"] = "ray"
    """``ray`` runs actors; ``serial`` runs everything in this process (debugging, notebooks)."""
    address: str = "local"
    """``local`` starts a private Ray on this machine; ``auto`` or ``host:port`` joins a running cluster. Inside a Ray
    job the job's own cluster is always used."""
    workers: PositiveInt = 1
    """Actors that share a stage's work."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores, and so computing threads, of one actor."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of one actor; a fraction lets several actors share one."""
    timeout_s: PositiveFloat = 600.0
    """Longest wait for one call of a worker before it counts as hung: the task's preparation (training, say), two
    shards, reading the solver's shards and starting it, a solver step, a block of directions, a component's
    verification or attribution, a fit of ``npeff select`` or for the components' stability."""

    @model_validator(mode="after")
    def _serial_is_one_worker(self) -> Self:
        if self.kind == "serial" and self.workers != 1:
            raise ValueError(f"the serial executor has one worker, not {self.workers}: set workers: 1 or kind: ray")
        return self
