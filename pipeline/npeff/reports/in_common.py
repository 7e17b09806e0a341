"""Words and metadata that are over-represented among the top examples of a component.

Each word or value of a column is counted once per example. If n_top of the t top examples of a component have a word or
value, and n_all of all N valid examples, its p-value is the one-sided hypergeometric probability of at least n_top in t
draws. For a column of numbers, the ranks of the top examples are compared with those of all other examples
(Mann-Whitney, two-sided, normal approximation with ties). q-values are those of Benjamini and Hochberg over all
components and all words (or values, or columns of numbers) of the report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy  # imports its subpackages on first use, which takes a second for scipy.stats
from numpy.typing import NDArray

from npeff.query.tables import RunTables
from npeff.statistics.contingency import q_values

SIGNIFICANT = 0.05
_AT_LEAST = 3
"""Smallest number of examples with a word or value that is tested."""
_MOST_INTEGER_VALUES = 20
"""A column of integers with more distinct values than this is treated as numbers, not as categories."""
_WORD = re.compile(r"\d+(?:\.\d+)*(?:e[+-]?\d+)?(?![^\W_])|[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Enriched:
    """A word, or a value of a column, that is over-represented among top examples."""

    column: str | None
    """Name of the column; None for a word of the texts."""
    value: str
    share: float
    base: float
    q: float


@dataclass(frozen=True)
class Shifted:
    """A column of numbers that differ between the top examples and the other examples."""

    column: str
    median: float
    median_base: float
    q: float


@dataclass(frozen=True)
class Common:
    """Over-represented words and values of one component's top examples, smallest p-value first."""

    values: list[Enriched]
    words: list[Enriched]
    numbers: list[Shifted]

    @property
    def leading(self) -> list[Enriched | Shifted]:
        """All of them, the smallest p-value first."""
        return sorted([*self.words, *self.values, *self.numbers], key=lambda each: each.q)


def in_common(tables: RunTables, columns: Sequence[str], tops: Mapping[int, Sequence[int]]) -> dict[int, Common]:
    """Find the over-represented words and values of every component.

    Args:
        tables: The tables of the run.
        columns: Metadata columns of the examples table.
        tops: Top examples of each component.
    """
    schema = tables.dataset("examples").schema
    table = tables.read("examples", ["example", *columns], pc.field("valid"))
    examples = table["example"].to_numpy()  # ascending
    members = {j: _places(examples, np.array(top, np.int64)) for j, top in tops.items()}
    numbers = [name for name in columns if _is_of_numbers(table[name])]
    values = _Counts(members, len(table))
    for name in columns:
        if name not in numbers:
            values.add_column(name, table[name])
    words = _Counts(members, len(table))
    if "text" in schema.names:
        words.add(None, (words_of(text) for text in _texts(tables)))
    found_values, found_words = values.enriched(), words.enriched()
    found_numbers = _shifted({name: _floats(table[name]) for name in numbers}, members)
    return {
        j: Common(values=found_values.get(j, []), words=found_words.get(j, []), numbers=found_numbers.get(j, []))
        for j in tops
    }


def _places(examples: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places of the wanted numbers among ascending numbers, without those that are missing."""
    places: NDArray[np.int64] = np.searchsorted(examples, wanted)
    there = places < len(examples)
    there[there] = examples[places[there]] == wanted[there]
    return places[there]


def _texts(tables: RunTables) -> Iterator[str | None]:
    """Yield the texts of the valid examples."""
    for batch in tables.scan("examples", ["valid", "text"]):
        yield from batch["text"].filter(batch["valid"]).to_pylist()


def words_of(text: str | None) -> set[str]:
    """Return the distinct words of a text, in lower case. A number, such as 0.2 or 3.1e+03, is one word."""
    return set(_WORD.findall(text.lower())) if text else set()


class _Counts:
    """Numbers of examples with each word or value, among all examples and among each component's top examples."""

    def __init__(self, members: Mapping[int, NDArray[np.int64]], n_examples: int) -> None:
        self._members, self._n_examples = members, n_examples
        self._components_of: dict[int, list[int]] = {}
        for component, rows in members.items():
            for row in rows.tolist():
                self._components_of.setdefault(row, []).append(component)
        self._all: Counter[tuple[str | None, str]] = Counter()
        self._top: dict[int, Counter[tuple[str | None, str]]] = {j: Counter() for j in members}

    def add(self, column: str | None, features: Iterable[Iterable[str]]) -> None:
        for row, found in enumerate(features):
            keys = [(column, value) for value in found]
            self._all.update(keys)
            for component in self._components_of.get(row, ()):
                self._top[component].update(keys)

    def add_column(self, name: str, column: pa.ChunkedArray) -> None:
        """Add the values of a column. Those of most rows may be different, and only frequent ones become objects."""
        counts = column.drop_null().value_counts()
        for entry in counts.filter(pc.greater_equal(counts.field("counts"), _AT_LEAST)):
            self._all[name, str(entry["values"].as_py())] += entry["counts"].as_py()
        for row in sorted(self._components_of):
            if (value := column[row].as_py()) is not None:
                for component in self._components_of[row]:
                    self._top[component][name, str(value)] += 1

    def enriched(self) -> dict[int, list[Enriched]]:
        tested = {key: count for key, count in self._all.items() if count >= _AT_LEAST}
        pairs = [(j, key, count) for j, top in self._top.items() for key, count in top.items() if key in tested]
        if not pairs:
            return {}
        n_top = np.array([count for _, _, count in pairs])
        n_all = np.array([tested[key] for _, key, _ in pairs])
        drawn = np.array([len(self._members[j]) for j, _, _ in pairs])
        p_values = scipy.stats.hypergeom.sf(n_top - 1, self._n_examples, n_all, drawn)
        q = q_values(p_values, len(tested) * sum(len(rows) > 0 for rows in self._members.values()))
        found: dict[int, list[Enriched]] = {}
        for index in np.lexsort((-n_top, p_values)).tolist():
            if q[index] >= SIGNIFICANT:
                continue
            component, (column, value), count = pairs[index]
            share, base = count / drawn[index], n_all[index] / self._n_examples
            found.setdefault(component, []).append(Enriched(column, value, float(share), float(base), float(q[index])))
        return found


def _shifted(
    columns: Mapping[str, NDArray[np.float64]], members: Mapping[int, NDArray[np.int64]]
) -> dict[int, list[Shifted]]:
    tests: list[tuple[int, str, float, float, float]] = []
    for name, values in columns.items():
        known = np.isfinite(values)
        n = int(known.sum())
        if n < 2:
            continue
        ranks = np.full(len(values), np.nan)
        ranks[known] = scipy.stats.rankdata(values[known])
        _, ties = np.unique(values[known], return_counts=True)
        spread = (n + 1) - float((ties.astype(float) ** 3 - ties).sum()) / (n * (n - 1))
        base = float(np.median(values[known]))
        for component, rows in members.items():
            top = rows[known[rows]]
            if not len(top) or len(top) == n or spread <= 0:
                continue
            deviation = float(ranks[top].sum()) - len(top) * (n + 1) / 2
            z = deviation / np.sqrt(len(top) * (n - len(top)) * spread / 12)
            tests.append((component, name, float(np.median(values[top])), base, float(2 * scipy.stats.norm.sf(abs(z)))))
    q = q_values(np.array([test[-1] for test in tests]), len(tests)) if tests else np.zeros(0)
    found: dict[int, list[Shifted]] = {}
    for index in sorted(range(len(tests)), key=lambda i: tests[i][-1]):
        if q[index] < SIGNIFICANT:
            component, name, median, base, _ = tests[index]
            found.setdefault(component, []).append(Shifted(name, median, base, float(q[index])))
    return found


def _is_of_numbers(column: pa.ChunkedArray) -> bool:
    if pa.types.is_integer(column.type):
        return bool(pc.count_distinct(column).as_py() > _MOST_INTEGER_VALUES)
    return bool(pa.types.is_floating(column.type) or pa.types.is_decimal(column.type))


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
