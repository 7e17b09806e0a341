"""Results that were not made from what lies beside them are refused, or computed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import npeff
import pytest
import yaml
from end_to_end.run_contents import differences
from former_run import unpack
from npeff.errors import NpeffError
from npeff.query.components import ComponentStore
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import SilentProgress
from npeff.stages.pipeline import export_direction
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import read_table

STAGES = ("fishers", "factorize", "lift", "verify")


def config(path: Path, seed: int = 0, **factorization: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(path),
            "seed": seed,
            "task": {"name": "digits", "options": {"limit": 60, "epochs": 2}},
            "fishers": {"sketch": {"dim": 64}, "shard_size": 30},
            "factorization": {"n_components": 3, "max_iterations": 5, "stability_examples": 0, **factorization},
            "verification": {"top_examples": 4, "baseline_examples": 6},
            "executor": {"kind": "serial"},
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("lineage")
    first, other = (npeff.run(config(folder / str(seed), seed)).path for seed in (0, 1))
    return first, other


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def other(finished: tuple[Path, Path]) -> RunDirectory:
    return RunDirectory.open(finished[1])


class Told(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def put(run: RunDirectory, other: RunDirectory, name: str) -> None:
    """Put a file or folder of the other run in the place of the run's own. `name` is relative to the factorization."""
    mine, theirs = run.home / name, other.home / name
    if mine.is_dir():
        shutil.rmtree(mine)
        shutil.copytree(theirs, mine)
    else:
        shutil.copy(theirs, mine)


def query(run: RunDirectory) -> None:
    """Ask everything that reads tables, coefficients, components and directions."""
    store = ComponentStore.open(run.path)
    store.components.compute()
    store.coefficients.compute()
    assert len(store.directions) > 1
    for table in ("examples", "classes", "components", "top_examples", "coefficients", "layer_energy", "verification"):
        store.table(table)
    store.table("selectivity")


def lift_again(run: RunDirectory) -> None:
    run.reopen("lift")
    npeff.lift(run)


def verify_again(run: RunDirectory) -> None:
    run.reopen("verify")
    shutil.rmtree(run.partial_results("verify"))
    npeff.verify(run)


def compare(run: RunDirectory) -> None:
    npeff.compare(ComponentStore.open(run.path), ComponentStore.open(run.path))


def export(run: RunDirectory) -> None:
    export_direction(run, 1, run.path / "direction.safetensors")


REFUSED: list[tuple[str, Callable[[RunDirectory], object]]] = [
    ("directions.zarr", query),
    ("directions.zarr", verify_again),
    ("directions.zarr", export),
    ("directions.zarr", compare),
    ("factorization.zarr", query),
    ("factorization.zarr", lift_again),
    ("factorization.zarr", verify_again),
    ("tables/components.parquet", query),
    ("tables/components.parquet", lift_again),
    ("tables/coefficients.parquet", query),
    ("tables/top_examples.parquet", query),
    ("tables/top_examples.parquet", verify_again),
    ("tables/layer_energy.parquet", query),
    ("tables/verification.parquet", query),
    ("tables/selectivity.parquet", query),
    ("stages/factorize.json", query),
    ("stages/factorize.json", lift_again),
    ("stages/lift.json", query),
    ("../../tables/examples.parquet", query),
    ("../../tables/examples.parquet", verify_again),
    ("../../tables/classes.parquet", query),
    ("../../stages/fishers.json", query),
]


@pytest.mark.parametrize(("name", "reads"), REFUSED, ids=lambda each: getattr(each, "__name__", each))
def test_a_file_of_another_run_is_refused(
    name: str, reads: Callable[[RunDirectory], object], run: RunDirectory, other: RunDirectory
) -> None:
    put(run, other, name)
    with pytest.raises(
        NpeffError, match=r"belongs? to another run|do not fit|not those of the stage's record"
    ) as refused:
        reads(run)
    assert "\n" not in str(refused.value)
    assert "npeff" in refused.value.remedy


MENDED = ["tables/coefficients.parquet", "partial/verify/00001.parquet"]
ALSO_MENDED = [
    *("directions.zarr", "stages/lift.json"),
    "factorization.zarr",
    *(f"tables/{table}.parquet" for table in ("top_examples", "components", "layer_energy")),
    *(f"tables/{table}.parquet" for table in ("verification", "selectivity", "history")),
    "../../tables/examples.parquet",
    "partial/lift/00001.json",
    "stages/verify.json",
]


@pytest.mark.parametrize("name", [*MENDED, *(pytest.param(name, marks=pytest.mark.slow) for name in ALSO_MENDED)])
def test_check_finds_a_file_of_another_run_and_recomputes_what_does_not_fit(
    name: str, run: RunDirectory, other: RunDirectory, finished: tuple[Path, Path]
) -> None:
    put(run, other, name)
    assert npeff.check(run) != []
    assert npeff.check(run, recompute=True) == []
    assert differences(run.path, finished[0], STAGES) == []
    query(run)


def test_results_of_a_later_stage_are_refused_after_an_exchange_of_the_whole_factorization(
    run: RunDirectory, other: RunDirectory
) -> None:
    for name in ("factorization.zarr", "stages/factorize.json", "stages/lift.json", "tables/layer_energy.parquet"):
        put(run, other, name)
    with pytest.raises(NpeffError, match=r"the results of \w+ do not fit"):
        ComponentStore.open(run.path).table("verification")
    put(run, other, "stages/verify.json")
    put(run, other, "tables/verification.parquet")
    with pytest.raises(NpeffError, match="the results of factorize do not fit: they were made from other results of"):
        ComponentStore.open(run.path).table("verification")


def test_a_single_direction_of_another_run_is_found(
    run: RunDirectory, other: RunDirectory, finished: tuple[Path, Path]
) -> None:
    theirs = DirectionStore.open(other.directions)
    sketches = theirs.read_sketches()
    assert sketches is not None
    DirectionStore.open(run.directions).write(1, theirs.read(1), sketches[1])
    with pytest.raises(NpeffError, match=r"direction 1 in .* does not match its checksum"):
        verify_again(run)
    assert [damage.what for damage in npeff.check(run)] == ["direction 1"]
    assert npeff.check(run, recompute=True) == []
    npeff.verify(run)
    assert differences(run.path, finished[0], STAGES) == []


def test_units_of_another_run_are_computed_again(
    run: RunDirectory, other: RunDirectory, finished: tuple[Path, Path]
) -> None:
    told = Told()
    for stage, unit in (
        ("lift", "partial/lift/00001.json"),
        ("verify", "partial/verify/00002.parquet"),
        ("verify", "partial/verify/selectivity/00001.parquet"),
    ):
        put(run, other, unit)
        run.reopen(stage)
        {"lift": npeff.lift, "verify": npeff.verify}[stage](run, progress=told)
        assert told.lines == [
            f"1 results of {stage} were made from other results or with other settings; computing them again"
        ]
        told.lines.clear()
    assert differences(run.path, finished[0], STAGES) == []


def edit(run: RunDirectory, section: str, **values: Any) -> RunDirectory:
    """Edit the stored settings by hand."""
    file = run.settings if section in yaml.safe_load(run.settings.read_text()) else run.path / "run.yaml"
    document = yaml.safe_load(file.read_text())
    document[section] |= values
    file.write_text(yaml.safe_dump(document))
    return RunDirectory.open(run.path)


@pytest.mark.parametrize("complete", [pytest.param(True, marks=pytest.mark.slow), False])
def test_no_table_mixes_two_settings(complete: bool, run: RunDirectory, tmp_path: Path) -> None:
    if not complete:
        run.reopen("verify")
        (run.partial_results("verify") / "00001.parquet").unlink()
    edited, told = edit(run, "verification", epsilon=0.05), Told()
    npeff.verify(edited, progress=told)
    assert any("with other settings" in line for line in told.lines)
    fresh = npeff.run(config(tmp_path / "fresh").model_copy(update={"verification": edited.config.verification}))
    mine, expected = (read_table(each.table("verification"), "verification") for each in (edited, fresh))
    assert mine.equals(expected)
    assert npeff.check(edited) == []


def test_directions_of_another_precision_are_lifted_again(run: RunDirectory) -> None:
    edited, told = edit(run, "lift", dtype="float16"), Told()
    with pytest.raises(NpeffError, match=r"stage lift of .* is not complete"):
        npeff.verify(edited)
    npeff.lift(edited, progress=told)
    assert any("computing them again" in line for line in told.lines)
    assert DirectionStore.open(edited.directions).dtype == "float16"
    npeff.verify(edited)
    assert [damage.what for damage in npeff.check(edited)] == ["results of attribute"]
    npeff.attribute(edited)
    assert npeff.check(edited) == []


@pytest.mark.parametrize(
    ("section", "values"), [("factorization", {"tolerance": 0.5}), ("fishers", {"labels": "empirical"})]
)
@pytest.mark.parametrize("command", [npeff.factorize, npeff.lift, npeff.verify, npeff.run])
def test_results_are_not_replaced_after_an_edit_of_their_settings(
    command: Callable[[RunDirectory], object], section: str, values: dict[str, Any], run: RunDirectory
) -> None:
    edited = edit(run, section, **values)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file() and path.name[0] != "."}
    with pytest.raises(NpeffError, match=r"with other settings") as refused:
        command(edited)
    assert "--name NAME" in refused.value.remedy
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert any(damage.why.endswith("they were made with other settings") for damage in npeff.check(edited))


def test_fishers_of_another_run_are_refused(run: RunDirectory, other: RunDirectory) -> None:
    for name in ("fishers.zarr", "shards"):
        shutil.rmtree(run.path / name)
        shutil.copytree(other.path / name, run.path / name)
    for command in (lift_again, lambda run: npeff.factorize(RunDirectory(run.path, run.config.with_max_iterations(9)))):
        with pytest.raises(NpeffError, match=r"belongs? to another run|signature"):
            command(run)
    assert npeff.check(run) != []


def test_components_that_changed_at_their_source_are_transformed_again(run: RunDirectory, tmp_path: Path) -> None:
    new, told = RunDirectory.create(config(tmp_path / "new")), Told()
    npeff.transform(new, run)
    before = ComponentStore.open(new.path).components.compute()
    npeff.transform(new, run, progress=told)
    assert not any("computing the coefficients again" in line for line in told.lines)
    npeff.factorize(RunDirectory.create(run.config.with_max_iterations(12)))
    npeff.transform(new, RunDirectory.open(run.path), progress=told)
    assert any("computing the coefficients again" in line for line in told.lines)
    after, source = (ComponentStore.open(path).components.compute() for path in (new.path, run.path))
    assert (after == source).all()
    assert not (after == before).all()
    assert npeff.check(new) == []


def test_fishers_that_another_run_has_computed_again_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    document = yaml.safe_load(
        config(tmp_path / "user").to_yaml(["run_dir", "factorization", "verification", "executor"])
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document | {"fishers": {"from": str(run.path)}}))
    user = npeff.run(RunConfig.from_yaml(tmp_path / "run.yaml"))
    assert npeff.check(user) == []
    record = run.record_file("fishers")
    content = json.loads(record.read_text()) | {"lineage": "0" * 32}
    record.write_text(json.dumps({name: value for name, value in content.items() if name != "checksum"}))
    with pytest.raises(NpeffError, match=r"the Fishers of .* have been computed again"):
        npeff.verify(user)
    assert any("have been computed again" in damage.why for damage in npeff.check(user))


def test_what_results_of_an_earlier_version_were_made_from_is_unknown_and_refused_nowhere(tmp_path: Path) -> None:
    former, told = RunDirectory.open(unpack(tmp_path)), Told()
    assert npeff.check(former, progress=told) == []
    (line,) = told.lines
    assert "what the results of fishers, select, factorize, lift, verify, attribute, repair were made from" in line
    assert "is unknown" in line
    lift_again(former)
    verify_again(former)
    assert npeff.check(former) == []
