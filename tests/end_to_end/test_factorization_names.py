"""Several factorizations of one run: their names and folders, and what a refused command leaves."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from in_process import command, refused
from npeff.errors import NpeffError
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.removal import remove_factorization
from npeff.storage import objects
from object_store import ObjectStore

MINIMAL = {"task": {"name": "digits"}, "factorization": {"n_components": 4}}


def config(run_dir: Path, **sections: dict) -> RunConfig:
    merged = {name: {**MINIMAL.get(name, {}), **section} for name, section in sections.items()}
    return RunConfig.model_validate({**MINIMAL, "run_dir": str(run_dir), **merged})


def begin(run: RunDirectory, steps: int = 3) -> None:
    """As if the solver had made some steps."""
    (run.checkpoints / f"{steps:06d}").mkdir(parents=True)


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files but the locks."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".workers"}


@pytest.mark.parametrize("name", ["k48", "K.48_a-b", "0" * 64])
def test_a_valid_name_is_a_folder(tmp_path: Path, name: str) -> None:
    run = RunDirectory.create(config(tmp_path / "run", factorization={"name": name}))
    assert run.home == tmp_path / "run" / "factorizations" / name
    assert RunDirectory.open(run.path, name).config == run.config
    assert RunDirectory.open(run.home).config == run.config
    assert RunDirectory.open(run.path).name == name, "it is the only one"


@pytest.mark.parametrize("name", ["", ".k", "-k", "a/b", "..", "k 48", "0" * 65, "k.partial", "k.old", "ü"])
def test_another_name_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a factorization"):
        config(tmp_path / "run", factorization={"name": name})
    RunDirectory.create(config(tmp_path / "run"))
    if name:
        with pytest.raises(RunDirectoryError, match="cannot be the name of a factorization"):
            RunDirectory.open(tmp_path / "run", name)
    with pytest.raises(NpeffError, match="cannot be the name of a factorization"):
        remove_factorization(tmp_path / "run", name)


def test_the_default_factorization_is_the_one_of_this_name_or_the_only_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for name in ("b", "a"):
        with RunDirectory.create(config(path, factorization={"name": name})).lock():
            pass  # the settings are written
    with pytest.raises(RunDirectoryError, match="has the factorizations a, b: choose one with --factorization NAME"):
        RunDirectory.open(path)
    assert RunDirectory.open_any(path).name == "a"
    with pytest.raises(RunDirectoryError, match=r"has no factorization c \(it has a, b\)"):
        RunDirectory.open(path, "c")
    with RunDirectory.create(config(path)).lock():
        assert RunDirectory.open(path).name == "default"
    assert RunDirectory.open(path).factorizations() == ["default", "a", "b"]


def test_settings_may_change_until_something_is_factorized_and_then_need_a_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDirectory.create(config(path))
    changed = config(path, factorization={"n_components": 6, "l1": 0.1}, verification={"target_kl": 0.2})
    run = RunDirectory.create(changed)
    assert RunDirectory.open(path).config.factorization.n_components == 4, "nothing is written before the lock"
    with run.lock():
        pass
    assert RunDirectory.open(path).config == run.config
    begin(run)
    before = files(path)
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(config(path, factorization={"n_components": 5, "l1": 0.1}, lift={"dtype": "float16"}))
    said = str(caught.value)
    assert "it differs in factorization.n_components, lift.dtype, verification.target_kl" in said
    assert "--name NAME" in said
    assert f"`npeff rm {path} --factorization default`" in said
    assert f"delete {path} " not in said
    assert files(path) == before
    other = RunDirectory.create(config(path, factorization={"n_components": 5, "name": "k5"}))
    with other.lock():
        pass
    assert RunDirectory.open(path, "k5").config.factorization.n_components == 5
    assert RunDirectory.open(path).config.factorization.n_components == 6


def test_a_lower_limit_is_compared_with_the_steps_that_were_made(tmp_path: Path) -> None:
    path = tmp_path / "run"
    begin(RunDirectory.create(config(path, factorization={"max_iterations": 30})), steps=12)
    with pytest.raises(RunDirectoryError, match=r"has made 12 steps, more than factorization\.max_iterations: 11"):
        RunDirectory.create(config(path, factorization={"max_iterations": 11}))
    run = RunDirectory.create(config(path, factorization={"max_iterations": 20}))
    with run.lock():
        pass
    assert RunDirectory.open(path).config.factorization.max_iterations == 20


def test_a_command_on_a_run_in_use_leaves_its_configuration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(config(tmp_path / "run"))
    begin(run)
    run_file = tmp_path / "other.yaml"
    run_file.write_text(f"run_dir: {run.path}\ntask: {{name: digits}}\nfactorization: {{name: k9, n_components: 9}}\n")
    before = files(tmp_path)
    with open(run.path / ".lock", "a") as lock:  # of another open file, as of another process
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (
            ("factorize", run.path, "--max-iterations", "200"),
            ("factorize", run.path, "--components", "6", "--name", "k6"),
            ("factorize", run_file),
            ("run", run_file),
            ("rm", run.path, "--factorization", "default", "--yes"),
            ("migrate", run.path),
        ):
            assert "is in use by another command" in refused(capfd, *arguments)
            assert files(tmp_path) == before
    assert RunDirectory.create(run.config).config == run.config


def test_a_deleted_factorization_leaves_the_others_and_is_finished_after_a_kill(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    for name in ("default", "k9"):
        run = RunDirectory.create(config(path, factorization={"name": name}))
        with run.lock():
            begin(run)
    before = files(path)
    said = refused(capfd, "rm", path, "--factorization", "k9")
    assert "give --yes to confirm" in said
    said = refused(capfd, "compare", path, "--factorization", "default")
    assert "give one run, two runs, or one run and --factorization twice" in said
    named = ("compare", path, "--factorization", "default", "--factorization")
    assert "has no factorization k8 (it has default, k9)" in refused(capfd, *named, "k8")
    assert "factorization.zarr does not exist yet: run `npeff factorize" in refused(capfd, *named, "k9")
    assert files(path) == before
    with monkeypatch.context() as patch:
        patch.setattr("npeff.runs.removal.remove_directory", lambda folder: None)
        remove_factorization(path, "k9")  # killed before the files are deleted
    assert RunDirectory.open(path).factorizations() == ["default"]
    assert (path / "factorizations" / ".k9.deleted" / "factorization.yaml").exists()
    assert command("rm", path, "--factorization", "k9", "--yes") == 0
    capfd.readouterr()
    assert [each.name for each in (path / "factorizations").iterdir()] == ["default"]
    assert "has no factorization k9 (it has default)" in refused(capfd, "rm", path, "--factorization", "k9", "--yes")
    remove_factorization(path, "default")
    assert RunDirectory.open(path).factorizations() == []
    assert "has no factorization yet: give --components" in refused(capfd, "factorize", path, "--max-iterations", "9")
    assert "has no factorization: run `npeff factorize" in refused(capfd, "lift", path)
    assert command("status", path) == 0


def test_fishers_of_another_run_bring_their_settings_and_refuse_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    RunDirectory.create(config(source, task={"options": {"limit": 40}}, fishers={"shard_size": 20}))
    run_file = tmp_path / "run.yaml"
    text = f"run_dir: {tmp_path / 'new'}\nfactorization: {{n_components: 2}}\nfishers: {{from: {source}"
    run_file.write_text(text + "}\n")
    run = RunDirectory.create(RunConfig.from_yaml(run_file))
    assert run.config.task.options == {"limit": 40}
    assert (run.config.fishers.shard_size, run.fishers) == (20, source / "fishers.zarr")
    assert RunDirectory.open(run.path).config == run.config
    assert RunConfig.model_validate(run.config.model_dump()) == run.config
    run_file.write_text(text.replace("/new", "/other") + ", shard_size: 10}\nseed: 3\n")
    with pytest.raises(RunDirectoryError, match=r"^fishers\.shard_size, seed cannot differ from the settings of "):
        RunDirectory.create(RunConfig.from_yaml(run_file))
    assert not (tmp_path / "other" / "run.yaml").exists()
    run_file.write_text(text.replace("/new", "/third") + "}\nseed: 0\n")
    RunDirectory.create(RunConfig.from_yaml(run_file))  # the same value may be given
    run_file.write_text(text.replace(str(source), str(tmp_path / "absent")) + "}\n")
    with pytest.raises(ConfigError, match=r"no run file at .*absent"):
        RunConfig.from_yaml(run_file)
    chained = tmp_path / "chained.yaml"
    chained.write_text(
        f"run_dir: {tmp_path / 'c'}\nfactorization: {{n_components: 2}}\nfishers: {{from: {run.path}}}\n"
    )
    assert RunDirectory.create(RunConfig.from_yaml(chained)).fishers == source / "fishers.zarr"


def test_a_factorization_is_deleted_on_an_object_store(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "s3://runs/team/run"
    for name in ("default", "k9"):
        document = {**MINIMAL, "run_dir": uri, "factorization": {"n_components": 4, "name": name}}
        run = RunDirectory.create(RunConfig.model_validate(document))
        with run.lock():
            objects.put(run.checkpoints / "000003-0123abcd" / "MANIFEST.json", b"{}")
    assert RunDirectory.open(uri).factorizations() == ["default", "k9"]
    with monkeypatch.context() as patch:
        patch.setattr("npeff.runs.removal.remove_directory", lambda folder: None)
        remove_factorization(uri, "k9")  # killed before the files are deleted
    assert RunDirectory.open(uri).factorizations() == ["default"]
    assert [name for name in s3.contents(uri) if "k9" in name] == [
        "factorizations/k9/checkpoints/000003-0123abcd/MANIFEST.json"
    ]
    remove_factorization(uri, "k9")
    assert [name for name in s3.contents(uri) if "k9" in name] == []
    with pytest.raises(NpeffError, match=r"has no factorization k9 \(it has default\)"):
        remove_factorization(uri, "k9")
