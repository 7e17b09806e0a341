"""The sections of a run file, each with its keys, defaults and bounds.

Options that the library shares are defined once, in `npeff.options`. A section either is one of these types, or creates
a value of the type, which provides the defaults and checks the bounds.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    PositiveFloat,
    Strict,
    field_validator,
    model_validator,
)

from npeff.options.bounds import LARGEST_COUNT, LARGEST_SHARE, LARGEST_STEP, LARGEST_TIME_S
from npeff.options.kinds import DirectKind, FactorizationKind, is_diagonal
from npeff.options.labels import Labels, LabelSpec
from npeff.options.sketch import SketchSpec
from npeff.options.solver import SolverOptions
from npeff.storage.errors import StoreError
from npeff.store.run_files import check_name

IMPORTED_TASK = "imported"
"""Name of the task of an imported run, which has no model."""


def _from_mapping(source: Any, handler: GetCoreSchemaHandler) -> Any:
    """Return the schema of a dataclass that a mapping may be converted to. Its values are not converted."""
    schema = handler(source)
    cast(dict[str, Any], handler.resolve_ref_schema(schema))["strict"] = False
    return schema


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Sketch = Annotated[SketchSpec, GetPydanticSchema(_from_mapping)]


class Section(BaseModel):
    """A section, whose values are not converted: a text is not a number, and a number is not a switch."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Return the values by the keys of the run file, such as ``from``. The options are those of pydantic."""
        return super().model_dump(**{"by_alias": True} | options)


class TaskConfig(Section):
    name: str
    """A built-in task (``digits``, ``huggingface-sequence-classification``) or ``my_package.my_task:MyTask``."""
    options: dict[str, Any] = {}
    """Keyword arguments of the task's constructor."""


class ParametersConfig(Section):
    include: Annotated[tuple[str, ...], Strict(False)] = ("*",)
    """Globs of the names of the parameters with respect to which the Fishers are computed."""
    exclude: Annotated[tuple[str, ...], Strict(False)] = ()
    """Globs of parameter names to remove from the matches of ``include``."""


class DiagonalConfig(Section):
    mean: bool = False
    """Write the mean diagonal Fisher of the data set to ``diagonal_fisher.safetensors``."""
    top_entries: Count | None = None
    """Number of largest diagonal entries to store for every example, with the norm of the diagonal."""
    groups: bool = False
    """Store the sums of every example's diagonal over each output unit of a layer, with the norm of the diagonal."""


class FishersConfig(Section):
    from_: Annotated[str | None, Field(alias="from", min_length=1)] = None
    """Directory of a run whose Fishers this run uses. Its ``task``, ``parameters``, ``fishers`` and ``seed`` apply."""
    labels: Labels = LabelSpec.kind
    """How the expectation over labels is computed. ``exact``: C − 1 rows for C classes. ``truncated``: the largest
    eigenpairs. ``sampled``: labels drawn from the model, an unbiased estimate, for language models. ``empirical``: the
    given labels; the result is not a Fisher matrix."""
    rank: int | None = LabelSpec.rank
    """Rows per example: the largest number with ``truncated``, or the number of draws with ``sampled``. The other kinds
    of labels do not use this option."""
    kept_trace: float = LabelSpec.kept_trace
    """``truncated``: stop adding rows once this fraction of the trace is covered, so some examples have fewer than
    ``rank`` rows."""
    sketch: Sketch = SketchSpec()
    diagonal: DiagonalConfig = DiagonalConfig()
    """Diagonals of the Fishers to store. They are exact for every sketch. By default, none are stored."""
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the stored (normalized) factors."""
    shard_size: Count = 256
    """Examples per shard. A shard is one item of a worker, one file per array, and one completion record."""
    batch_size: Count | Literal["auto"] = "auto"
    """Examples per forward pass. A batch never contains examples of two shards. ``auto`` determines the size once, on
    the largest examples, and records it in the store. A worker with several CPU cores computes up to four batches at a
    time."""
    memory_limit_mb: Count = 2048
    """Memory in MiB for all batches of a worker, besides the model. Used with ``batch_size: auto``."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        self.label_spec(seed=0)
        return self

    def label_spec(self, seed: int) -> LabelSpec:
        """Return the label options of a run with this seed."""
        return LabelSpec(kind=self.labels, rank=self.rank, kept_trace=self.kept_trace, seed=seed)


class FactorizationConfig(Section):
    name: str = "default"
    """Name of the factorization. A run holds several factorizations of its Fishers side by side."""
    n_components: int
    """Number of components K."""
    kind: FactorizationKind = "fishers"
    """What is factorized. ``fishers``: the low-rank Fishers (NPEFF). ``diagonal_groups``: their diagonals, summed over
    output units (D-NPEFF), which needs ``fishers.diagonal.groups``. ``diagonal_entries``: the largest entries of the
    diagonals (D-NPEFF), which needs ``fishers.diagonal.top_entries``. ``gradients`` and ``squared``: non-negative
    matrix factorization of per-example gradients, and of squared entries of the sketched Fisher factors. ``kmeans``:
    clusters of gradients. ``pca``: eigenvectors of the mean normalized Fisher. ``random``: random components, as a
    control. ``gradients`` and ``kmeans`` need ``fishers.labels: exact`` or ``empirical``."""
    max_iterations: int = SolverOptions.max_iterations
    """Largest number of passes over the Fishers, including rejected steps."""
    tolerance: PositiveFloat = SolverOptions.tolerance
    """The solver has converged when three steps in a row each change the objective by less than this fraction of it."""
    n_starts: int = SolverOptions.n_starts
    """Number of seeded initializations to try on a subsample. The best is used. ``1`` skips the trial runs."""
    subsample: int = SolverOptions.subsample
    """Examples in the subsample of the trial runs."""
    held_out_fraction: Fraction = 1 / 3
    """Fraction of the examples to hold out of the fit, for verification."""
    checkpoint_every: Count = 5
    """Iterations between checkpoints. A crash costs at most this many iterations."""
    memory_limit_mb: Count = 4096
    """Memory in MiB in which a worker keeps its Fishers: GPU memory if the worker has a GPU. If the Fishers do not fit,
    the worker keeps them in half precision, if they are stored in half precision. If they still do not fit, every pass
    reads them from the store. This option does not change any result."""
    l1: float = SolverOptions.l1
    """Sparsity of the coefficients. The coefficient of a component is zero if the component alone explains less than
    this fraction of the Fisher's norm. The penalty is 2·l1·Σ ‖F̂_i‖·W_ij."""
    orthogonality: float = SolverOptions.orthogonality
    """Weight of the penalty on similar components: this value times the mean squared cosine of two components, in units
    of the explained fraction."""
    start_from: str | None = None
    """Directory of a run with the same model, parameters, sketch, seed and number of components, from whose components
    the solver starts."""
    expand: str | None = None
    """Directory of a run with the same model, parameters, sketch and seed, whose components are kept fixed as the first
    components. ``n_components`` includes them."""
    examples: Literal["all", "mispredicted", "uncertain"] = "all"
    """Examples that the components are fitted on and that ``explained`` describes. ``mispredicted``: those with a wrong
    prediction. ``uncertain``: those whose largest class probability is below ``max_probability``. All valid examples
    get coefficients."""
    max_probability: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """``examples: uncertain``: the bound on the largest class probability of the examples."""
    example_weights: str | None = None
    """Column of the table of examples, such as metadata of the task, with non-negative weights of the examples in the
    loss."""
    metrics: Literal["none", "jsonl", "tensorboard", "wandb", "mlflow"] = "none"
    """Where to write the history during the fit, in addition to the table ``history``. ``jsonl``: the file
    ``metrics/factorize.jsonl``. ``tensorboard``: TensorBoard events in ``metrics/`` (``pip install tensorboard``).
    ``wandb`` and ``mlflow``: a run of Weights & Biases or MLflow, as their environment variables say."""
    stability_examples: CountOrZero = 4096
    """Largest number of examples for the stability of the components (column ``stability`` of the table of components).
    The components are fitted again to each half of these examples. 0 skips this and leaves the column null."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        try:
            check_name(value)
        except StoreError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        self.solver_options(seed=0)
        if self.start_from is not None and self.expand is not None:
            raise ValueError("start_from and expand cannot be combined: remove one of them")
        if (self.examples == "uncertain") != (self.max_probability is not None):
            raise ValueError("examples: uncertain and max_probability need each other: give both, or remove both")
        for name, unsupported in self._unsupported().items():
            if unsupported and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not available for kind: {self.kind}; remove {name}, or change the kind")
        return self

    def _unsupported(self) -> dict[str, bool]:
        """Return whether the kind does not support a key, for the keys that some kinds do not support."""
        only_fishers = ("l1", "orthogonality", "start_from", "expand", "example_weights")
        return dict.fromkeys(only_fishers, self.kind != "fishers") | {
            "examples": is_diagonal(self.kind),
            "metrics": self.kind in get_args(DirectKind),
        }

    def solver_options(self, seed: int, **changes: Any) -> SolverOptions:
        """Return the solver options of a run with this seed, with ``changes`` applied."""
        shared = [field.name for field in fields(SolverOptions) if field.name in type(self).model_fields]
        return SolverOptions(**{name: getattr(self, name) for name in shared} | {"seed": seed} | changes)


class SelectionConfig(Section):
    components: Annotated[tuple[Count, ...], Strict(False)] = (8, 16, 24, 32, 48, 64)
    """Numbers of components that ``npeff select`` tries first: a list, or a string such as ``8:64:8``."""
    refine: bool = True
    """Whether to also try numbers between the best number and its neighbours among the numbers tried, until no number
    is left between them."""
    seeds: Count = 3
    """Number of seeds. Each number of components and seed has three fits: of all examples, and of the two halves of a
    random split."""
    max_examples: Count = 4096
    """Largest number of examples of a fit, and of held-out examples to evaluate the fit on."""
    max_iterations: Count = 40
    """As in ``factorization``. The default is lower because a search has many fits."""
    tolerance: PositiveFloat = 1e-4
    """As in ``factorization``. The default is larger because a search has many fits."""
    n_starts: Count = 2
    """As in ``factorization``. The default is lower because a search has many fits."""

    @field_validator("components", mode="before")
    @classmethod
    def _parse_numbers(cls, value: Any) -> Any:
        if type(value) is int:
            return (value,)
        return component_numbers(value) if isinstance(value, str) else value

    @field_validator("components")
    @classmethod
    def _check_not_empty(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("give at least one number of components to try, such as 8:64:8")
        return tuple(sorted(set(value)))


_MOST_NUMBERS = 10_000


def component_numbers(text: str) -> tuple[int, ...]:
    """Parse at most 10,000 numbers of components: a list ``8,16,24``, or a range ``8:64:8`` (from, to, step).

    A range includes its end. The step is 1 by default.

    Raises:
        ValueError: The text is neither.
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            ends = [int(number) for number in part.split(":")]
            if len(ends) > 3 or (len(ends) == 3 and ends[2] < 1) or min(ends) < 1:
                raise ValueError
            more = ends if len(ends) == 1 else range(ends[0], min(ends[1], LARGEST_COUNT) + 1, *ends[2:])
            numbers += more[: _MOST_NUMBERS + 1]
            if len(numbers) > _MOST_NUMBERS:
                raise ValueError
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(
            f"{text!r} is not a list of numbers of components, or has more than {_MOST_NUMBERS}: give 8,16,32 or "
            "8:64:8 (from, to, step)"
        )
    return tuple(numbers)


class LiftConfig(Section):
    memory_limit_mb: Count | Literal["auto"] = "auto"
    """Memory in MiB for the directions that one worker accumulates at a time, which are lifted in one pass over the
    examples. ``auto``: 2048, or what the direction of one component takes if that is more."""
    components: Annotated[tuple[CountOrZero, ...], Strict(False)] | None = None
    """Components to lift and to verify; all by default. A later lift with other components adds these."""
    direction: Literal["own", "whitened"] = "whitened"
    """``whitened``: steps that change a component's examples most for a given change of all examples. ``own``: the
    components' own directions, which share parts with those of other components."""
    damping: PositiveFloat = 0.03
    """Damping λ of whitened directions, except those of diagonals. With a larger value, they are closer to own ones."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the stored directions. ``float16`` halves the disk space."""
    polish_steps: CountOrZero = 0
    """Number of alternating-least-squares steps in all parameters after the lift, with fixed coefficients. Each step is
    two passes over the examples. The steps reduce the errors of a narrow sketch. They need the directions of all
    components."""

    @model_validator(mode="after")
    def _check_polishing(self) -> Self:
        if self.polish_steps and self.components is not None:
            raise ValueError("polish_steps needs the directions of all components: remove components")
        return self

    @field_validator("components")
    @classmethod
    def _sort_components(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and not value:
            raise ValueError("give at least one component to lift, or remove components to lift all")
        return None if value is None else tuple(sorted(set(value)))


class VerificationConfig(Section):
    top_examples: Count = 32
    """Number of top examples of a component, on which a step along its direction should have a large effect."""
    by: Literal["coefficient", "evidence"] = "coefficient"
    """Scores of the examples: the coefficients, or the stored evidence of the components."""
    baseline_examples: Count = 100
    """Number of random examples, disjoint from the top examples, for the KL ratio without matching."""
    target_kl: PositiveFloat = 0.1
    """Mean KL divergence in nats on the top examples. The length of each step is chosen to reach it."""
    exact: bool = False
    """Measure every effect by passes through the model, with steps to 1% of ``target_kl``. By default, the stored
    sketches predict a step (to 15%), the effects on monitored examples and those of another component's direction."""
    epsilon: Annotated[float, Field(gt=0.0, le=LARGEST_STEP)] | None = None
    """Fixed length of the step along every (unit) direction, instead of ``target_kl``."""
    selectivity_examples: CountOrZero = 8
    """Top examples of every component for the selectivity matrix, which measures their KL divergence for steps along
    the directions of all components. 0 leaves the table ``selectivity`` empty."""
    correlation_examples: CountOrZero = 500
    """Largest number of random examples for the rank correlation of coefficients and KL divergences. 0 skips it."""
    orthogonalize: Literal["none", "semi"] = "none"
    """``semi`` tests only the part of every direction that is orthogonal to those of components with larger mass."""
    ablation: bool = False
    """Also remove the part of the parameters along every direction, and write the table ``ablation``."""
    joint_ablation: CountOrZero = 0
    """Number of random subsets of the other components without which the effect of every component is measured again
    (table ``joint_ablation``), besides an adversarial one. 0 skips this."""
    ablation_origin: str | None = None
    """Safetensors file of the parameters that the removed part is measured from. The default origin is zero."""

    @model_validator(mode="after")
    def _check_ablation(self) -> Self:
        if self.ablation_origin is not None and not self.ablation and not self.joint_ablation:
            keys = "ablation: true or joint_ablation"
            raise ValueError(f"ablation_origin needs {keys}; add one of these keys, or remove ablation_origin")
        return self


class ExecutorConfig(Section):
    kind: Literal["auto", "ray", "serial"] = "auto"
    """``auto`` uses Ray only if it is needed: for several workers, for GPUs, for an address other than ``local``, and
    in a Ray job. Otherwise, it runs one worker in the driver's process. ``ray`` always runs Ray actors. ``serial``
    always runs one worker in the driver's process, for debugging and notebooks."""
    address: str = "local"
    """``local`` starts a private Ray instance on this machine. ``auto`` or ``host:port`` connects to a running cluster.
    A Ray job always uses the cluster that it runs on."""
    workers: Annotated[int, Field(gt=0, le=LARGEST_SHARE)] = 1
    """Number of workers that share the work of a stage. Several workers are Ray actors."""
    cpus_per_worker: Annotated[int, Field(gt=0, le=LARGEST_SHARE)] | Literal["auto"] = "auto"
    """Number of CPU cores, and of threads, of one worker. ``auto``: if ``kind: auto`` runs without Ray, all cores that
    the process may use, or ``OMP_NUM_THREADS`` if it is set; otherwise one."""
    gpus_per_worker: Annotated[float, Field(ge=0.0, le=LARGEST_SHARE)] = 0.0
    """Number of GPUs of one worker. With a fraction, workers share a GPU. With 0, workers compute on the CPU."""
    devices_per_model: Annotated[int, Field(gt=0, le=LARGEST_SHARE)] = 1
    """Number of processes of one worker, each with ``cpus_per_worker`` and ``gpus_per_worker``, among which the
    parameters of the model are divided. A process holds 1/n of the model, and one block of it at a time."""
    timeout_s: Annotated[float, Field(gt=0.0, le=LARGEST_TIME_S)] = 600.0
    """Maximum time in seconds for one call of a Ray actor. An actor that takes longer counts as hung and is replaced.
    One call is the preparation of the task (for example training), up to two shards of Fishers, reading the Fishers and
    initializing the solver, a solver step, a block of directions, the verification or attribution of one component, a
    block of examples of ``npeff inputs``, four paths of ``npeff scale``, or a fit of ``select`` or the stability."""

    @model_validator(mode="after")
    def _processes_have_devices(self) -> Self:
        if self.kind == "serial" and self.workers != 1:
            raise ValueError(f"the serial executor has one worker, not {self.workers}: set workers: 1 or kind: auto")
        if self.kind == "serial" and self.devices_per_model != 1:
            raise ValueError(
                f"the serial executor has one process, not {self.devices_per_model}: set devices_per_model: 1 or "
                "kind: auto"
            )
        if self.devices_per_model > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                "the processes of a divided model cannot share a GPU: set gpus_per_worker: 1, which is the number of "
                "each process"
            )
        return self
