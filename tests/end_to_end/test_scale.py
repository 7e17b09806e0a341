"""The stage `scale` on a digits run: its bracket, the same bits however it is run, and bad input in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pyarrow as pa
import pytest
import torch
from in_process import command, refused
from npeff.input_fisher.path import chord
from npeff.models.loaded import LoadedModel
from npeff.perception.difference_scaling import answer_probability, triplets
from npeff.perception.matching import area_matching_score
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.scale.curves import Curves
from npeff.stages.scale.worker import ScaleWorker
from npeff.stages.status import status
from npeff.stages.worker_specs import model_spec
from npeff.storage.checksums import file_checksum
from npeff.store.tables import read_table, table_lineage, write_table
from npeff.tasks import Inputs, TaskError, Token
from npeff.tasks.digits import DigitsTask

TABLES = ("paths", "scales", "morphs")
TOLERANCE = 0.01


def config(path: Path, **sections: Any) -> RunConfig:
    run: dict[str, Any] = {
        "run_dir": str(path),
        "task": {"name": "digits", "options": {"limit": 60, "train_examples": 300, "epochs": 8}},
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 256}},
        "factorization": {"n_components": 3, "n_starts": 1, "max_iterations": 5, "stability_examples": 0},
        "scale": {"pairs": 6, "space": "gaussian", "components": [1]},
        "executor": {"kind": "serial"},
    }
    return RunConfig.model_validate(run | sections)


def rows(run: RunDirectory, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(run.table(table), table).to_pylist()
    return found


def bits(run: RunDirectory) -> dict[str, str]:
    return {table: file_checksum(run.table(table)) for table in TABLES}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory.create(config(tmp_path_factory.mktemp("scale") / "run"))
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift, npeff.scale):
        stage(run)
    return run


@pytest.fixture(scope="module")
def loaded(run: RunDirectory) -> LoadedModel:
    return model_spec(run, fingerprint_of(run)).load()


@pytest.fixture
def copy(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(run.path, tmp_path / "run"))


def with_scale(run: RunDirectory, **changes: Any) -> RunDirectory:
    return RunDirectory.create(run.config.with_scale(**changes))


def test_every_path_is_bracketed(run: RunDirectory, loaded: LoadedModel) -> None:
    paths = [row for row in rows(run, "paths") if row["space"] == "model"]
    assert len(paths) == 6 + 12
    scales = rows(run, "scales")
    for row in paths:
        assert row["tolerance_met"]
        points = [each for each in scales if each["path"] == row["path"] and each["space"] == "model"]
        assert len(points) == row["n_points"]
        first, last = (loaded.batch([row[end]])[0] for end in ("from_example", "to_example"))
        s = torch.tensor([point["s"] for point in points], dtype=torch.float32)[:, None, None, None]
        with torch.no_grad():
            logits = loaded.model((1 - s) * first + s * last)[:, None]
        chord_sum = float(chord(logits[1:], logits[:-1]).sum())
        distance = float(chord(logits[:1], logits[-1:]))
        assert row["distance"] == pytest.approx(distance, rel=1e-5)
        assert distance <= chord_sum * (1 + 1e-6)
        assert chord_sum * (1 - 1e-5) <= row["length"] <= chord_sum * (1 + TOLERANCE) * (1 + 1e-5)
        psi = [point["psi"] for point in points]
        assert (psi[0], psi[-1]) == (0, 1)
        assert (np.diff(psi) >= 0).all()
        assert row["efficiency"] == pytest.approx(row["distance"] / row["length"])
        assert np.interp(row["half_at"], [point["s"] for point in points], psi) == pytest.approx(0.5)


def test_random_pairs_are_of_different_predicted_classes(run: RunDirectory) -> None:
    predictions = [row["prediction"] for row in rows(run, "examples")]
    paths = [row for row in rows(run, "paths") if row["space"] == "model"]
    assert all(predictions[row["from_example"]] != predictions[row["to_example"]] for row in paths)
    plain = [end for row in paths if row["component"] is None for end in (row["from_example"], row["to_example"])]
    assert len(set(plain)) == len(plain) == 12


def test_the_share_of_a_component_is_that_of_its_top_examples(run: RunDirectory) -> None:
    of_component = [row for row in rows(run, "paths") if row["component"] is not None]
    assert {row["component"] for row in of_component} == {1}
    assert all(0 < row["share"] <= 1 for row in of_component)
    tops = [row for row in rows(run, "top_examples") if row["component"] == 1 and row["rank"] < 3]
    assert {row["example"] for row in tops} & {row["from_example"] for row in of_component}
    assert all(row["share"] is None for row in rows(run, "paths") if row["component"] is None)


def test_predictions_of_textures_lie_beside_the_model(run: RunDirectory) -> None:
    gaussian = [row for row in rows(run, "paths") if row["space"] == "gaussian"]
    assert [row["path"] for row in gaussian] == list(range(6))
    assert all(row["matching"] is not None and 0 < row["largest_difference"] <= 1 for row in gaussian)
    morphs = rows(run, "morphs")
    assert {(row["path"], row["by"], row["step"]) for row in morphs} == {
        (path, by, step) for path in range(6) for by in ("psi", "s") for step in range(9)
    }
    assert all(row["image"].startswith(b"\x89PNG") for row in morphs)


def test_units_that_were_finished_stay_and_the_others_give_the_same_bits(
    run: RunDirectory, copy: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy.partial_results("scale"))
    copy.record_file("scale").unlink()
    measure, measured = ScaleWorker.measure, []

    def killed(worker: ScaleWorker, block: Any) -> Any:
        measured.append(block.number)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(worker, block)

    monkeypatch.setattr(ScaleWorker, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        npeff.scale(copy)
    for table in TABLES:
        copy.table(table).unlink()
    npeff.scale(copy)
    assert measured == [0, 1, 2, 2, 3, 4]
    assert bits(copy) == bits(run)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_give_the_same_bits(run: RunDirectory, copy: RunDirectory) -> None:
    shutil.rmtree(copy.partial_results("scale"))
    copy.record_file("scale").unlink()
    npeff.scale(copy.with_config(copy.config.with_executor(kind="ray", workers=2)))
    assert bits(copy) == bits(run)


def test_damage_is_found_and_recomputed(run: RunDirectory, copy: RunDirectory) -> None:
    assert npeff.check(copy) == []
    block, table = copy.partial_results("scale") / "00001.parquet", copy.table("scales")
    shutil.copy(copy.partial_results("scale") / "00000.parquet", block)
    table.write_bytes(table.read_bytes()[:-10])
    assert {damage.what for damage in npeff.check(copy)} == {"paths of block 1", "table scales"}
    assert npeff.check(copy, recompute=True) == []
    assert bits(copy) == bits(run)


def test_changed_settings_are_stored_and_the_results_recomputed(copy: RunDirectory) -> None:
    before = bits(copy)
    changed = with_scale(copy, pairs=2, components=(), space="input")
    npeff.scale(changed)
    assert bits(copy) != before
    assert RunDirectory.open(copy.path).config.scale == changed.config.scale
    (state,) = (row for row in status(RunDirectory.open(copy.path)) if row.stage == "scale")
    assert state.state.value == "complete"
    paths = rows(changed, "paths")
    assert [row["space"] for row in paths] == ["model", "input"] * 2
    for row in paths[1::2]:
        assert row["length"] == pytest.approx(row["distance"], rel=1e-6)
        assert (row["efficiency"], row["half_at"]) == (pytest.approx(1), pytest.approx(0.5))
        assert row["matching"] == pytest.approx(0, abs=1e-6)
    without = RunDirectory.create(config(copy.path).model_copy(update={"scale": None}))
    with without.lock():  # a run file without the section does not change the stored one
        pass
    assert RunDirectory.open(copy.path).config.scale == changed.config.scale


def test_earlier_results_do_not_depend_on_the_section() -> None:
    given, other = config(Path("x")), config(Path("x"), scale={"pairs": 3})
    absent = given.model_copy(update={"scale": None})
    assert given.differences(absent) == other.differences(given) == []
    for sections in (("task", "parameters", "fishers", "seed"), ("lift", "seed")):
        assert len({each.signature(*sections) for each in (given, other, absent)}) == 1
    assert len({each.factorization_signature() for each in (given, other, absent)}) == 1


def test_given_pairs_are_named_by_ids_or_numbers(copy: RunDirectory) -> None:
    names = [row["id"] for row in rows(copy, "examples")]
    npeff.scale(with_scale(copy, pairs=[[names[3], names[5]], ["7", names[8]]], components=(), space="model"))
    assert [(row["from_example"], row["to_example"]) for row in rows(copy, "paths")] == [(3, 5), (7, 8)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pairs": [["digit-9999", "0"]]}, r"there is no example 'digit-9999' in .*: give ids, or numbers below 60"),
        ({"pairs": [["0", "999"]]}, "there is no example '999'"),
        ({"components": (7,)}, "has no component 7: choose one of 0 to 2"),
        ({"along": "frequency", "components": ()}, "no stimulus parameter 'frequency': change scale.along, or remove"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    copy: RunDirectory, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises((RunDirectoryError, TaskError), match=problem) as found:
        npeff.scale(with_scale(copy, **changes))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        ({"pairs": 0}, "scale.pairs must be a list or a whole number greater than 0, not 0$"),
        ({"pairs": [["a"]]}, "give a number of pairs, or a list of pairs of ids"),
        ({"pairs": [["a", "a"]]}, "a pair has the example 'a' twice"),
        ({"points": 1}, "scale.points must be greater than or equal to 2"),
        ({"tolerance": 0}, "scale.tolerance"),
        ({"along": "z", "pairs": [["a", "b"]]}, "along needs a number of examples"),
        ({"along": "z", "components": [1]}, "components need pairs of examples"),
        ({"component": 1}, "unknown key 'scale.component' .did you mean 'components'"),
    ],
)
def test_a_wrong_section_is_refused_in_one_line(tmp_path: Path, scale: dict[str, Any], problem: str) -> None:
    file = tmp_path / "run.yaml"
    text = f"run_dir: x\ntask: {{name: digits}}\nfactorization: {{n_components: 3}}\nscale: {scale}\n"
    file.write_text(text.replace("'", '"'))
    with pytest.raises(ConfigError, match=problem) as found:
        RunConfig.from_yaml(file)
    assert "\n" not in str(found.value)


def test_a_path_without_change_and_one_that_is_not_finite_are_rows(
    run: RunDirectory, copy: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(task: DigitsTask, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(batch)
        middle = (batch.flatten(1) - batch.flatten(1).round(decimals=3)).abs().amax(1) > 1e-4  # no image of the data
        return torch.where(middle[:, None], torch.nan * found, found)

    pairs = [["0", "1"], ["2", "3"]]
    monkeypatch.setattr(DigitsTask, "logits", logits)
    summary = npeff.scale(with_scale(copy, pairs=pairs, components=()))
    assert summary["n_not_finite"] == 2
    assert all(row["length"] is None and not row["tolerance_met"] for row in rows(copy, "paths")[::2])
    monkeypatch.setattr(DigitsTask, "logits", lambda task, model, batch: 0 * model(batch))
    other = with_scale(copy, pairs=pairs, components=(), points=8)
    npeff.scale(other)
    for row in rows(copy, "paths")[::2]:
        assert (row["length"], row["distance"], row["efficiency"], row["half_at"]) == (0, 0, None, None)
        assert row["tolerance_met"]
        assert row["matching"] is None
    assert all(row["psi"] is None for row in rows(copy, "scales") if row["space"] == "model")


def test_the_command_writes_the_table_of_paths(
    copy: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "paths.csv"
    assert command("scale", copy.path, "--pairs", "2", "--output", out) == 0
    assert "scale: complete" in capfd.readouterr().out
    assert out.read_text().count("\n") == 1 + 4 + 12


def contents(run: RunDirectory) -> dict[str, bytes]:
    """The files of a run, without those of its lock."""
    files = [path for path in run.path.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-c", "9"), "has no component 9: choose one of 0 to 2"),
        (("-c", "2"), "component 2 is not lifted: run `npeff lift"),
        (("--along", "foo"), "components need pairs of examples"),
    ],
)
def test_a_refused_option_changes_nothing(
    copy: RunDirectory, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    record = copy.record("lift") or {}
    copy.complete("lift", {**record, "checksum": None, "components": [0, 1]})
    before = contents(copy)
    assert said in refused(capfd, "scale", copy.path, *options)
    assert contents(copy) == before


def test_options_refused_by_a_worker_or_for_given_pairs_change_nothing(
    copy: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    npeff.scale(with_scale(copy, pairs=2, components=(), space="model"))
    before = contents(copy)
    assert "no stimulus parameter 'foo': change scale.along" in refused(capfd, "scale", copy.path, "--along", "foo")
    for pairs, said in (([["digit-9999", "0"]], "there is no example"), ([["0", "999"]], "no example '999'")):
        other = copy.with_config(copy.config.with_scale(pairs=pairs, components=()))
        with pytest.raises(RunDirectoryError, match=said):
            npeff.scale(other)
    assert contents(copy) == before
    assert command("scale", copy.path) == 0
    assert contents(copy) == before


def test_options_hold_for_one_command(copy: RunDirectory, tmp_path: Path) -> None:
    settings, before = copy.settings.read_text(), bits(copy)
    assert command("scale", copy.path, "--pairs", "2", "--space", "input") == 0
    assert len(rows(copy, "paths")) == 2 * 2 + 12
    assert copy.settings.read_text() == settings
    (state,) = (row for row in status(RunDirectory.open(copy.path)) if row.stage == "scale")
    assert state.state.value == "complete"
    chosen = bits(copy)
    assert npeff.check(RunDirectory.open(copy.path)) == []
    copy.table("paths").unlink()
    (copy.partial_results("scale") / "00000.parquet").write_bytes(b"")
    assert npeff.check(RunDirectory.open(copy.path), recompute=True) == []
    assert bits(copy) == chosen
    file = tmp_path / "run.yaml"
    given = config(copy.path, scale={"pairs": 3})
    file.write_text(given.to_yaml())
    assert command("scale", file, "--pairs", "1") == 0
    assert len(rows(copy, "paths")) == 1
    assert RunDirectory.open(copy.path).config.scale == given.scale
    npeff.scale(RunDirectory.create(config(copy.path)))
    assert bits(copy) == before


@pytest.mark.parametrize(
    ("exchangeable", "tokens", "texts"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_lines_lead_between_texts_if_the_positions_are_tokens(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, exchangeable: bool, tokens: bool, texts: bool
) -> None:
    class Positions(DigitsTask):
        def inputs(self, model: torch.nn.Module, batch: torch.Tensor) -> Inputs:
            return Inputs(batch, lambda values: model(values), (2, 3), exchangeable)

    monkeypatch.setattr(DigitsTask, "inputs", Positions.inputs)
    named = [[Token("a")] * 64] if tokens else None
    monkeypatch.setattr(type(loaded.examples), "input_tokens", lambda examples, indices: named)
    assert Curves(loaded, None).are_between_texts(0) == texts
    assert not Curves(loaded, "z").are_between_texts(0)


def test_a_column_of_texts_makes_no_texts(copy: RunDirectory) -> None:
    table = read_table(copy.table("examples"), "examples")
    texts = pa.array(["a text to show"] * len(table), table.schema.field("text").type)
    changed = table.set_column(table.schema.get_field_index("text"), table.schema.field("text"), texts)
    write_table(copy.table("examples"), "examples", changed, table_lineage(copy.table("examples")))
    assert not npeff.scale(with_scale(copy, pairs=1, components=()))["texts"]


LOGITS: dict[str, tuple[Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "of the first": (lambda model, batch, values: model(values[:1].expand_as(values)), "differ from those of logits()"),
    "of the batch": (lambda model, batch, values: model(batch), "do not depend on the values by differentiable op"),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_that_are_not_those_of_the_values_are_refused_for_this_cause(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    logits, said = LOGITS[name]
    own = lambda task, model, batch: Inputs(batch, lambda values: logits(model, batch, values), (2, 3))  # noqa: E731
    monkeypatch.setattr(DigitsTask, "inputs", own)
    with pytest.raises(TaskError, match=re.escape(said)):
        npeff.scale(with_scale(copy, pairs=1, components=()))


def test_paths_are_queried_with_the_ids_of_their_ends(run: RunDirectory) -> None:
    store, ids = npeff.ComponentStore.open(run.path), [row["id"] for row in rows(run, "examples")]
    found = store.paths().to_pylist()
    assert len(found) == 6 * 2 + 12
    assert all(row["from_id"] == ids[row["from_example"]] for row in found)
    assert all(row["to_id"] == ids[row["to_example"]] for row in found)
    assert {row["component"] for row in store.paths(1).to_pylist()} == {1}


def test_the_report_shows_curves_paths_and_images(run: RunDirectory) -> None:
    page = npeff.report(run).read_text(encoding="utf-8")
    section = page.partition('<section id="scale"')[2].partition("</section>")[0]
    assert section.count('class="scale path" points') == 6
    assert section.count(">equal steps of ψ<") == 2
    assert all(name in page.partition("<style>")[2] for name in re.findall(r'"image (m\d+-\w+-\d)"', section))
    assert len(re.findall(r'"image (m\d+-\w+-\d)"', section)) == 2 * 2 * 9
    assert "Gaussian textures of the same spectra" in section
    assert section.count('href="#component-1"') == 12


def test_people_and_the_model_are_in_one_table(
    copy: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = np.repeat(triplets(5), 30, axis=0)
    drawn = np.random.default_rng(0).random(len(shown)) < answer_probability(np.linspace(0, 1, 5), 0.2, shown)
    lines = [",".join(map(str, row)) for row in np.column_stack([shown, drawn]).astype(int).tolist()]
    (tmp_path / "answers.csv").write_text("\n".join(["i,j,k,response", *lines]))
    asked = ("scale", copy.path, "--responses", tmp_path / "answers.csv", "--draws", "100")
    assert "do not lead over the levels of the answers" in refused(capfd, *asked)
    npeff.scale(with_scale(copy, pairs=[["3", "5"]], components=(), space="model"))
    assert command(*asked, "--output", tmp_path / "both.json") == 0
    found = json.loads((tmp_path / "both.json").read_text())
    model = [row for row in found if row["observer"] == "model"]
    people = [row for row in found if row["observer"] is None]
    scale = [(row["s"], row["psi"]) for row in rows(copy, "scales")]
    expected = np.interp(np.linspace(0, 1, 5), *zip(*scale, strict=True))
    np.testing.assert_allclose([row["psi"] for row in model], expected)
    measured = [row["psi"] for row in people]
    score = area_matching_score(np.linspace(0, 1, 5), measured, expected)
    assert [row["matching"] for row in people] == pytest.approx([score] * 5)


def test_inputs_that_are_no_images_or_no_numbers_are_refused(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = lambda task, model, batch: Inputs(batch, lambda values: task.logits(model, values))  # noqa: E731
    monkeypatch.setattr(DigitsTask, "inputs", flat)
    with pytest.raises(TaskError, match=r"scale\.space: gaussian needs images"):
        npeff.scale(with_scale(copy, pairs=2, components=()))
    monkeypatch.setattr(DigitsTask, "inputs", lambda task, model, batch: None)
    with pytest.raises(TaskError, match="has no floating-point inputs: give the task an `inputs` method"):
        npeff.scale(with_scale(copy, pairs=3, components=()))


def test_a_component_must_be_lifted(copy: RunDirectory) -> None:
    shutil.rmtree(copy.directions)
    copy.record_file("lift").unlink()
    copy.record_file("scale").unlink()
    with pytest.raises(RunDirectoryError, match=r"stage lift of .* is not complete: run `npeff lift"):
        npeff.scale(copy)


def test_inputs_with_different_masks_are_not_connected(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = Curves(loaded, None)
    curves.check(0, 1)
    monkeypatch.setattr(curves, "signature", lambda example: example)
    with pytest.raises(TaskError, match=r"a straight line cannot connect the examples 'digit-.*' and 'digit-.*', "):
        curves.check(0, 1)
