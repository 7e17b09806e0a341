"""The worker of the stage `verify`: move the model along one component's direction, and compare with the controls.

The stored sketches predict the effect of a step to first order. They give the first guess of the step size, the
informative sign, the effects on the monitored examples and control (c). All KL divergences of the component's own
direction on its top examples and its baseline are measured by passes through the model, and so is control (b). With
`VerificationOptions.exact`, or if the stored sketches predict no effects, everything is measured by passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from npeff.directions import displacement, orthogonalized
from npeff.models.loaded import ModelSpec
from npeff.stages.verify.examples import SPLITS, Answers, Candidates, Effects, Groups, Model, Predicted, distinct
from npeff.stages.verify.joint_ablation import JointRemovals
from npeff.stages.verify.options import VerificationOptions, VerificationPaths
from npeff.stages.verify.rows import ablation_row, verification_row
from npeff.stages.verify.shift_rows import NO_SHIFTS, ShiftRows
from npeff.stages.verify.steps import Direction, Probe, Steps, Tested
from npeff.stages.verify.stored_sketches import StoredSketches
from npeff.statistics.ratio_intervals import rank_correlation
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import rows_to_columns, write_table
from npeff.tasks import IGNORED, TaskError
from npeff.verification import another_component, baseline_examples, random_direction, top_examples

LEAST_OVERLAP = 0.05
"""Smallest |cos| of two components in the sketch for which semi-orthogonalization makes the direction of the component
with the smaller mass orthogonal to the other. For random components in 4,096 coordinates, |cos| is 0.016."""

N_CHECKED = 2
"""Number of components whose predicted effects are also measured by passes through the model."""

_KEPT_BYTES = 64 * 2**20
"""Size in bytes of the directions that a worker keeps in memory."""

Row = dict[str, Any]


@dataclass(frozen=True)
class MonitoredExamples:
    """Examples on which the KL divergences of the steps along every component are determined."""

    split: str
    tops: list[NDArray[np.int64]]
    """The first top examples of each component."""
    drawn: NDArray[np.int64]
    """Random examples."""


@dataclass(frozen=True)
class Hypothesis:
    """What is tested for a component."""

    component: int
    own: Probe
    """The component's direction."""
    sign: int
    """The informative sign: steps of this sign lower the confidence on the fitted top examples."""
    controls: dict[str, Probe]
    other: int | None
    """The component of control (c)."""
    groups: dict[str, Groups]
    """The examples by split."""
    seeds: dict[str, int]
    """Seed of the draws by split."""
    n_passed: int
    """Number of examples that were passed through the model to determine the sign."""


_COUNTED = 64
"""Number of examples in a batch whose predictions are counted, without a pass through the model."""


class VerificationWorker:
    """Verifies components, one component per call."""

    def __init__(self, model: ModelSpec, paths: VerificationPaths, options: VerificationOptions) -> None:
        self._loaded = model.load()
        self._counted: dict[int, int] = {}
        self._paths, self._options = paths, options
        factorization = open_factorization(paths.factorization)
        self._coefficients_NK, self._components_KD = factorization.map_coefficients(), factorization.read_components()
        self._sketches = StoredSketches(paths.fishers, paths.shards, self._loaded.layout, self._numbers_of_predictions)
        scores_NK = factorization.map_evidence() if options.by_evidence else self._coefficients_NK
        assert scores_NK is not None  # the stage has made sure that the evidence is stored
        self._scores_NK = scores_NK
        self._candidates = Candidates(paths.examples, self._sketches, self._scores_NK)
        self._predict = self._sketches.predict and not options.exact
        self._model = Model(self._loaded, options.batch_size, self._sketches if self._predict else None)
        self._steps = Steps(self._loaded.model, self._model, options, self._predict)
        self._directions, self._kept = DirectionStore.open(paths.directions, paths.checksums), dict[int, Direction]()
        self._lifted = list(range(len(self._components_KD)) if options.lifted is None else options.lifted)
        checked = np.random.default_rng(self._seed(0, "checked")).permutation(self._lifted)[:N_CHECKED]
        self._checked = set(checked.tolist()) if self._predict else set()
        self._origin = None if options.origin is None else self._read_origin(options.origin)
        module, layout = self._loaded.model, self._loaded.layout
        self._removals = JointRemovals(
            module, self._steps, self._sketches, layout, self._lifted, self._direction, self._origin
        )

    def verify(self, component: int) -> list[dict[str, Any]]:
        """Verify a component.

        Writes the component's rows of all tables to files.

        Returns:
            The rows of the table `verification`, one for each split and sign. No rows if the direction is zero after
            semi-orthogonalization.
        """
        tables: dict[str, list[Row]] = {table: [] for table in (*self._options.joined_tables, "verification")}
        if (direction := self._tested_direction(component)) is not None:
            tested = self._hypothesis(component, direction)
            for split in SPLITS:
                self._add_rows(tested, split, tables)
        for table, rows in tables.items():  # last the table whose file marks a finished component
            file = self._paths.file(table, component)
            write_table(file, table, rows_to_columns(rows, table), self._paths.lineage)
        return tables["verification"]

    def _numbers_of_predictions(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        for chosen in self._loaded.batches([each for each in examples.tolist() if each not in self._counted], _COUNTED):
            targets = self._loaded.targets(self._loaded.batch(chosen), chosen).reshape(len(chosen), -1)
            self._counted |= zip(chosen, targets.ne(IGNORED).sum(dim=1).tolist(), strict=True)
        return np.array([self._counted[each] for each in examples.tolist()], dtype=np.int64)

    def _hypothesis(self, component: int, direction: Direction) -> Hypothesis:
        """Return what is tested: the direction, its informative sign, the controls and the examples."""
        options, seeds = self._options, {split: self._seed(component, f"baseline {split}") for split in SPLITS}
        groups = {
            split: self._candidates.groups(component, split, options.n_top, options.n_baseline, seed)
            for split, seed in seeds.items()
        }
        other = another_component(component, self._lifted, self._seed(component, "another component"))
        directions = [direction] if other is None else [direction, self._direction(other)]
        examples = distinct(self._monitored_examples, *(part for each in groups.values() for part in each.parts))
        effects: list[Predicted | None] = [None] * len(directions)
        if self._sketches.predict:
            sketches = [self._sketches.sketch(each) for each in directions]
            effects = [Predicted(examples, effect) for effect in self._sketches.effects(examples, sketches)]
        own, *others = (Probe(each, effect) for each, effect in zip(directions, effects, strict=True))
        random = random_direction(direction, seed=self._seed(component, "random direction"))
        # the sketch of a random direction tells nothing: its evidence is below the error of the sketch
        controls = {"random": Probe(random, None)} | ({"other": others[0]} if others else {})
        passed = self._model.n_passed
        sign = self._steps.informative_sign(own, groups["fit"].parts[0])
        return Hypothesis(component, own, sign, controls, other, groups, seeds, self._model.n_passed - passed)

    def _add_rows(self, tested: Hypothesis, split: str, tables: dict[str, list[Row]]) -> None:
        """Add the component's rows for one split to the tables."""
        component, own, groups, seed = tested.component, tested.own, tested.groups[split], tested.seeds[split]
        if len(groups.top) == 0 or len(groups.random) == 0:
            return
        passed = self._model.n_passed - (0 if tables["verification"] else tested.n_passed)
        before = self._steps.unmoved(groups)
        place = {"component": component, "examples": split, "other_component": tested.other}
        rows, results = dict[int, Row](), dict[int, Tested]()
        for sign in (tested.sign, -tested.sign):
            check = sign == tested.sign and component in self._checked
            informative = results.get(tested.sign)
            result = self._steps.test(own, sign, groups, before, tested.controls, check, informative=informative)
            row = verification_row(result, groups, self._candidates, sign == tested.sign, seed)
            row |= place | {"sign": sign, "kl_correlation": None}
            where = {"component": component, "examples": split, "sign": sign}
            row |= self._add_shifts(result, groups, where, sign == tested.sign, tables)
            if split == self._monitored.split:
                kl, checked = self._monitored_kl(own, sign * result.step.epsilon, check)
                row["kl_correlation"] = self._correlation(component, kl)
                moved = {"moved": component, "examples": split, "sign": sign}
                tables["selectivity"] += [moved | found for found in self._selectivity(kl, checked)]
            row["examples_passed"] = self._model.n_passed - passed
            passed, rows[sign], results[sign] = self._model.n_passed, row, result
        tables["verification"] += [rows[1], rows[-1]]
        if self._options.ablation:
            along = displacement(self._loaded.model, own.direction, self._origin)
            probes = {"own": own, **tested.controls}
            effects = {name: self._steps.ablated(probe, -along, groups, before) for name, probe in probes.items()}
            tables["ablation"].append(place | ablation_row(effects, along, groups, self._candidates, seed))
        if self._options.joint_ablation and split == self._monitored.split:
            informative, draws = results[tested.sign], self._seed(component, "joint ablation")
            step, n_draws = tested.sign * informative.step.epsilon, self._options.joint_ablation
            tables["joint_ablation"] += self._removals.rows(
                component, own, step, informative, tested.groups, split, n_draws, draws
            )

    def _add_shifts(
        self, result: Tested, groups: Groups, where: Row, informative: bool, tables: dict[str, list[Row]]
    ) -> Row:
        """Add the rows about the changes of the predictions on the top examples, and return their summary."""
        if not informative and not result.step.reached_target:  # the step is too long to tell anything
            return NO_SHIFTS
        found = ShiftRows(result, groups.top, self._loaded)
        for table, rows in [("prediction_shifts", found.classes()), ("example_shifts", found.examples())]:
            tables[table] += [{**row, **where} for row in rows]
        return found.columns()

    @cached_property
    def _monitored(self) -> MonitoredExamples:
        """The monitored examples: held-out examples or, if there are none, fitted examples."""
        split = "held_out" if self._candidates.members["held_out"].any() else "fit"
        members_N, seed = self._candidates.members[split], self._seed(0, "onlookers")  # results depend on this name
        tops = [top_examples(w_N, members_N, self._options.n_selectivity) for w_N in self._scores_NK.T]
        drawn = baseline_examples(members_N, np.empty(0, np.int64), self._options.n_correlation, seed)
        return MonitoredExamples(split, tops, drawn)

    @cached_property
    def _monitored_examples(self) -> NDArray[np.int64]:
        return distinct(*self._monitored.tops, self._monitored.drawn)

    @cached_property
    def _monitored_before(self) -> Answers:
        return self._model.unmoved_answers([self._monitored_examples])

    def _monitored_kl(self, own: Probe, step: float, check: bool) -> tuple[Effects, Effects]:
        """Return the KL divergences of a step on the monitored examples, and those that were measured to check them."""
        examples, nothing = self._monitored_examples, Effects(np.empty(0, np.int64), np.empty(0))
        if not len(examples):
            return nothing, nothing
        measured = nothing
        if check or not self._predict:
            measured = self._steps.measured_kl(own.direction, step, self._monitored_before, [examples])
        if not self._predict or own.predicted is None:
            return measured, nothing
        return own.predicted.kl(step, examples), measured

    def _selectivity(self, kl: Effects, checked: Effects) -> Iterator[Row]:
        for component, top in enumerate(self._monitored.tops):
            if len(top):
                measured = float(np.nanmean(checked.of(top))) if len(checked.examples_u) else None
                mean = float(np.nanmean(kl.of(top)))
                yield {"component": component, "n_examples": len(top), "kl": mean, "kl_checked": measured}

    def _correlation(self, component: int, kl: Effects) -> float | None:
        drawn = self._monitored.drawn
        return rank_correlation(self._scores_NK[drawn, component], kl.of(drawn))

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
        masses_K = self._masses_K
        cosines_K = np.abs(self._components_KD @ self._components_KD[component])
        heavier = [
            other
            for other in self._lifted
            if masses_K[other] > masses_K[component] and cosines_K[other] >= LEAST_OVERLAP
        ]
        return orthogonalized(own, [self._direction(other) for other in heavier])

    @cached_property
    def _masses_K(self) -> NDArray[np.float64]:
        """The sum of the coefficients of each component over the fitted examples, (K,)."""
        fit_N = self._candidates.members["fit"]
        masses = [np.nansum(w_N[fit_N], dtype=np.float64) for w_N in self._coefficients_NK.T]
        return np.array(masses)

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

    def _seed(self, component: int, purpose: str) -> int:
        words = np.frombuffer(purpose.encode().ljust(-len(purpose) % 4 + len(purpose), b" "), dtype=np.uint32)
        entropy = [self._options.seed, component, *words.tolist()]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
