from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.query.tables import RunTables
from npeff.reports.in_common import in_common, words_of
from npeff.statistics.contingency import q_values
from places import place
from scipy import stats

N = 200
TOPS = {0: list(range(20)), 1: list(range(100, 120))}


def tables_of(path: Path, **columns: list) -> RunTables:
    (path / "tables").mkdir()
    valid = [i != 19 for i in range(N)]
    table = pa.table({"example": list(range(N)), "valid": valid, **columns})
    pq.write_table(table, path / place("tables/examples.parquet"))
    return RunTables(path)


def test_words_are_counted_once_per_example_without_case_or_punctuation() -> None:
    assert words_of("Don't, don’t: the THE well-kept (x_1) Öl!") == {
        "don't",
        "don’t",
        "the",
        "well-kept",
        "x",
        "1",
        "öl",
    }
    assert words_of("width 0.2, length 3.80 and 12.") == {"width", "0.2", "length", "3.80", "and", "12"}
    assert words_of(None) == set()


def test_a_word_that_top_examples_share_is_found_with_its_probability(tmp_path: Path) -> None:
    texts = [f"common {'planted planted' if i < 15 or i in (50, 150) else 'other'} word{i}" for i in range(N)]
    found = in_common(tables_of(tmp_path, text=texts), [], TOPS)
    assert [word.value for word in found[0].words] == ["planted"]
    assert found[1].words == []
    word = found[0].words[0]
    assert (word.column, word.share, word.base) == (None, 15 / 19, 17 / (N - 1))
    p_value = stats.hypergeom.sf(14, N - 1, 17, 19)
    assert word.q == pytest.approx(p_value * 3 * 2)  # three words that are in three examples or more, two components


def test_values_of_columns_are_found_and_columns_of_numbers_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = rng.standard_normal(N) + np.where(np.arange(N) < 20, 2.0, 0.0)
    columns = {
        "kind": ["rare" if i < 12 else "usual" for i in range(N)],
        "flag": [i % 2 == 0 for i in range(N)],
        "size": size.tolist(),
        "count": rng.integers(0, 40, N).tolist(),
        "text": [None] * N,
    }
    found = in_common(tables_of(tmp_path, **columns), ["kind", "flag", "size", "count"], TOPS)
    assert [(value.column, value.value) for value in found[0].values] == [("kind", "rare")]
    assert [number.column for number in found[0].numbers] == ["size"]
    number = found[0].numbers[0]
    valid = [i for i in range(N) if i != 19]
    top, rest = size[:19], size[20:]
    p_value = stats.mannwhitneyu(top, rest, method="asymptotic", use_continuity=False).pvalue
    assert number.q == pytest.approx(p_value * 4, rel=1e-6)  # two columns, two components; the others' are larger
    assert (number.median, number.median_base) == (np.median(top), np.median(size[valid]))
    assert found[1].values == found[1].numbers == []


def test_q_values_are_benjamini_hochbergs_with_the_tests_that_were_not_computed() -> None:
    p_values = np.random.default_rng(0).random(20) ** 3
    everything = np.concatenate([p_values, np.ones(30)])
    assert q_values(p_values, 50) == pytest.approx(stats.false_discovery_control(everything)[:20])


def test_examples_that_have_nothing_in_common_show_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 30, 6)) for _ in range(N)]
    tops = {j: rng.choice(N, 20, replace=False).tolist() for j in range(8)}
    found = in_common(tables_of(tmp_path, text=texts), [], tops)
    assert sum(len(common.words) for common in found.values()) <= 1
