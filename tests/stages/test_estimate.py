from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import npeff
import pytest
import yaml
from npeff.cli.main import main
from npeff.gradients import LabelSpec, LeftOut
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.fishers.estimate import advised_shard_size, estimate, rows
from npeff.stages.fishers.stage import _say_if_it_takes_hours
from npeff.stages.fishers.unit_times import UnitTimes, stage_seconds, unit_times
from npeff.stages.inputs.trial import largest_number, passes_per_example
from npeff.stages.worker_specs import model_spec
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
    assert dict(rows(found, config))["shards"] == "3 of 50 examples"
    assert found.driver_bytes is None, "the driver is the worker"

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


@pytest.mark.parametrize(
    ("n_examples", "example_bytes", "workers", "expected"),
    [
        (100, 1000, 1, 256),
        (512_001, 1000, 1, 512),
        (10_000_000, 20_000, 4, 4096),
        (10_000_000, 2**20, 4, 256),
        (1_000_000, 1000, 1000, 256),
    ],
)
def test_larger_shards_are_advised_for_many_examples(
    n_examples: int, example_bytes: int, workers: int, expected: int
) -> None:
    advised = advised_shard_size(n_examples, example_bytes, workers, 256)
    assert advised == expected
    assert advised == 256 or (advised * example_bytes <= 2**27 and n_examples >= 4 * workers * advised)


def test_rows_of_any_length_are_timed_in_little_memory(lifted: RunDirectory) -> None:
    loaded = model_spec(lifted, fingerprint_of(lifted)).load()
    long = unit_times(loaded, LabelSpec(), batch_size=4, rank=9, dim=2**40, components=2, fitting=2)
    short = unit_times(loaded, LabelSpec(), batch_size=4, rank=9, dim=2**8, components=2, fitting=2)
    assert long.solver > 2**20 * short.solver


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


UNITS = UnitTimes(prediction=1.0, collection=3.0, direction=0.5, solver=0.1, eigenvalues=1e-9, tokens=True)


def seconds_of(config: RunConfig, **changes: int) -> dict[str, float]:
    sizes = {"n_examples": 100, "rank": 9, "dim": 1024, "fitting": 2} | changes
    return stage_seconds(config, UNITS, **sizes)


def test_times_are_sums_of_units(tmp_path: Path) -> None:
    document = yaml.safe_load(run_file(tmp_path).read_text())
    document["factorization"] |= {"held_out_fraction": 0.2, "n_starts": 2, "subsample": 50, "stability_examples": 40}
    document["verification"] = {"top_examples": 5, "baseline_examples": 10}
    document["report"] = {"top_examples": 4}
    config = RunConfig.model_validate(document)
    found = seconds_of(config)
    assert found["lift"] == pytest.approx(80 * (2 * 3.0 + 3 * 0.5)), "two blocks of the three directions"
    assert found["verify"] == pytest.approx(3 * (4 * 5 + 10) * 4 * 1.0)
    assert found["attribute"] == pytest.approx(3 * 4 * 3.0)
    assert found["factorize"] == pytest.approx(0.1 * (60 * 80 + 20 * 2 * 50 + 60 * 40))
    size = 900  # 100 examples of 9 rows, fewer than the coordinates
    assert found["spectrum"] == pytest.approx(11e-9 * size**3 + 2e-10 * 900 * 1024 * size)
    exact = RunConfig.model_validate(document | {"verification": document["verification"] | {"exact": True}})
    assert seconds_of(exact)["verify"] == 4 * found["verify"]
    two = config.with_executor(kind="auto", workers=2)
    assert seconds_of(two)["lift"] == found["lift"] / 2


def test_all_stages_of_a_run_are_timed_but_those_that_do_not_follow_from_the_units(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(run_file(tmp_path))
    shown = dict(rows(estimate(config), config))
    timed = [name.removesuffix(", roughly") for name in shown if name.endswith(", roughly")]
    assert timed == ["spectrum", "factorize", "lift", "verify", "attribute", "npeff run"]
    assert "no estimate of the time of" not in shown
    assert shown["attribute, roughly"] == "0 s", "digits have no tokens"
    squared = config.with_factorization(kind="squared")
    assert dict(rows(estimate(squared), squared))["no estimate of the time of"] == "factorize"


@pytest.mark.parametrize(("seconds", "hours"), [(10.0, None), (360.0, "6 hours for 120 examples on 2 workers")])
def test_hours_are_told_before_they_begin(seconds: float, hours: str | None) -> None:
    facts = SimpleNamespace(seconds_per_example=seconds, n_examples=120)
    said: list[str] = []
    _say_if_it_takes_hours(facts, 2, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    assert [hours in line for line in said] == ([] if hours is None else [True])
