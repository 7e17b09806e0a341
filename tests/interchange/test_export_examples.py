"""The JSON lines of `npeff export --what examples`: top and contrast examples with what a labeller must know."""

from __future__ import annotations

import json
from pathlib import Path

import npeff
import pytest
from in_process import command, refused
from npeff.query.components import ComponentStore
from synthetic_run import make_run, written_run

__all__ = ["make_run", "written_run"]


@pytest.fixture
def path(make_run) -> Path:
    return make_run(n_components=3, text_instead_of_images=True, shares=True).path


def exported(path: Path, file: Path, *options: str) -> list[dict]:
    assert command("export", path, file, "--what", "examples", *options) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_has_the_top_examples_of_a_component_in_order_with_texts_and_classes(path: Path, tmp_path: Path) -> None:
    npeff.annotate(path, 1, name="a name")
    lines = exported(path, tmp_path / "e.jsonl", "-n", "5")
    store = ComponentStore.open(path)
    assert [line["component"] for line in lines] == [0, 1, 2]
    assert [line["name"] for line in lines] == [None, "a name", None]
    for line in lines[:2]:
        for split in ("held_out", "fit"):
            expected = store.top_examples(line["component"], 5, split).to_pylist()
            found = [each for each in line["top"] if each["split"] == split]
            assert [each["example"] for each in found] == [row["example"] for row in expected]
            assert [each["text"] for each in found] == [row["text"] for row in expected]
            assert [each["prediction"] for each in found] == [row["prediction_name"] for row in expected]
            assert [each["writer"] for each in found] == [row["writer"] for row in expected]
            assert [each["coefficient"] for each in found] == pytest.approx([row["coefficient"] for row in expected])
    assert [each["split"] for each in lines[0]["top"]] == ["held_out"] * 5 + ["fit"] * 5
    assert lines[2]["top"] == []  # an unused component


def test_tokens_have_their_shares_and_images_are_left_out(path: Path, tmp_path: Path) -> None:
    example = exported(path, tmp_path / "e.jsonl")[0]["top"][0]
    assert example["tokens"][2]["share"] == 1.0
    assert [each["token"] for each in example["tokens"]][:2] == ["A", example["label"]]
    assert not {"image", "logits"} & example.keys()


def test_contrast_examples_do_not_have_the_component(make_run, tmp_path: Path) -> None:
    lines = exported(make_run().path, tmp_path / "e.jsonl")
    contrasted = [line for line in lines if line["contrast"]]
    assert contrasted
    for line in contrasted:
        largest = max(each["coefficient"] for each in line["top"])
        assert all(each["coefficient"] <= 0.01 * largest for each in line["contrast"])


def test_options_of_other_exports_are_refused(path: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options, said in (
        (("--what", "examples", "-c", "1"), "--component needs --what direction"),
        (("--what", "examples", "--values", "3"), "--values needs --what fishers"),
        (("--what", "fishers", "-n", "3"), "-n needs --what examples"),
        (("--what", "direction"), "--what direction needs --component"),
    ):
        assert said in refused(capfd, "export", path, tmp_path / "x", *options)
    assert not list(tmp_path.glob("x*"))
