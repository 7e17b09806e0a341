"""The examples and labels that a step moves the model towards, and the examples on which it is evaluated.

Shapes: N examples of the run, n labelled examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.stage import record_of
from npeff.stages.fishers import FISHERS
from npeff.storage.atomic import local_copy
from npeff.storage.errors import os_errors_explained
from npeff.storage.location import location
from npeff.store.splits import is_fit
from npeff.store.tables import read_table

_COLUMNS = "give a Parquet file with the columns id (or example) and label"
_SHOWN = 3
_LARGEST_CLASS = 2**31 - 1


@dataclass(frozen=True)
class Labelled:
    """The labelled examples, and the held-out examples with a known label of which none is among them."""

    examples_n: NDArray[np.int64]
    """Numbers of the labelled examples, ascending."""
    classes_n: NDArray[np.int64]
    held_out: NDArray[np.int64]
    """Numbers of the held-out examples."""
    fitted_N: NDArray[np.bool_]
    """Marks the valid examples that are not held out: those of the Fisher."""

    @classmethod
    def of(cls, run: RunDirectory) -> Labelled:
        """Read the labels that ``step.towards`` names, or those of the fitted examples.

        Raises:
            RunDirectoryError: There are no labels, the file is not usable, or an example is not known.
            StoreError: The file cannot be read.
        """
        names = ["id", "label", "prediction", "split", "valid"]
        table = read_table(run.shared_table("examples"), "examples", names)
        valid_N, one_N = table["valid"].to_numpy(), table["prediction"].is_valid().to_numpy()
        known_N = table["label"].is_valid().to_numpy() & valid_N & one_N
        fit_N = is_fit(table["split"])
        if not one_N.any():
            raise RunDirectoryError(
                f"the examples of {run.path} have several predictions each: use a run with one prediction for each"
            )
        if not (valid_N & fit_N).any():
            raise RunDirectoryError(
                f"no fitted example of {run.path} has finite logits and gradients: check the examples, or lower "
                "factorization.held_out_fraction in a new run_dir"
            )
        towards = run.config.resolved("step.towards")
        if towards is None:
            examples_n = np.flatnonzero(known_N & fit_N)
            classes_n = table["label"].fill_null(0).to_numpy()[examples_n]
            if not len(examples_n):
                raise RunDirectoryError(
                    f"no fitted example of {run.path} has a known label: give labels with --towards FILE"
                )
        else:
            examples_n, classes_n = _read(str(towards), table["id"].to_pylist(), valid_N & one_N, str(run.path))
            _check_classes(examples_n, classes_n, record_of(run, FISHERS)["n_classes"])
        judged_N = known_N & ~fit_N
        judged_N[examples_n] = False
        return cls(examples_n, classes_n.astype(np.int64), np.flatnonzero(judged_N), valid_N & fit_N)


def _read(
    towards: str, ids: list[str], usable_N: NDArray[np.bool_], run: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the examples of a file, ascending, and their classes."""
    file = location(towards)
    try:
        with os_errors_explained("read", file), local_copy(file) as copy:
            table = pq.read_table(copy)
    except pa.ArrowInvalid:
        raise RunDirectoryError(f"{file} is not a Parquet file: {_COLUMNS}", path=file) from None
    key = next((name for name in ("id", "example") if name in table.column_names), None)
    if key is None or "label" not in table.column_names:
        raise RunDirectoryError(f"{file} has the columns {', '.join(table.column_names) or 'none'}: {_COLUMNS}")
    if not len(table):
        raise RunDirectoryError(f"{file} has no rows: {_COLUMNS}")
    labels = table["label"]
    values = labels.to_pylist()
    if not pa.types.is_integer(labels.type) or labels.null_count or min(values) < 0 or max(values) > _LARGEST_CLASS:
        raise RunDirectoryError(f"{file}: column label must have a class number (0, 1, …) in every row", path=file)
    wanted, is_wanted = ("whole numbers", pa.types.is_integer) if key == "example" else ("texts", _is_text)
    if not is_wanted(table[key].type):
        raise RunDirectoryError(f"{file}: column {key} must have {wanted}, not values of type {table[key].type}")
    numbers = _numbers(table[key].to_pylist(), key, ids, str(file), run)
    examples_n = np.array(numbers, dtype=np.int64)
    if len(np.unique(examples_n)) < len(examples_n):
        raise RunDirectoryError(f"{file} has an example twice: give one label for each example", path=file)
    if not usable_N[examples_n].all():
        wrong = examples_n[~usable_N[examples_n]][0]
        raise RunDirectoryError(f"{file}: example {wrong} of {run} has logits that are not finite: leave it out")
    order = examples_n.argsort()
    return examples_n[order], labels.to_numpy().astype(np.int64)[order]


def _check_classes(examples_n: NDArray[np.int64], classes_n: NDArray[np.int64], n_classes: int) -> None:
    for example, label in zip(examples_n.tolist(), classes_n.tolist(), strict=True):
        if label >= n_classes:
            raise RunDirectoryError(
                f"the label of example {example} is {label}, and the model has the classes 0 to {n_classes - 1}: "
                "correct the labels"
            )


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _numbers(values: list[Any], key: str, ids: list[str], file: str, run: str) -> list[int]:
    if key == "example":
        known: dict[Any, int] = {number: number for number in range(len(ids))}
    else:
        known = {name: number for number, name in enumerate(ids)}
        counts: dict[str, int] = {}
        for name in ids:
            counts[name] = counts.get(name, 0) + 1
        if several := [str(value) for value in values if counts.get(value, 0) > 1]:
            raise RunDirectoryError(
                f"{file}: {run} has {counts[several[0]]} examples with the id {several[0]!r}: give the column example"
            )
    unknown = [repr(value) for value in values if value not in known]
    if unknown:
        more = ", …" if len(unknown) > _SHOWN else ""
        raise RunDirectoryError(
            f"{file}: {run} has no example with {key} {', '.join(unknown[:_SHOWN])}{more}: give examples of this run"
        )
    return [known[value] for value in values]
