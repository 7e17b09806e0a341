"""A run of the former layout, made by an earlier version: it is read, resumed and migrated with the same answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import npeff
import pytest
from former_run import unpack
from in_process import command
from npeff.errors import NpeffError
from npeff.query.components import ComponentStore
from npeff.runs import migration
from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.errors import RunDirectoryError
from npeff.stages.status import factorizations, status
from npeff.storage import objects
from npeff.storage.location import location
from npeff.store.run_files import FILES
from object_store import ObjectStore

SPECTRUM_FILES = {"stages/spectrum.json", "tables/spectrum.parquet", "tables/spectrum_statistics.parquet"}


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return unpack(tmp_path)


def answers(run: Path | str, name: str | None = None) -> list[Any]:
    """What queries give, tables as text (in which NaN is NaN)."""
    store = ComponentStore.open(run, name)
    tables = [
        store.components_table(),
        store.top_examples(0, n=3, where="split = 'held_out'"),
        store.example(5),
        store.similar_components(0),
        store.layer_energy(1),
        store.verification(1),
        store.table("selection"),
        store.table("repair"),
        store.sql("select component, count(*) as n from coefficients group by 1 order by 1"),
    ]
    arrays = [store.coefficients, *store.directions.values()]
    return [*(str(table.to_pylist()) for table in tables), *(array.compute().tobytes() for array in arrays)]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".workers"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def moved(files: dict[str, str]) -> dict[str, str]:
    """These files where the present layout has them, without the two that a migration writes."""
    found = {}
    for name, content in files.items():
        if name in ("run.yaml", "factorizations/default/factorization.yaml"):
            continue
        of_factorization = any(name == file or name.startswith(f"{file}/") for file in FILES)
        found[f"factorizations/default/{name}" if of_factorization else name] = content
    return found


def complete_but_the_spectrum(run: RunDirectory) -> bool:
    """Whether all stages are complete but `spectrum`, which is newer than the former layout."""
    states = {row.stage: row.state for row in status(run)}
    return states.pop("spectrum") == StageState.MISSING and set(states.values()) == {StageState.COMPLETE}


def test_it_is_read_and_verified_as_it_is(former: Path) -> None:
    before = contents(former)
    run = RunDirectory.open(former)
    assert (run.name, run.home, run.factorizations()) == ("default", former, ["default"])
    assert complete_but_the_spectrum(run)
    (shown,) = factorizations(run)
    assert (shown.n_components, shown.state) == (2, StageState.COMPLETE)
    assert all(answers(former))
    assert npeff.check(run) == []
    assert npeff.run(run).config == run.config
    written = {name for name, content in contents(former).items() if before.get(name) != content}
    assert written == {"report/index.html", *SPECTRUM_FILES}


def test_it_is_resumed_where_it_is(former: Path) -> None:
    before, run = answers(former), RunDirectory.open(former)
    run.record_file("verify").unlink()
    (run.partial_results("verify") / "00001.parquet").unlink()
    npeff.run(run)
    assert (former / "stages" / "verify.json").exists()
    assert not (former / "factorizations").exists()
    assert answers(former)[7:] == before[7:]


def test_other_settings_are_refused_and_another_name_is_stored_beside_it(former: Path, tmp_path: Path) -> None:
    before, files = answers(former), contents(former)
    text = (former / "run.yaml").read_text().replace("run_dir: digits", f"run_dir: {former}")
    assert "\nlift:\n" in text
    text = text.replace("\nlift:\n", "\nlift:\n  direction: own\n")  # earlier versions have no other directions
    run_file = tmp_path / "run.yaml"
    run_file.write_text(text.replace("n_components: 2", "n_components: 3"))
    with pytest.raises(RunDirectoryError, match=r"with other settings \(it differs in factorization\.n_components\)"):
        npeff.run(npeff.RunConfig.from_yaml(run_file))
    with pytest.raises(NpeffError, match=r"the former layout\): run `npeff migrate .*` first"):
        npeff.remove_factorization(former, "default")
    assert contents(former) == files
    run_file.write_text(text.replace("n_components: 2", "n_components: 3\n  name: k3"))
    other = npeff.run(npeff.RunConfig.from_yaml(run_file))
    assert other.home == former / "factorizations" / "k3"
    assert other.factorizations() == ["default", "k3"]
    assert ComponentStore.open(former, "k3").components.shape[0] == 3
    assert answers(former) == before
    assert npeff.check(RunDirectory.open(former)) == []
    migrated = npeff.migrate(former)
    assert migrated.factorizations() == ["default", "k3"]
    assert answers(former) == before
    assert {name: hash_ for name, hash_ in contents(former).items() if name in moved(files)} == moved(files)


def test_a_migrated_run_gives_the_same_answers(former: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before, files, config = answers(former), contents(former), RunDirectory.open(former).config
    assert command("migrate", former) == 0
    assert capfd.readouterr().out == f"migrate: complete, in {former}\n"
    run = RunDirectory.open(former)
    assert run.home == former / "factorizations" / "default"
    assert run.config == config
    found = contents(former)
    assert {name: found.get(name) for name in moved(files)} == moved(files)
    assert len(found) == len(files) + 1
    assert answers(former) == before
    assert npeff.check(run) == []
    assert complete_but_the_spectrum(run)
    after = contents(former)
    npeff.migrate(former)
    assert contents(former) == after, "there is nothing left to do"
    npeff.remove_factorization(former, "default")
    assert RunDirectory.open(former).factorizations() == []


class Killed(BaseException):
    """As by SIGKILL."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, before: bool) -> Callable[[], int]:
    """Kill at a rename of a file or folder, before or after it. Returns the number of renames that were begun."""
    rename, n_begun = Path.rename, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal n_begun
        n_begun += 1
        if n_begun == step and before:
            raise Killed
        renamed = rename(self, target)
        if n_begun == step:
            raise Killed
        return renamed

    monkeypatch.setattr(Path, "rename", counted)
    return lambda: n_begun


@pytest.mark.parametrize(
    "before", [pytest.param(True, id="before"), pytest.param(False, id="after", marks=pytest.mark.slow)]
)
def test_a_migration_that_is_killed_at_any_rename_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    reference = unpack(tmp_path / "reference")
    expected, files = answers(reference), moved(contents(reference))
    for step in range(1, 100):
        run = unpack(tmp_path / f"{step}")
        with monkeypatch.context() as patch:
            n_begun = killed_at(patch, step, before)
            try:
                npeff.migrate(run)
            except Killed:
                pass
            else:
                assert step == n_begun() + 1 > 15
                break
        if (run / "factorizations" / "default.partial").exists():
            for refused in (RunDirectory.open, ComponentStore.open):
                with pytest.raises(NpeffError, match=r"is not finished: run `npeff migrate ") as caught:
                    refused(run)
                assert "\n" not in str(caught.value)
        else:
            assert RunDirectory.open(run).home == run / "factorizations" / "default"
        npeff.migrate(run)
        found = contents(run)
        assert {name: found.get(name) for name in files} == files
        assert len(found) == len(files) + 2
    assert answers(run) == expected


@pytest.mark.slow
def test_a_migration_on_an_object_store_copies_and_then_deletes(
    s3: ObjectStore, former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "s3://runs/team/former"
    names = sorted(contents(former))
    expected = moved(contents(former))
    before, put, deleted = answers(former), objects.put, migration.remove_directory
    for stopped in (30, 10**6):
        objects.remove_directory(location(uri))
        objects.upload_files(former, location(uri), names)
        n_put = 0

        def counted(path: Path, content: bytes, stopped: int = stopped) -> None:
            nonlocal n_put
            n_put += 1
            if n_put > stopped:
                raise Killed
            put(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(objects, "put", counted)
            if stopped == 10**6:  # killed in the midst of the deletions

                def delete(path: Path) -> None:
                    deleted(path)
                    if path.name == "directions.zarr":
                        raise Killed

                patch.setattr(migration, "remove_directory", delete)
            with pytest.raises(Killed):
                npeff.migrate(uri)
        with pytest.raises(NpeffError, match="is not finished: run `npeff migrate s3://runs/team/former`"):
            RunDirectory.open(uri)
        npeff.migrate(uri)
        stored = {name: content for name, content in s3.contents(uri).items() if not name.startswith(".")}
        found = {name: hashlib.sha256(content).hexdigest() for name, content in stored.items()}
        assert {name: found.get(name) for name in expected} == expected
        assert len(found) == len(expected) + 2
    assert answers(uri) == before


def test_results_of_an_earlier_measure_are_measured_again(former: Path) -> None:
    run = RunDirectory.open(former)
    run.record_file("verify").unlink()
    npeff.verify(run)
    rows = ComponentStore.open(former).table("verification").to_pylist()
    assert len(rows) == 8
    assert sum(row["informative"] for row in rows) == 4
