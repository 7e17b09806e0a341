"""The worker of the stage `inputs`: moments of the inputs, and the information in the inputs of some examples.

An item is a block of examples. Legend: B examples of a batch, P positions, F features, D = P·F entries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npeff.execution.serial import computing_threads
from npeff.gradients import LabelSpec
from npeff.input_fisher.attribution import InputInformation, input_information
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import Moments, merged
from npeff.input_fisher.noise import InputNoise
from npeff.input_fisher.replacements import OtherExamples
from npeff.models.loaded import ModelSpec, flattened
from npeff.runs.config_input_sections import InputsConfig
from npeff.runs.definition import unit_file
from npeff.stages.inputs.covariance import EVERY, InputFacts, read_noises
from npeff.stages.inputs.examples import Block
from npeff.stages.inputs.positions import Positions, group_rows, positions_of, share_rows
from npeff.stages.inputs.scores import score_rows
from npeff.store.tables import rows_to_columns, write_table

TABLES = ("inputs", "input_shares", "input_groups", "faithfulness_scores")
"""The tables with rows of each block."""
_INSPECTED = 2


@dataclass(frozen=True)
class InputPaths:
    covariance: Path
    """File of the mean and the factors, which the driver writes before `InputWorker.compute` is called."""
    results: Path
    """Folder of the result files of the blocks."""
    lineage: str | None = None


class InputWorker:
    """Computes moments of the inputs, and the information in the inputs, one block of examples per call.

    Args:
        model: the run's model.
        labels: label rows, for the information about all classes.
        options: options of the stage.
        seed: seed of the noise.
        batch_size: largest number of examples of a batch.
        rows_per_pass: largest number of examples times draws of a pass, for examples with one prediction.
        paths: files of the covariance and of the results.
        tested: numbers of the examples on which attributions are compared.
        donors: numbers of the examples whose inputs replace those of tested examples.
    """

    def __init__(
        self,
        model: ModelSpec,
        labels: LabelSpec,
        options: InputsConfig,
        seed: int,
        batch_size: int,
        rows_per_pass: int,
        paths: InputPaths,
        tested: Collection[int] = (),
        donors: Sequence[int] = (),
    ) -> None:
        self._loaded = model.load()
        self._labels, self._options, self._seed, self._batch_size = labels, options, seed, batch_size
        self._rows_per_pass, self._paths = rows_per_pass, paths
        self._tested, self._donors = frozenset(tested), donors

    def inspect(self, examples: Sequence[int]) -> tuple[InputFacts, list[int] | None]:
        """Check the inputs of the first examples.

        Args:
            examples: numbers of all explained examples.

        Returns:
            Facts about the model and the inputs, and the length of each example, None if all lengths are equal.

        Raises:
            TaskError: as `LoadedModel.check_inputs`.
        """
        first = examples[:_INSPECTED]
        self._loaded.check_inputs(first)
        flat = self._loaded.flat_inputs(self._loaded.batch(first), len(first))
        with torch.no_grad():
            logits = flat.logits(flat.values_BPF)
        _, n_positions, n_features = flat.values_BPF.shape
        n_parameters = sum(parameter.numel() for parameter in self._loaded.model.parameters())
        facts = InputFacts(n_positions, n_features, flat.exchangeable, logits.dim() > 2, n_parameters)
        lengths = self._loaded.lengths
        return facts, None if lengths is None else [int(lengths[example]) for example in examples]

    def moments(self, examples: Sequence[int]) -> tuple[dict[int, Moments], int]:
        """Compute the moments of the inputs of some examples.

        Args:
            examples: numbers of the examples.

        Returns:
            The moments, by class or for `EVERY`, and the number of examples left out because their inputs are not
            finite.
        """
        parts: dict[int, list[Moments]] = {}
        n_left_out = 0
        for covariance, members in self._by_covariance(examples).items():
            for chosen in self._loaded.batches(members, self._batch_size):
                flat = self._loaded.flat_inputs(self._loaded.batch(chosen), len(chosen))
                finite_BP = flat.values_BPF.isfinite().all(2)
                if flat.exchangeable:
                    finite_BP |= ~flat.used_BP  # the moments are those of the used positions
                finite_B = finite_BP.all(1)
                n_left_out += int((~finite_B).sum())
                kept = FlatInputs(flat.values_BPF[finite_B], flat.logits, flat.used_BP[finite_B], flat.exchangeable)
                parts.setdefault(covariance, []).append(Moments.of(kept, self._options.covariance))
        return {number: merged(found).on(torch.device("cpu")) for number, found in parts.items()}, n_left_out

    def compute(self, block: Block) -> int:
        """Write the tables of a block of examples. Returns the number of examples that are not finite."""
        rows: dict[str, dict[int, list[dict[str, Any]]]] = {table: {} for table in TABLES}
        for covariance, members in self._by_covariance(block.examples).items():
            for chosen in self._loaded.batches(members, self._batch_size):
                with computing_threads(self._loaded.threads(len(chosen))):
                    for table, example, found in self._rows(chosen, self._noises[covariance]):
                        rows[table][example] = found
        for table, by_example in reversed(rows.items()):  # last the table whose file marks a finished block
            ordered = [row for example in block.examples for row in by_example.get(example, ())]
            file = unit_file(self._paths.results, block.number, table, first=TABLES[0])
            write_table(file, table, rows_to_columns(ordered, table), self._paths.lineage)
        return sum(row["information"] is None for (row,) in rows["inputs"].values())

    def _rows(self, chosen: Sequence[int], noise: InputNoise) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
        """Yield the rows of each table and example of a batch."""
        batch, targets = self._loaded.with_targets(chosen)
        inputs = self._loaded.inputs(batch, len(chosen))
        flat = flattened(inputs)
        with torch.no_grad():
            before = flat.logits(flat.values_BPF).argmax(-1)
        classes_B = {"prediction": before, "label": targets, "all": None}[self._options.label]
        found = self._information(chosen, noise, before, classes_B)
        tokens = self._loaded.input_tokens(chosen) if inputs.exchangeable else None
        for row, (example, positions) in enumerate(zip(chosen, positions_of(inputs, tokens), strict=True)):
            shares = share_rows(example, positions, found.positions_BP[row])
            yield "inputs", example, [self._row(example, row, found, classes_B, positions)]
            yield "input_shares", example, shares
            yield "input_groups", example, group_rows(example, shares)
        if chosen[0] in self._tested:
            samples, steps = self._options.samples, self._options.faithfulness.steps
            scores = score_rows(flat, chosen, found.positions_BP, noise, self._others, samples, steps)
            for example, rows in scores.items():
                yield "faithfulness_scores", example, rows

    def _information(
        self, chosen: Sequence[int], noise: InputNoise, before: Tensor, classes_B: Tensor | None
    ) -> InputInformation:
        """Return the information in the inputs of a batch, whose predicted classes are ``before``."""
        samples = self._options.samples
        n_rows = self._rows_per_pass if before.dim() == 1 else self._batch_size
        affordable = max(1, n_rows // len(chosen))
        repeats = next(count for count in range(min(samples, affordable), 0, -1) if samples % count == 0)
        repeated = list(chosen) * repeats
        batch, targets = self._loaded.with_targets(repeated)
        return input_information(
            self._loaded.flat_inputs(batch, len(repeated)),
            noise,
            chosen,
            samples=samples,
            repeats=repeats,
            before=before,
            classes_B=classes_B,
            labels=self._labels,
            targets=targets,
            conditional=self._options.split == "conditional",
        )

    def _row(
        self, example: int, row: int, found: InputInformation, classes_B: Tensor | None, positions: Positions
    ) -> dict[str, Any]:
        """Return the row of the table `inputs`."""
        numbers = {
            "information": found.information_B,
            "information_se": found.information_se_B,
            "entropy": found.entropy_B,
            "entropy_se": found.entropy_se_B,
            "prediction_stable": found.stable_B,
        }
        finite = bool(found.information_B[row].isfinite())
        return {
            "example": example,
            "class": None if classes_B is None else int(classes_B[row]),
            "n_samples": self._options.samples,
            "shape": list(positions.shape),
            **{name: _number(values[row]) if finite else None for name, values in numbers.items()},
        }

    def _by_covariance(self, examples: Sequence[int]) -> dict[int, list[int]]:
        """Return the examples by the number of their covariance, in ascending order."""
        if self._options.scope == "all":
            return {EVERY: list(examples)}
        found: dict[int, list[int]] = {}
        for example in examples:
            found.setdefault(int(self._loaded.labels_N[example]), []).append(example)
        return dict(sorted(found.items()))

    @cached_property
    def _others(self) -> OtherExamples:
        """The examples whose inputs replace those of tested examples."""
        batches = self._loaded.batches(self._donors, self._batch_size)
        parts = ((self._loaded.flat_inputs(self._loaded.batch(chosen), len(chosen)), chosen) for chosen in batches)
        return OtherExamples.of(parts, self._seed)

    @cached_property
    def _noises(self) -> dict[int, InputNoise]:
        """The noise of each covariance, by its number."""
        return read_noises(self._paths.covariance, self._options.spread, self._seed, self._loaded.device)


def _number(value: Tensor) -> float | None:
    """Return a number of a table: null if it is not known."""
    return float(value) if bool(value.isfinite()) else None
