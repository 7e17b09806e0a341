"""The tables of a factorization against their definitions, from coefficients in one piece and in several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.factorize.tables import write_component_tables
from npeff.store import coefficient_rows
from npeff.store.coefficient_rows import StackedRows
from npeff.store.schemas import SCHEMAS
from npeff.store.tables import read_table, write_table

N, K, TOP = 90, 7, 5


@pytest.mark.parametrize("in_parts", [False, True])
def test_tables_say_what_the_coefficients_are(tmp_path: Path, in_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficient_rows, "BLOCK_BYTES", 3 * 4 * N)
    rng = np.random.default_rng(0)
    document = {"run_dir": str(tmp_path / "run"), "task": {"name": "digits"}, "factorization": {"n_components": K}}
    run = RunDirectory.create(RunConfig.model_validate(document | {"verification": {"top_examples": TOP}}))
    split = np.where(rng.random(N) < 0.3, "held_out", "fit")
    columns = {field.name: [None] * N for field in SCHEMAS["examples"]}
    columns |= {"example": range(N), "id": [str(i) for i in range(N)], "split": split.astype(object)}
    columns |= {"valid": [True] * N, "fisher_norm": [1.0] * N, "fisher_rank": [1] * N}
    write_table(run.table("examples"), "examples", columns)
    w_NK = (rng.integers(0, 4, (N, K)) / 2).astype(np.float32)
    w_NK[:, 3], w_NK[8] = 0, np.nan
    components_KD = np.linalg.qr(rng.standard_normal((9, 9)))[0][:K]
    write_component_tables(run, components_KD, StackedRows(np.split(w_NK, [20, 21])) if in_parts else w_NK)

    w = np.nan_to_num(w_NK)
    order = [(k, -w[i, k], i) for k in range(K) for i in range(N) if w[i, k]]
    found = read_table(run.table("coefficients"), "coefficients")
    rows = zip(*(found[name].to_pylist() for name in ("component", "coefficient", "example")), strict=True)
    assert [(k, -value, i) for k, value, i in rows] == sorted(order)
    top = read_table(run.table("top_examples"), "top_examples").to_pylist()
    for k in range(K):
        for name in ("fit", "held_out"):
            expected = [(i, -value) for j, value, i in sorted(order) if j == k and split[i] == name][:TOP]
            chosen = [row for row in top if (row["component"], row["split"]) == (k, name)]
            assert [(row["example"], row["coefficient"]) for row in chosen] == expected
            assert [row["rank"] for row in chosen] == list(range(len(expected)))
    components = read_table(run.table("components"), "components")
    fitted = w[split == "fit"].astype(np.float64)
    assert components["n_active"].to_pylist() == (fitted > 0).sum(axis=0).tolist()
    np.testing.assert_allclose(components["mass"], fitted.sum(axis=0))
    np.testing.assert_allclose(components["energy"], (fitted**2).sum(axis=0))
