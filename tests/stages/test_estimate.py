from __future__ import annotations

from pathlib import Path

import npeff
import pytest
import yaml
from npeff.cli.main import main
from npeff.gradients import LeftOut
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.fishers.estimate import _stages_without_estimate, estimate, rows
from npeff.stages.inputs.trial import largest_number, passes_per_example
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table


def run_file(folder: Path, **fishers: object) -> Path:
    document = {
        "run_dir": str(folder / "run"),
        "task": {"name": "digits", "options": {"limit": 120, "epochs": 1}},
        "parameters": {"exclude": ["*.bias"]},
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 1024}, "shard_size": 50, **fishers},
        "factorization": {"n_components": 3},
        "executor": {"kind": "serial"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_sizes_are_those_of_the_run_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = RunConfig.from_yaml(run_file(tmp_path))
    found = estimate(config)
    assert list((tmp_path / "temporary").glob("npeff-*")) == []
    assert not (tmp_path / "run").exists()
    assert 0 < found.start_up_seconds < found.seconds
    assert dict(rows(found, config))["examples"] == "120 of rank 9, 10 classes"

    run = RunDirectory.create(config)
    npeff.compute_fishers(run)
    store = FisherStore.open(run.fishers)
    on_disk = sum(path.stat().st_size for path in run.fishers.rglob("*") if path.is_file())
    assert found.store_bytes < on_disk < 1.1 * found.store_bytes
    assert store.attrs["batch_size"] == found.trial.facts.batch_size
    parameters = read_table(run.table("parameters"), "parameters").to_pylist()
    assert [row["parameter"] for row in parameters if row["taken"]] == list(found.trial.facts.layout.names)
    left_out = found.trial.facts.left_out
    assert {row["parameter"] for row in parameters if not row["taken"]} == left_out.keys()
    assert {row["reason"] for row in parameters if not row["taken"]} == {"matches '*.bias' of parameters.exclude"}
    assert set(left_out.values()) == {LeftOut("matches '*.bias' of parameters.exclude", unsupported=False)}


def test_the_batch_size_is_found_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    roomy = estimate(RunConfig.from_yaml(run_file(tmp_path))).trial.facts.batch_size
    fixed = estimate(RunConfig.from_yaml(run_file(tmp_path, batch_size=7))).trial.facts.batch_size
    assert (roomy, fixed) == (32, 7)


def test_the_command_says_it_in_a_table_and_mistakes_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path)

    def npeff_estimate() -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["estimate", str(path), "--parameters"])
        return int(ended.value.code or 0), *capsys.readouterr()

    code, out, err = npeff_estimate()
    assert code == 0, err
    assert "fishers.zarr" in out
    assert "matches '*.bias' of" in " ".join(out.split())
    path.write_text(path.read_text().replace("digits", "unknown-task"))
    code, out, err = npeff_estimate()
    assert (code, out) == (2, "")
    assert err.startswith("npeff: error: unknown task 'unknown-task'")
    assert err.count("\n") == 1


def test_the_stage_inputs_is_estimated_where_the_run_file_has_its_section(tmp_path: Path) -> None:
    path = run_file(tmp_path)
    document = yaml.safe_load(path.read_text()) | {"inputs": {"faithfulness": {"examples": 3}}}
    path.write_text(yaml.safe_dump(document))
    config = RunConfig.from_yaml(path)
    found = dict(rows(estimate(config), config))
    assert "inputs, up to 72 examples, without faithfulness" in found
    assert passes_per_example(config, rank=9) == 32
    all_classes = RunConfig.model_validate(document | {"inputs": {"label": "all", "samples": 4, "examples": 500}})
    assert passes_per_example(all_classes, rank=9) == 20
    assert largest_number(all_classes, 120) == 120


def test_the_stages_without_an_estimate_are_named(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(run_file(tmp_path))
    assert _stages_without_estimate(config) == ["spectrum", "factorize", "lift", "verify", "attribute"]
    assert _stages_without_estimate(config.model_copy(update={"inputs": config.inputs_or_default}))[-1] == "attribute"
