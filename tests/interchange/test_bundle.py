"""`npeff bundle`: a folder for a static host, with what it must contain and without what must not be passed on."""

from __future__ import annotations

import json
from pathlib import Path

import npeff
import pyarrow.parquet as pq
import pytest
import yaml
from chromium import Browser
from in_process import command, refused
from npeff.interchange.bundle import BundleOptions, write_bundle
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.storage.errors import StoreError
from safetensors.numpy import load_file

HOSTILE = "<script>alert(1)</script>|`x`"


def card(folder: Path) -> tuple[dict, str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_bundle_has_the_report_the_tables_the_chosen_directions_and_a_card(
    lifted_run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    npeff.annotate(lifted_run.path, 1, name=HOSTILE)
    out = tmp_path / "out"
    assert command("bundle", lifted_run.path, out, "--components", "1,0", "--license", "cc-by-4.0") == 0
    assert "bundle: complete" in capfd.readouterr().out
    store = npeff.ComponentStore.open(lifted_run.path)
    assert {file.stem for file in (out / "tables").iterdir()} == set(store.tables.names())
    assert pq.read_table(out / "tables/examples.parquet").equals(store.table("examples"))
    assert {file.name for file in (out / "directions").iterdir()} == {f"component-{k}.safetensors" for k in (0, 1)}
    direction = load_file(out / "directions/component-1.safetensors")
    assert sum(float((values.astype(float) ** 2).sum()) for values in direction.values()) == pytest.approx(1.0)
    assert json.loads((out / "annotations.json").read_text())["annotations"]["1"]["name"] == HOSTILE
    head, text = card(out)
    assert head["license"] == "cc-by-4.0"
    assert {each["config_name"] for each in head["configs"]} == set(store.tables.names())
    assert all((out / each["data_files"]).is_file() for each in head["configs"])
    assert "`<script>alert(1)</script>\\|'x'`" in text  # in code, and in its cell of the table
    assert "model fingerprint" in text
    assert json.loads((lifted_run.path / "provenance.json").read_text())["packages"]["torch"] in text
    page = (out / "index.html").read_text()
    assert store.top_examples(1, 1, "held_out")["text"][0].as_py() in page
    assert HOSTILE not in page


def test_without_texts_no_text_of_an_example_is_in_any_file(lifted_run: RunDirectory, tmp_path: Path) -> None:
    out = write_bundle(lifted_run.path, tmp_path / "out", BundleOptions(texts=False))
    texts = npeff.ComponentStore.open(lifted_run.path).table("examples")["text"].to_pylist()
    for file in out.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not any(text.encode() in content for text in texts), file
    assert pq.read_table(out / "tables/examples.parquet")["text"].null_count == len(texts)
    assert "are left out" in card(out)[1]


def test_without_texts_there_are_no_images_tokens_and_columns_of_the_task(make_run, tmp_path: Path) -> None:
    path = make_run(n_components=3, shares=True, inputs=True).path
    out = write_bundle(path, tmp_path / "out", BundleOptions(texts=False))
    tables = {file.stem for file in (out / "tables").iterdir()}
    assert not {"position_shares", "input_shares"} & tables
    assert {"inputs", "input_groups"} <= tables
    examples = pq.read_table(out / "tables/examples.parquet")
    assert examples["image"].null_count == len(examples)
    assert not {"writer", "ink"} & set(examples.column_names)
    page = (out / "index.html").read_text()
    assert "data:image/png" not in page
    assert "writer 1" not in page
    whole = write_bundle(path, tmp_path / "whole")
    assert "data:image/png" in (whole / "index.html").read_text()
    assert "writer 1" in (whole / "index.html").read_text()


@pytest.mark.process
def test_bundles_open_from_the_disk_in_a_browser(browser: Browser, make_run, tmp_path: Path) -> None:
    path = make_run(n_components=3, text_instead_of_images=True).path
    for texts in (True, False):
        out = write_bundle(path, tmp_path / f"out-{texts}", BundleOptions(texts=texts))
        browser.open(out / "index.html", width=1280)
        assert browser.complaints == []
        assert browser.requests == [(out / "index.html").as_uri()]
        assert browser.evaluate("document.querySelectorAll('.card').length") == 3


def test_what_cannot_be_bundled_is_refused_and_nothing_is_written(
    lifted_run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "is not an empty folder: choose another" in refused(capfd, "bundle", lifted_run.path, tmp_path / "full")
    for options, said in (
        (("--components", "0,x"), "--components is a list of numbers"),
        (("--components", "7"), "has no component 7"),
        (("--license", "my own: licence"), "is not an identifier of a licence"),
    ):
        assert said in refused(capfd, "bundle", lifted_run.path, tmp_path / "out", *options)
    assert "no run in" in refused(capfd, "bundle", tmp_path / "full", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    with pytest.raises(ConfigError):
        BundleOptions(license="")
    with pytest.raises(StoreError):
        write_bundle(lifted_run.path, tmp_path / "full/mine.txt")
