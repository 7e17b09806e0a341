"""docs/store.md: its snippets run without this package and say what the store says; all columns are described."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from npeff.query.components import ComponentStore
from npeff.store.component_store import StoredFactorization
from npeff.store.fisher_arrays import array_specs
from npeff.store.schemas import SCHEMAS

PAGE = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
SNIPPETS = {
    re.search(r"^import (\w+)", text, re.MULTILINE)[1]: text
    for text in re.findall(r"^```python\n(.*?)^```", PAGE.split("## Without this package")[1], re.DOTALL | re.MULTILINE)
}


def answer_of(snippet: str, run_dir: Path) -> str:
    """What a snippet prints in a process that cannot import this package."""
    code = "import sys; sys.modules['npeff'] = None\n" + snippet.replace("runs/digits", str(run_dir))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.process
def test_zarr_reads_an_examples_components(run) -> None:
    expected = np.flatnonzero(run.coefficients[17] if run.valid[17] else np.ones(12))
    assert answer_of(SNIPPETS["zarr"], run.path).strip() == str(expected)


@pytest.mark.process
def test_duckdb_reads_top_examples(run) -> None:
    shown = answer_of(SNIPPETS["duckdb"], run.path)
    found = ComponentStore.open(run.path).top_examples(3, 5, where="label = 2")["id"].to_pylist()
    assert re.findall(r"digit-\d+", shown) == found


@pytest.mark.process
def test_pandas_reads_components_and_one_components_coefficients(run) -> None:
    pytest.importorskip("pandas")
    shown = answer_of(SNIPPETS["pandas"], run.path)
    assert "n_active" in shown
    assert str(ComponentStore.open(run.path).top_examples(3, 1)["example"][0]) in shown


def test_every_tables_columns_are_described() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.split("## Tables")[1], re.MULTILINE))
    described = {name: set(re.findall(r"\w+", rows[name])) for name in SCHEMAS}
    assert {name: set(SCHEMAS[name].names) - described[name] for name in SCHEMAS} == {name: set() for name in SCHEMAS}
    assert len(SNIPPETS) == 3


def test_every_array_is_described() -> None:
    in_fishers = array_specs(
        rank=2, dim=4, n_classes=3, store_dtype="float16", with_logits=True, top_entries=5, n_groups=6
    )
    in_factorization = {field.name for field in fields(StoredFactorization)} - {"path", "attrs"}
    page = PAGE.split("## Arrays")[1].split("\n## ")[0]
    described = {
        group: set(
            re.findall(r"`(?:\w+\.zarr/)?(\w+)`", " ".join(re.findall(rf"^\| (`{group}/.*?) \|", page, re.MULTILINE)))
        )
        for group in ("fishers.zarr", "factorization.zarr")
    }
    assert described == {"fishers.zarr": set(in_fishers), "factorization.zarr": in_factorization}
