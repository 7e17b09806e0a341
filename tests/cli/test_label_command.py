"""`npeff label`: names given one at a time and from files, listed, and shown by every question and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import npeff
import pytest
from in_process import command, refused
from npeff.query.components import ComponentStore
from npeff.reports.report import write_report
from npeff.store.direction_store import DirectionStore
from safetensors import safe_open
from synthetic_run import make_run, written_run

__all__ = ["make_run", "written_run"]

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def named(make_run) -> Path:
    path = make_run(n_components=3).path
    npeff.annotate(path, 1, name=HOSTILE, note="& <b>a note</b>")
    return path


def test_names_are_set_listed_and_deleted(make_run, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_run(n_components=3).path
    assert command("label", path, "--component", "1", "--name", "loops\x1b[1m", "--note", "zeros and sixes") == 0
    capfd.readouterr()
    assert command("label", path, "--format", "json") == 0
    rows = json.loads(capfd.readouterr().out)
    assert rows[1] == {"component": 1, "name": "loops[1m", "note": "zeros and sixes"}
    assert rows[0] == {"component": 0, "name": None, "note": None}
    assert command("label", path, "-c", "1", "--name", "") == 0
    assert ComponentStore.open(path).name(1) is None
    assert ComponentStore.open(path).annotations.note(1) == "zeros and sixes"


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_of_names_is_read(make_run, tmp_path: Path, ending: str) -> None:
    path, file = make_run(n_components=3).path, tmp_path / f"names.{ending}"
    npeff.annotate(path, 2, name="former", note="kept")
    rows = [{"component": 0, "name": "a, b", "note": ""}, {"component": 2, "name": "c", "score": 0.5}]
    if ending == "csv":
        file.write_text('\ufeffcomponent,name,note,score\n0,"a, b",,\n2,c,,0.5\n', encoding="utf-8")
    else:
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert command("label", path, "--from", file) == 0
    store = ComponentStore.open(path)
    assert [store.name(component) for component in range(3)] == ["a, b", None, "c"]
    assert store.annotations.note(2) == "kept"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"component": 0, "name": "x"}\n[1]', "line 2 of FILE is not a JSON object"),
        ("a.jsonl", '{"component": "zero", "name": "x"}', "line 1 of FILE does not have a component and texts"),
        ("a.jsonl", '{"component": true, "name": "x"}', "line 1 of FILE does not have a component and texts"),
        ("a.jsonl", '{"component": 0, "name": ["x"]}', "line 1 of FILE does not have a component and texts"),
        ("a.jsonl", '{"component": 0, "name": "x"}\n{"component": 0}', "line 2 of FILE names component 0 again"),
        ("a.jsonl", '{"component": 3, "name": "x"}', "there is no component 3: choose one of 0 to 2"),
        ("a.jsonl", "", "FILE has no names"),
        ("a.csv", 'component,name\n0,"x', "of FILE is not CSV"),
        ("a.csv", "number,name\n0,x\n", "line 2 of FILE does not have a component and texts"),
        ("a.csv", b"component,name\n0,\xff\n", "FILE is not UTF-8"),
        ("missing.csv", None, "cannot read FILE"),
    ],
)
def test_a_file_that_is_not_valid_is_one_line_and_changes_nothing(
    named: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str | bytes | None, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said.replace("FILE", str(file)) in refused(capfd, "label", named, "--from", file)
    assert list(ComponentStore.open(named).annotations.of_component) == [1]


def test_options_that_do_not_fit_are_refused(named: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "give --component together with --name" in refused(capfd, "label", named, "-c", "1")
    assert "give --component together with --name" in refused(capfd, "label", named, "--name", "x")
    assert "not several of them" in refused(capfd, "label", named, "--from", "x", "-c", "1", "--name", "x")
    assert "there is no component 3" in refused(capfd, "label", named, "-c", "3", "--name", "x")


def test_every_question_about_components_shows_the_names(named: Path) -> None:
    store = ComponentStore.open(named)
    assert store.components_table()["name"].to_pylist() == [None, HOSTILE, None]
    assert store.components_table()["note"].to_pylist() == [None, "& <b>a note</b>", None]
    assert HOSTILE in store.similar_components(0)["name"].to_pylist()
    assert HOSTILE in store.enriched("label = 3")["name"].to_pylist()
    found = store.example(0)
    assert found["name"].to_pylist() == [HOSTILE if c == 1 else None for c in found["component"].to_pylist()]
    assert store.sql("select name from annotations").to_pylist() == [{"name": HOSTILE}]


def test_the_report_shows_names_and_notes_as_texts(named: Path) -> None:
    page = write_report(named).read_text()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3  # the table, the card, and a neighbour
    assert "&amp; &lt;b&gt;a note&lt;/b&gt;" in page
    assert HOSTILE not in page


def test_comparisons_show_the_names(named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComponentStore, "check_comparable", lambda *_: None)  # the run has no Fishers
    shutil.copytree(named / "factorizations/default", named / "factorizations/other")
    npeff.annotate(named, 1, name="elsewhere", factorization="other")
    first, second = ComponentStore.open(named), ComponentStore.open(named, "other")
    found = npeff.compare(first, second)
    assert found["name"].to_pylist() == [None, HOSTILE, None]
    assert found["other_name"].to_pylist() == [None, "elsewhere", None]
    assert first.similar_components_in(second, 1)["name"].to_pylist()[0] == "elsewhere"
    page = npeff.write_comparison(named, tmp_path / "page.html").read_text()
    assert "component 1 “&lt;script&gt;alert(1)&lt;/script&gt;”" in page
    assert "component 1 “elsewhere”" in page


def test_an_exported_direction_has_the_name(named: Path, tmp_path: Path) -> None:
    store = DirectionStore.open(named / "factorizations/default/directions.zarr")
    store.export(1, tmp_path / "d.safetensors", {"name": HOSTILE, "component": "9"})
    with safe_open(tmp_path / "d.safetensors", "numpy") as file:
        assert file.metadata() == {"name": HOSTILE, "component": "1", "direction": "own"}


def test_names_of_former_components_are_told_and_not_shown(named: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = named / "factorizations/default/stages/factorize.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"checksums": {"components": "of another fit"}, "n_components": 3}))
    for arguments in (("query", named, "components"), ("label", named)):
        assert command(*arguments) == 0
        out, err = capfd.readouterr()
        assert "script" not in out
        assert err == "npeff: the names are of components that have been fitted again since, and are not shown\n"
    page = write_report(named).read_text()
    assert "have been fitted again since they were named" in page
    assert "alert(1)" not in page
