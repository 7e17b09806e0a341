"""`npeff label --score`: the scores of a run with planted texts, and when a score no longer belongs to a name."""

from __future__ import annotations

import re
from pathlib import Path

import npeff
import numpy as np
import pytest
from in_process import command, refused
from npeff.query.components import ComponentStore
from npeff.runs.directory import RunDirectory
from npeff.stages.label_scores import N_OTHERS, score_labels
from npeff.statistics.label_scores import detection
from npeff.tasks.huggingface import embedding
from synthetic_run import make_run, written_run

__all__ = ["make_run", "written_run"]


class DigitEmbedder:
    """Embeds a text as the first digit in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def embed(self, texts: list[str]) -> np.ndarray:
        digits = [re.search(r"\d", text) for text in texts]
        rows = np.zeros((len(texts), 10), np.float32)
        for row, digit in zip(rows, digits, strict=True):
            row[int(digit[0]) if digit else 0] = 1.0
        return rows


@pytest.fixture
def path(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(embedding, "TextEmbedder", DigitEmbedder)
    return make_run(text_instead_of_images=True).path


def test_scores_are_those_of_the_definition_on_held_out_examples(path: Path) -> None:
    npeff.annotate(path, 3, name="the digit 0")
    npeff.annotate(path, 0, name="the digit 9")
    rows = score_labels(RunDirectory.open(path), Path("model")).to_pylist()
    store = ComponentStore.open(path)
    labels = np.array(store.table("examples")["label"].to_pylist())
    top = store.sql("select example from top_examples where component = 3 and split = 'held_out'")[
        "example"
    ].to_pylist()
    others = set(store.sql("select example from examples where split = 'held_out' and valid")["example"].to_pylist())
    assert len(others) < N_OTHERS  # all of them are compared
    one_hot, outside = np.eye(10), sorted(others - set(top))
    assert rows[3]["detection"] == detection(one_hot[0], one_hot[labels[top]], one_hot[labels[outside]])
    assert (rows[3]["n_top"], rows[3]["n_others"], rows[3]["name"]) == (len(top), len(outside), "the digit 0")
    assert rows[3]["detection"] > 0.6 > 0.5 > rows[0]["detection"]
    assert rows[1]["detection"] is None
    assert 0.0 <= rows[1]["intruder"] <= 1.0
    assert (rows[11]["n_top"], rows[11]["intruder"]) == (0, None)  # an unused component


def test_a_question_shows_the_scores_and_no_detection_of_a_former_name(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    npeff.annotate(path, 3, name="the digit 0")
    npeff.annotate(path, 0, name="the digit 6")
    assert command("label", path, "--score", "model", "--format", "json") == 0
    assert '"detection"' in capfd.readouterr().out
    npeff.annotate(path, 0, name="another name")
    table = ComponentStore.open(path).components_table()
    detections, intruders = table["detection"].to_pylist(), table["intruder"].to_pylist()
    assert detections[3] is not None
    assert detections[0] is None
    assert intruders[0] is not None
    assert ComponentStore.open(path).sql("select name from label_scores where component = 0").to_pylist() == [
        {"name": "the digit 6"}
    ]


def test_examples_without_texts_are_refused(make_run, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_run(n_components=3).path
    assert "have no texts" in refused(capfd, "label", path, "--score", "model")
    assert not (path / "factorizations/default/tables/label_scores.parquet").exists()


def test_a_model_that_is_not_there_is_one_line(make_run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = make_run(n_components=3, text_instead_of_images=True).path
    assert "is not a folder" in refused(capfd, "label", path, "--score", tmp_path / "missing")
