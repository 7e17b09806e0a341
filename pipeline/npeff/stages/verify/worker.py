"""The worker of the stage `verify`: move the model along one component's direction, and compare with the controls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from npeff.directions import displacement, orthogonalized, parameter_norm
from npeff.models.loaded import ModelSpec
from npeff.models.predictions import Predictions
from npeff.statistics.ratio_intervals import Measured, confidence, rank_correlation
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import SCHEMAS, read_table, write_table
from npeff.tasks import TaskError
from npeff.verification import (
    StepSize,
    another_component,
    baseline_examples,
    find_step_size,
    moved,
    random_direction,
    top_examples,
)

SPLITS = ("fit", "held_out")

LEAST_OVERLAP = 0.05
"""Smallest |cos| of two components in the sketch for which semi-orthogonalization makes the direction of the component
with the smaller mass orthogonal to the other. For random components in 4,096 coordinates, |cos| is 0.016."""

_KEPT_BYTES = 64 * 2**20
"""Size in bytes of the directions that a worker keeps in memory."""

Direction = Mapping[str, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class VerificationPaths:
    factorization: Path
    directions: Path
    examples: Path
    results: Path
    """Folder of one Parquet file per finished component, and of the files of the methods below."""
    checksums: Mapping[int, str] = field(default_factory=dict)
    """Checksums of the directions."""
    lineage: str | None = None
    """What the results are made from, see `npeff.runs.lineage`."""

    def selectivity_file(self, component: int) -> Path:
        return self.results / "selectivity" / f"{component:05d}.parquet"

    def ablation_file(self, component: int) -> Path:
        return self.results / "ablation" / f"{component:05d}.parquet"


@dataclass(frozen=True)
class VerificationOptions:
    """Options of the verification, from the run file."""

    n_top: int
    n_baseline: int
    target_kl: float
    epsilon: float | None
    """Fixed length of the steps, instead of a target KL divergence."""
    n_selectivity: int
    n_correlation: int
    seed: int
    batch_size: int
    lifted: Sequence[int] | None = None
    """Components that have a direction; all components if None."""
    semi_orthogonal: bool = False
    ablation: bool = False
    origin: Path | None = None
    """File of the parameters from which displacements are measured; zero if None."""


@dataclass(frozen=True)
class Group:
    """Some examples, and the predictions of the unmoved model on them."""

    examples: NDArray[np.int64]
    before: Predictions


@dataclass(frozen=True)
class Effect:
    """The effect of a step. Predictions are those after the step."""

    step: StepSize
    top: Predictions
    baseline: Predictions
    kl: Measured

    def columns(self, name: str) -> dict[str, float]:
        """Return the columns of a control in the verification table."""
        return {
            f"{name}_epsilon": self.step.epsilon,
            f"{name}_kl_top": float(np.nanmean(self.kl.top_n)),
            f"{name}_kl_baseline": float(np.nanmean(self.kl.baseline_m)),
            f"{name}_kl_ratio": self.kl.ratio,
        }


@dataclass(frozen=True)
class MonitoredExamples:
    """Examples whose KL divergences are measured for the steps along every component."""

    split: str
    group: Group
    n_of_component: list[int]
    """Number of top examples of each component. The group contains them in the order of the components, followed by
    random examples."""


class VerificationWorker:
    """Verifies components, one component per call."""

    def __init__(self, model: ModelSpec, paths: VerificationPaths, options: VerificationOptions) -> None:
        self._loaded = model.load()
        self._paths, self._options = paths, options
        table = read_table(paths.examples, "examples")
        self._norms_N = table["fisher_norm"].to_numpy()
        valid_N = table["valid"].to_numpy()
        split_N = np.asarray(table["split"].to_pylist())
        self._members = {split: valid_N & (split_N == split) for split in SPLITS}
        factorization = open_factorization(paths.factorization)
        self._coefficients_NK, self._components_KD = factorization.read_coefficients(), factorization.read_components()
        self._directions, self._kept = DirectionStore.open(paths.directions, paths.checksums), dict[int, Direction]()
        self._lifted = list(range(len(self._components_KD)) if options.lifted is None else options.lifted)
        self._origin = None if options.origin is None else self._read_origin(options.origin)

    def verify(self, component: int) -> list[dict[str, Any]]:
        """Verify a component.

        Writes the component's rows of the tables `verification`, `selectivity` and `ablation` to files.

        Returns:
            The rows of the table `verification`, one for each split and sign. No rows if the direction is zero after
            semi-orthogonalization.
        """
        direction = self._tested_direction(component)
        rows, selectivity, ablation = ([], [], []) if direction is None else self._rows(component, direction)
        paths, lineage = self._paths, self._paths.lineage
        write_table(paths.selectivity_file(component), "selectivity", _columns(selectivity, "selectivity"), lineage)
        if self._options.ablation:
            write_table(paths.ablation_file(component), "ablation", _columns(ablation, "ablation"), lineage)
        # written last: the file of a finished component
        write_table(paths.results / f"{component:05d}.parquet", "verification", _columns(rows, "verification"), lineage)
        return rows

    def _rows(self, component: int, direction: Direction) -> tuple[list[Row], list[Row], list[Row]]:
        """Return the component's rows of the tables `verification`, `selectivity` and `ablation`."""
        random = random_direction(direction, seed=self._seed(component, "random direction"))
        other = another_component(component, self._lifted, self._seed(component, "another component"))
        controls = {"random": random} | ({} if other is None else {"other": self._direction(other)})
        tried = {"own": direction, **controls}
        steps = dict[str, float]()  # of the former sign or split: the first guess for the next
        rows, selectivity, ablation = list[Row](), list[Row](), list[Row]()
        for split, members_N in self._members.items():
            top = top_examples(self._coefficients_NK[:, component], members_N, self._options.n_top)
            seed = self._seed(component, f"baseline {split}")
            baseline = baseline_examples(members_N, top, self._options.n_baseline, seed)
            if len(top) == 0 or len(baseline) == 0:
                continue
            groups = self._group(top), self._group(baseline)
            for sign in (1, -1):
                effects = {
                    name: self._effect(each, sign, *groups, first=steps.get(name)) for name, each in tried.items()
                }
                steps |= {name: each.step.epsilon for name, each in effects.items() if each.step.reached_target}
                own = effects.pop("own")
                row = {"component": component, "examples": split, "sign": sign, "other_component": other}
                row |= self._compared(own, effects, *groups, seed) | {"kl_correlation": None}
                if split == self._monitored.split:
                    kl_n = self._monitored_kl(direction, sign * own.step.epsilon)
                    row["kl_correlation"] = self._correlation(component, kl_n)
                    place = {"moved": component, "examples": split, "sign": sign}
                    selectivity += [place | found for found in self._selectivity(kl_n)]
                rows.append(row)
            if self._options.ablation:
                along = displacement(self._loaded.model, direction, self._origin)
                own = self._step(direction, -along, *groups)
                beside = {name: self._step(control, -along, *groups) for name, control in controls.items()}
                row = {"component": component, "examples": split, "displacement": along, "other_component": other}
                ablation.append(row | self._compared(own, beside, *groups, seed))
        return rows, selectivity, ablation

    def _compared(
        self, own: Effect, controls: Mapping[str, Effect], top: Group, baseline: Group, seed: int
    ) -> dict[str, Any]:
        norms = Measured(self._norms_N[top.examples], self._norms_N[baseline.examples])
        sure = confidence(own.kl, [norms, *(control.kl for control in controls.values())], seed)
        measured = {
            name: value for which, control in controls.items() for name, value in control.columns(which).items()
        }
        return {
            **dict.fromkeys((f"other_{name}" for name in ("epsilon", "kl_top", "kl_baseline", "kl_ratio")), None),
            **measured,
            "epsilon": own.step.epsilon,
            "n_top": len(top.examples),
            "n_baseline": len(baseline.examples),
            "kl_top": float(np.nanmean(own.kl.top_n)),
            "kl_baseline": float(np.nanmean(own.kl.baseline_m)),
            "kl_ratio": own.kl.ratio,
            "kl_ratio_low": sure.low,
            "kl_ratio_high": sure.high,
            "above_controls": sure.above_controls,
            "fisher_norm_ratio": norms.ratio,
            "accuracy_top_before": top.before.accuracy(),
            "accuracy_top_after": own.top.accuracy(),
            "accuracy_baseline_before": baseline.before.accuracy(),
            "accuracy_baseline_after": own.baseline.accuracy(),
            "reached_target": own.step.reached_target,
        }

    def _effect(self, direction: Direction, sign: int, top: Group, baseline: Group, first: float | None) -> Effect:
        """Return the effect of the step with the target KL divergence on the top examples, or of the fixed step."""
        after_top = top.before

        def kl_at(epsilon: float) -> float:
            nonlocal after_top
            with moved(self._loaded.model, direction, sign * epsilon):
                after_top = self._predict(top.examples)
            return float(np.nanmean(after_top.kl(top.before)))

        if self._options.epsilon is not None:
            return self._step(direction, sign * self._options.epsilon, top, baseline)
        longest = parameter_norm(self._loaded.model, direction)
        found = find_step_size(kl_at, self._options.target_kl, longest=longest, first=first)
        return replace(self._step(direction, sign * found.epsilon, top, baseline, after_top), step=found)

    def _step(
        self, direction: Direction, step: float, top: Group, baseline: Group, after_top: Predictions | None = None
    ) -> Effect:
        """Return the effect of a step. `after_top` are the predictions after it on the top examples, if known."""
        with moved(self._loaded.model, direction, step):
            after_top = self._predict(top.examples) if after_top is None else after_top
            after_baseline = self._predict(baseline.examples)
        kl = Measured(after_top.kl(top.before), after_baseline.kl(baseline.before))
        kl_top = float(np.nanmean(kl.top_n))
        return Effect(StepSize(abs(step), kl_top, math.isfinite(kl_top)), after_top, after_baseline, kl)

    @cached_property
    def _monitored(self) -> MonitoredExamples:
        """The monitored examples: held-out examples or, if there are none, fitted examples."""
        split = "held_out" if self._members["held_out"].any() else "fit"
        members_N, seed = self._members[split], self._seed(0, "onlookers")  # a former name; results depend on it
        tops = [top_examples(w_N, members_N, self._options.n_selectivity) for w_N in self._coefficients_NK.T]
        drawn = baseline_examples(members_N, np.empty(0, np.int64), self._options.n_correlation, seed)
        return MonitoredExamples(split, self._group(np.concatenate([*tops, drawn])), [len(top) for top in tops])

    def _monitored_kl(self, direction: Direction, step: float) -> NDArray[np.float64]:
        group = self._monitored.group
        if not len(group.examples):
            return np.empty(0)
        distinct, places = np.unique(group.examples, return_inverse=True)
        with moved(self._loaded.model, direction, step):
            after = self._predict(distinct)
        return after.at(places).kl(group.before)

    def _selectivity(self, kl_n: NDArray[np.float64]) -> Iterator[dict[str, Any]]:
        counts = self._monitored.n_of_component
        for component, part_n in enumerate(np.split(kl_n, np.cumsum(counts))[:-1]):
            if len(part_n):
                yield {"component": component, "n_examples": len(part_n), "kl": float(np.nanmean(part_n))}

    def _correlation(self, component: int, kl_n: NDArray[np.float64]) -> float | None:
        n_top = sum(self._monitored.n_of_component)
        drawn = self._monitored.group.examples[n_top:]
        return rank_correlation(self._coefficients_NK[drawn, component], kl_n[n_top:])

    def _direction(self, component: int) -> Direction:
        if (kept := self._kept.get(component)) is not None:
            return kept
        read = {name: torch.from_numpy(array) for name, array in self._directions.read(component).items()}
        if len(self._kept) * sum(tensor.nbytes for tensor in read.values()) < _KEPT_BYTES:
            self._kept[component] = read  # another component needs it as a control
        return read

    def _tested_direction(self, component: int) -> Direction | None:
        """Return the component's direction. With semi-orthogonalization, remove its projection on the directions of
        similar components with larger mass; None if nothing remains."""
        own = self._direction(component)
        if not self._options.semi_orthogonal:
            return own
        masses_K: NDArray[np.float64] = np.nansum(self._coefficients_NK[self._members["fit"]], axis=0, dtype=np.float64)
        cosines_K = np.abs(self._components_KD @ self._components_KD[component])
        heavier = [
            other
            for other in self._lifted
            if masses_K[other] > masses_K[component] and cosines_K[other] >= LEAST_OVERLAP
        ]
        return orthogonalized(own, [self._direction(other) for other in heavier])

    def _read_origin(self, file: Path) -> Direction:
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise TaskError(
                f"verification.ablation_origin: cannot read {file} ({error}): give a safetensors file of parameters"
            ) from None
        shapes = dict(zip(self._loaded.layout.names, self._loaded.layout.shapes, strict=True))
        wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
        if wrong:
            raise TaskError(
                f"verification.ablation_origin: {file} has no parameter {wrong[0]!r} of shape {tuple(shapes[wrong[0]])}"
                ": give a file with the model's parameters"
            )
        return {name: tensors[name] for name in shapes}

    def _group(self, examples: NDArray[np.int64]) -> Group:
        """Return a group with the current predictions. The model must not be moved when this is called."""
        distinct, places = np.unique(examples, return_inverse=True)
        return Group(examples, self._predict(distinct).at(places))

    def _predict(self, examples: NDArray[np.int64]) -> Predictions:
        return self._loaded.predict(examples.tolist(), self._options.batch_size)

    def _seed(self, component: int, purpose: str) -> int:
        words = np.frombuffer(purpose.encode().ljust(-len(purpose) % 4 + len(purpose), b" "), dtype=np.uint32)
        entropy = [self._options.seed, component, *words.tolist()]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def _columns(rows: Sequence[dict[str, Any]], table: str) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in SCHEMAS[table].names}
