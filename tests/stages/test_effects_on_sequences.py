"""Predicted effects on examples with several predictions are means over the predictions, as measured ones are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import npeff
import pytest
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.store.tables import read_table
from npeff.tasks.planted import compiled


def test_predicted_and_measured_effects_are_of_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(_: Any, predictions: Sequence[tuple[int, int]]) -> list[str]:
        return [f"prediction {number} of {example}" for example, number in predictions]

    monkeypatch.setattr(compiled._Sequences, "prediction_texts", texts)
    document = {
        "run_dir": str(tmp_path / "run"),
        "task": {"name": "compiled-rules", "options": {"n_examples": 60, "separate_outputs": True}},
        "fishers": {"labels": "sampled", "rank": 48, "sketch": {"kind": "identity"}},
        "factorization": {"n_components": 3, "stability_examples": 0, "max_iterations": 10},
        "verification": {"top_examples": 4, "baseline_examples": 8, "target_kl": 0.001},
        "executor": {"kind": "serial"},
    }
    run = RunDirectory.create(RunConfig.model_validate(document))
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift, npeff.verify):
        stage(run)
    rows = read_table(run.table("selectivity"), "selectivity").to_pylist()
    checked = [row["kl"] / row["kl_checked"] for row in rows if row["kl_checked"]]
    assert checked
    assert 0.5 < sorted(checked)[len(checked) // 2] < 2, "an example has eight predictions"
    shifts = read_table(run.table("example_shifts"), "example_shifts").to_pylist()
    assert [row["context"] for row in shifts] == [f"prediction {row['place']} of {row['example']}" for row in shifts]
    assert len({row["place"] for row in shifts}) > 1
