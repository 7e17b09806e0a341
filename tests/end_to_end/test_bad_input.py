"""What a user can do wrong, through the command itself: one line that says what to do, exit code 2, nothing lost.

Most cases run the command in this process, with the serial executor; those that are about processes start some.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from npeff.cli.main import main
from places import place

pytestmark = pytest.mark.process

TESTS = Path(__file__).parents[1]
NOT_CONTENT = {".lock", ".workers"}


def configuration(run_dir: Path | str, task: str = "SoundTask", /, **changes: Any) -> dict[str, Any]:
    """A small run; ``fishers__shard_size=3`` sets a key of a section, None removes it."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "task": {"name": f"defective_tasks:{task}"},
        "fishers": {"sketch": {"kind": "identity"}, "shard_size": 16},
        "factorization": {"n_components": 3},
        "verification": {"top_examples": 4, "baseline_examples": 8},
        "executor": {"kind": "serial"},
    }
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
        if value is None:
            del section[key]
    return tree


def contents(folder: Path) -> dict[str, str]:
    """Every file of a run and a hash of its bytes; locks apart, which hold nothing to lose."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_CONTENT]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def error_line(code: int, stderr: str) -> str:
    """The message of a refusal that looks as it must."""
    assert code == 2, stderr
    assert stderr.startswith("npeff: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n"), stderr
    return stderr.removeprefix("npeff: error: ").rstrip()


class Command:
    """The command in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str], folder: Path) -> None:
        self._capfd, self.folder = capfd, folder

    def __call__(self, *arguments: Any) -> tuple[int, str]:
        """Exit code and standard error."""
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), self._capfd.readouterr().err

    def run_file(self, tree: dict[str, Any] | str, name: str = "run.yaml") -> Path:
        path = self.folder / name
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    def refused(self, *arguments: Any) -> str:
        return error_line(*self(*arguments))

    def succeeds(self, *arguments: Any) -> None:
        code, stderr = self(*arguments)
        assert (code, stderr) == (0, "")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    handler, path = signal.getsignal(signal.SIGTERM), list(sys.path)
    yield Command(capfd, tmp_path)
    signal.signal(signal.SIGTERM, handler)
    sys.path[:] = path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run, to copy."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(folder / "run")))
    handler, path = signal.getsignal(signal.SIGTERM), list(sys.path)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder / "run.yaml")])
    signal.signal(signal.SIGTERM, handler)
    sys.path[:] = path
    assert not ended.value.code
    return folder / "run"


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def forget(run_dir: Path, *stages: str) -> None:
    """As if these stages had not run."""
    written = {
        "fishers": ["fishers.zarr", "shards", "tables"],
        "factorize": ["factorization.zarr", "checkpoints", *(f"tables/{t}.parquet" for t in ("components", "history"))],
        "lift": ["directions.zarr", "partial/lift"],
        "verify": ["partial/verify", "tables/verification.parquet"],
    }
    for stage in stages:
        for name in (f"stages/{stage}.json", *written[stage]):
            path = run_dir / place(name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_dir": None}, "missing key 'run_dir'"),
        ({"task": None}, "missing key 'task'"),
        ({"factorization__n_components": None}, "missing key 'factorization.n_components'"),
        ({"factorisation": {"n_components": 3}}, "unknown key 'factorisation' (did you mean 'factorization'?)"),
        ({"fishers__shardsize": 3}, "unknown key 'fishers.shardsize' (did you mean 'shard_size'?)"),
        ({"fishers__sketch__dims": 3}, "unknown key 'fishers.sketch.dims' (did you mean 'dim'?)"),
        ({"factorization__n_components": "many"}, "factorization.n_components must be a whole number, not 'many'"),
        ({"factorization__n_components": 0}, "factorization.n_components must be greater than 0, not 0"),
        ({"factorization__held_out_fraction": 1}, "factorization.held_out_fraction must be less than 1"),
        ({"fishers": [1]}, "fishers must be a mapping"),
        ({"parameters": {"include": "*"}}, "parameters.include must be a list"),
        ({"executor__workers": 2}, "the serial executor has one worker, not 2"),
        ({"run_dir": "ftp://bucket/run"}, "give a local path or a URI s3://bucket/prefix"),
        ({"run_dir": "/proc/run"}, "cannot write to /proc/run"),
        ({"run_dir": __file__}, "Not a directory"),
    ],
)
def test_a_mistake_in_the_run_file_is_said_before_anything_is_made(
    command: Command, changes: dict[str, Any], said: str
) -> None:
    tree = configuration(command.folder / "run", **changes)
    assert said in command.refused("run", command.run_file(tree))
    assert not (command.folder / "run").exists()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("EmptyTask", "has no examples"),
        ("LogitsPerTokenTask", "logits() must return examples x classes, here 2 x C, not 2 x 4 x 3"),
        ("NoBatchAxisTask", "logits() must return examples x classes, here 2 x C, not 1 x 3"),
        ("ModelOutputTask", "logits() must return a tensor, not dict"),
        ("DetachedTask", "do not detach them"),
        ("OneLogitTask", "give one name for each logit, and at least two logits"),
        ("TooFewNamesTask", "the model has 3 logits for 2 class names"),
        ("NoNamesTask", "class_names must be a list of 3 names"),
        ("NanWeightsTask", "none of the first 40 examples has finite logits and gradients"),
        ("AllInvalidTask", "check the model's weights"),
        ("LabelOutOfRangeTask", "label 7 of example 0 is not one of the classes 0 to 2"),
        ("TableWithoutLabelTask", "has no column 'label'"),
        ("StringLabelsTask", "column 'label' must hold class numbers"),
        ("IntegerIdsTask", "column 'id' must hold strings, not int64"),
        ("TableIsAListTask", "must be a pyarrow.Table, not list"),
        ("ShortTableTask", "must have one row per example, 40, not 39"),
        ("RaisingConstructorTask", "RaisingConstructorTask() raised FileNotFoundError"),
        ("RaisingModelTask", "model() raised RuntimeError: Error(s) in loading state_dict for Net: Missing key(s)"),
        ("RaisingLogitsTask", "logits() raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("RaisingBatchTask", "examples().batch() raised KeyError: 'image_30.png' (defective_tasks.py, line "),
        ("ExitingTask", "model() raised SystemExit: model not found"),
        ("GreedyTask", "ran out of memory (Unable to allocate 3.00 TiB"),
        ("ModelIsNoModuleTask", "model() must return a torch.nn.Module, not dict"),
        ("NoParametersTask", "has no floating-point parameters"),
        ("AbstractTask", "does not define logits"),
        ("ChangingTask", "has 39 examples on this worker, but had 40 when the run began"),
        ("ConstantModelTask", "the Fishers of all examples are zero"),
        ("NoSuchTask", "defective_tasks has no NoSuchTask"),
        ("NotATask", "is not a subclass of npeff.tasks.Task"),
    ],
)
def test_a_defect_of_the_users_own_task_is_named(command: Command, task: str, said: str) -> None:
    assert said in command.refused("run", command.run_file(configuration(command.folder / "run", task)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": {"name": "no_such_module:Task"}}, "there is no module no_such_module: install it"),
        ({"task": {"name": "digit"}}, "unknown task 'digit'"),
        ({"task__options": {"m": 3}}, "does not take task.options.m (it takes: n)"),
        ({"task__options": {"n": "three"}}, "raised TypeError"),
        ({"parameters": {"include": ["encoder.*"]}}, "nothing matches 'encoder.*' (the model has 0.weight, 0.bias"),
        ({"parameters": {"exclude": ["*"]}}, "parameters.exclude excludes every parameter"),
        ({"factorization__n_components": 55}, "n_components=55 exceeds the 54 factor rows of 27 examples of rank 2"),
        ({"factorization__subsample": 1}, "factorization.subsample=1 examples of rank 2 cannot start n_components=3"),
        ({"fishers__sketch": {"dim": 10**12}}, "fishers.sketch.dim must be less than or equal to 2147483647, not 1"),
    ],
)
def test_values_that_do_not_fit_task_or_model_are_named(command: Command, changes: dict[str, Any], said: str) -> None:
    tree = configuration(command.folder / "run", **changes)
    assert said in command.refused("run", command.run_file(tree))


@pytest.mark.parametrize(
    "changes",
    [
        {"task__options": {"n": 1}, "factorization__n_components": 1},
        pytest.param(
            {"task__options": {"n": 2}, "factorization__n_components": 2, "factorization__held_out_fraction": 0},
            marks=pytest.mark.slow,
        ),
        {"factorization__held_out_fraction": 0.97, "factorization__n_components": 1, "fishers__shard_size": 10**9},
        {"fishers__sketch": {"kind": "tensorsketch", "dim": 1}, "fishers__batch_size": 1000},
        pytest.param({"verification": {"top_examples": 1000, "baseline_examples": 1000}}, marks=pytest.mark.slow),
    ],
)
def test_the_smallest_and_most_lopsided_runs_finish(command: Command, changes: dict[str, Any]) -> None:
    command.succeeds("run", command.run_file(configuration(command.folder / "run", **changes)))


def test_an_invalid_first_example_is_left_out_like_any_other(
    command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    path = command.run_file(configuration(command.folder / "run", "FirstInvalidTask"))
    with pytest.raises(SystemExit) as ended:
        main(["fishers", str(path)])
    assert not ended.value.code
    assert "1 of 40 examples have non-finite logits or gradients and are excluded" in capfd.readouterr().out


def test_a_run_directory_of_another_configuration_is_left_alone(command: Command, run_dir: Path) -> None:
    before = contents(run_dir)
    other = command.run_file(configuration(run_dir, seed=4, factorization__n_components=4))
    for stage in ("run", "fishers", "report"):
        said = command.refused(stage, other)
        assert "another configuration (it differs in seed)" in said
        assert "choose another run_dir" in said
    assert contents(run_dir) == before


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_shard_is_named_and_made_again_as_the_message_says(
    command: Command, run_dir: Path, finished_run: Path, damage: Callable[[Path], Any]
) -> None:
    forget(run_dir, "factorize", "lift", "verify")
    damage(run_dir / "fishers.zarr" / "factors" / "c" / "1" / "0" / "0")
    before = contents(run_dir)
    said = command.refused("run", run_dir)
    record = run_dir / "shards" / "00001.json"
    assert said.startswith(f"shard 1 of {run_dir / 'fishers.zarr'} ")
    assert f"delete {record} and run the same command again" in said
    assert contents(run_dir) == before
    record.unlink()
    command.succeeds("fishers", run_dir)
    mended, reference = contents(run_dir / "fishers.zarr"), contents(finished_run / "fishers.zarr")
    assert mended == reference


@pytest.mark.parametrize(
    ("damaged", "stages", "with_", "deleted"),
    [
        ("shards/00001.json", ("factorize", "lift", "verify"), "run", "shards/00001.json"),
        ("fishers.zarr/zarr.json", ("factorize", "lift", "verify"), "run", "fishers.zarr"),
        pytest.param("stages/factorize.json", (), "run", "stages/factorize.json", marks=pytest.mark.slow),
        pytest.param(
            "tables/examples.parquet",
            ("factorize", "lift", "verify"),
            "run",
            "tables/examples.parquet",
            marks=pytest.mark.slow,
        ),
        ("factorization.zarr/components/c/0/0", ("lift", "verify"), "run", "factorization.zarr"),
        pytest.param("directions.zarr/2.bias/c/0/0", ("verify",), "run", "directions.zarr", marks=pytest.mark.slow),
        ("partial/verify/00000.parquet", (), "run", "partial/verify/00000.parquet"),
    ],
)
def test_anything_else_that_is_damaged_is_named_and_made_again_once_deleted(
    command: Command, run_dir: Path, damaged: str, stages: tuple[str, ...], with_: str, deleted: str
) -> None:
    forget(run_dir, *stages)
    if damaged.startswith("partial"):
        (run_dir / place("tables/verification.parquet")).unlink()
    truncate(run_dir / place(damaged))
    before = contents(run_dir)
    said = command.refused(with_, run_dir)
    assert str(run_dir / place(deleted)) in said
    assert "delete" in said
    after = contents(run_dir)
    assert {name: after.get(name) for name in before} == before
    path = run_dir / place(deleted)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    command.succeeds(with_, run_dir)


def test_checkpoints_that_are_all_damaged_are_said(command: Command, run_dir: Path) -> None:
    for name in ("stages/factorize.json", "stages/lift.json"):
        (run_dir / place(name)).unlink()
    for path in (run_dir / place("checkpoints")).rglob("*.npy"):
        truncate(path)
    before = contents(run_dir)
    assert f"all checkpoints in {run_dir / place('checkpoints')} are damaged: delete" in command.refused("run", run_dir)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("done", "stage", "first"),
    [((), "factorize", "fishers"), (("fishers",), "lift", "factorize"), (("fishers", "factorize"), "verify", "lift")],
)
def test_a_stage_says_which_one_comes_before_it(
    command: Command, run_dir: Path, done: tuple[str, ...], stage: str, first: str
) -> None:
    for name in ("fishers", "factorize", "lift", "verify"):
        if name not in done:
            (run_dir / place(f"stages/{name}.json")).unlink()
    before = contents(run_dir)
    assert command.refused(stage, run_dir).endswith(f"is not complete: run `npeff {first} {run_dir}` first")
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("top", "-c", 99), "there is no component 99: this run has components 0 to 2"),
        (("top",), "Missing option '--component' / '-c' (see: npeff query RUN_DIR top --help)"),
        (("top", "-c", "x"), "Invalid value for '--component'"),
        (("top", "-c", 0, "--split", "test"), "there is no split 'test'"),
        (("example", "-e", "nobody"), 'there is no example "nobody"'),
        (("example", "-e", 10**25), "there is no example"),
        (("similar", "-c", -1), "there is no component -1"),
        (("tops",), "Did you mean 'top'?"),
        (("sql", "selec 1"), "SQL: Parser Error"),
        (("sql", "select * from nothing"), "Table with name nothing does not exist! (tables: classes, "),
        (("sql", "drop table components"), "a query must be one SELECT statement"),
        (("sql", "select 1; select 2"), "a query must be one SELECT statement"),
        (("sql", "select * from read_csv('/etc/passwd')"), "file system operations are disabled"),
        (("sql", "select interval 3 days", "--format", "parquet"), "the format parquet does not support this result"),
        (
            ("components", "--format", "xml"),
            "'xml' is not one of 'table', 'expanded', 'json', 'csv', 'spreadsheet', 'parquet'",
        ),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(
    command: Command, finished_run: Path, arguments: tuple[Any, ...], said: str
) -> None:
    assert said in command.refused("query", finished_run, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("select", "RUN", "--components", "x"), "is not a list of numbers of components"),
        (("select", "RUN", "--components", "8:4:1"), "components"),
        (("select", "RUN", "--components", "0"), "components"),
        (("select", "RUN", "--components", "1000"), "n_components"),
        (("select", "RUN", "--seeds", "0"), "'--seeds'"),
        (("transform", "RUN"), "Missing option '--run'"),
        (("transform", "RUN", "--run", "HERE/nothing.yaml"), "no run file at"),
        (("transform", "HERE/nowhere", "--run", "RUN"), "no run in"),
        (("transform", "RUN", "--run", "RUN"), "RUN has been factorized already"),
        (("repair", "HERE/nowhere"), "no run file at"),
        (("repair", "RUN", "--run-dir", "HERE/x"), "--run-dir needs a run file"),
        (("export", "RUN", "HERE/x", "--what", "direction"), "--what direction needs --component"),
        (("export", "RUN", "HERE/x", "-c", "1"), "--component needs --what direction or lora"),
        (("export", "RUN", "HERE/x", "--what", "examples", "--values", "1"), "--values needs --what fishers"),
        (("export", "RUN", "HERE/x", "--what", "direction", "-c", "99"), "has no component 99: choose one of 0 to 2"),
        (("export", "RUN", "HERE/x", "--what", "direction", "-c", "-1"), "'--component'"),
        (("export", "RUN", "HERE", "--what", "direction", "-c", "0"), "cannot write"),
        (("export", "RUN", "HERE/x", "--what", "nothing"), "'nothing' is not one of"),
        (("export", "RUN", "HERE/x", "--values", "0"), "'--values'"),
        (("export", "HERE/nowhere", "HERE/x"), "no run in"),
        (("import", "HERE/nothing.h5", "HERE/new"), "nothing.h5"),
        (("import", "HERE/text", "HERE/new"), "HERE/text"),
        (("import", "HERE", "HERE/new"), "HERE"),
        (("import", "HERE/text", "HERE/new", "--components", "0"), "'--components'"),
        (("import", "HERE/text", "HERE/new", "--held-out", "2"), "'--held-out'"),
        (("estimate", "HERE/nothing.yaml"), "no run file at"),
        (("estimate", "HERE/list.yaml"), "list.yaml"),
        (("estimate", "HERE/binary.yaml"), "binary.yaml"),
        (("estimate", "RUN", "--workers", "0"), "'--workers'"),
        (("submit", "HERE/nothing.yaml"), "no run file at"),
        (("submit", "RUN/../run.yaml", "--address", "http://127.0.0.1:1"), "127.0.0.1:1"),
        (("submit", "RUN/../run.yaml", "--address", "nonsense"), "nonsense"),
        (("submit", "RUN/../run.yaml", "--py-module", "HERE/nowhere"), "'--py-module'"),
        (("check",), "Missing argument 'RUN_DIR'"),
        (("check", "HERE"), "it has no run.yaml"),
        (("check", "RUN/run.yaml"), "it is a file"),
        (("check", "RUN", "--recompute", "--workers", "0"), "'--workers'"),
        (("run", "HERE/list.yaml"), "list.yaml"),
        (("run", "HERE/binary.yaml"), "binary.yaml"),
        (("run", "HERE/empty.yaml"), "empty.yaml"),
        (("factorize", "RUN", "--max-iterations", "0"), "'--max-iterations'"),
        (("factorize", "RUN", "--max-iterations", "3"), "steps, more than factorization.max_iterations: 3"),
        (("query", "RUN", "top", "-c", "0", "-n", "0"), "'-n'"),
        (("query", "RUN", "sql", ""), "a query must be one SELECT statement"),
        (("query", "RUN", "sql", "copy components to 'x.csv'"), "a query must be one SELECT statement"),
        (("query", "RUN", "sql", "attach 'x.db'"), "a query must be one SELECT statement"),
        (("query", "RUN", "selection"), "selection"),
        (("query", "RUN/run.yaml", "components"), "run.yaml"),
        (("status", "RUN/tables/examples.parquet"), "examples.parquet"),
        (("report", "HERE/nowhere"), "no run file at"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
)
def test_malformed_arguments_of_every_command_change_nothing(
    command: Command, finished_run: Path, arguments: tuple[str, ...], said: str
) -> None:
    (command.folder / "text").write_text("no HDF5 file")
    (command.folder / "list.yaml").write_text("- 1\n")
    (command.folder / "empty.yaml").write_text("")
    (command.folder / "binary.yaml").write_bytes(bytes(range(256)))
    before = contents(command.folder) | contents(finished_run)

    def filled(text: str) -> str:
        return text.replace("RUN/", f"{finished_run}/").replace("HERE", str(command.folder))

    given = [str(finished_run) if each == "RUN" else filled(each) for each in arguments]
    answer = command.refused(*given).replace(str(finished_run), "RUN").replace(str(command.folder), "HERE")
    assert said in answer
    assert contents(command.folder) | contents(finished_run) == before


def test_a_table_that_is_damaged_is_not_answered_from(command: Command, run_dir: Path) -> None:
    flip(
        run_dir / place("tables/coefficients.parquet"), where=0.1
    )  # among the numbers: half of a small file is its footer
    said = command.refused(
        "query", run_dir, "sql", "select sum(coefficient), sum(example), sum(component) from coefficients"
    )
    assert "coefficients" in said
    truncate(run_dir / place("tables/coefficients.parquet"))
    assert f"run `npeff factorize {run_dir}` again" in command.refused("query", run_dir, "top", "-c", 0)


def test_two_columns_of_one_name_are_both_answered(
    command: Command, finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["query", str(finished_run), "sql", "select 1 as a, 2 as a", "--format", "csv"])
    assert capfd.readouterr().out.splitlines() == ['"a","a_2"', "1,2"]


def test_questions_to_a_half_finished_run_name_the_command_that_is_due(command: Command, run_dir: Path) -> None:
    forget(run_dir, "factorize", "lift", "verify")
    shutil.rmtree(run_dir / "tables")
    for question in (("top", "-c", 0), ("components",), ("similar", "-c", 0)):
        said = command.refused("query", run_dir, *question)
        assert said == f"table 'components' does not exist yet: run `npeff factorize {run_dir}` first"
    command.succeeds("status", run_dir)


def test_what_is_no_run_is_said(command: Command) -> None:
    empty = command.folder / "empty"
    empty.mkdir()
    for arguments in (("status", empty), ("run", empty), ("query", empty, "components"), ("report", empty)):
        assert "has no run.yaml" in command.refused(*arguments)
    assert "no run file at" in command.refused("run", empty / "run.yaml")
    assert "does not exist" in command.refused("query", empty / "run", "components")
    assert "(see: npeff run --help)" in command.refused("run")
    (empty / "thesis.txt").write_text("mine")
    assert "is not empty and holds no run.yaml" in command.refused("run", command.run_file(configuration(empty)))
    assert contents(empty) == {"thesis.txt": hashlib.sha256(b"mine").hexdigest()}


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system, or mounts it anew with other options and the same content."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        again = "remount," if mounted else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting a file system is not permitted here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size_kib", [4, 160, *(pytest.param(size, marks=pytest.mark.slow) for size in (60, 240, 360))])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(
    command: Command, tmpfs: Callable[[str], Path], size_kib: int
) -> None:
    run_dir = tmpfs(f"size={size_kib}k") / "run"
    path = command.run_file(configuration(run_dir))
    said = command.refused("run", path)
    assert "No space left on device" in said
    assert str(run_dir) in said
    before = contents(run_dir) if run_dir.exists() else {}
    tmpfs("size=100m")
    command.succeeds("run", path)
    kept = {name: digest for name, digest in before.items() if name.startswith("shards/")}
    assert {name: contents(run_dir)[name] for name in kept} == kept


def test_a_file_system_that_is_read_only_is_said(command: Command, tmpfs: Callable[[str], Path]) -> None:
    folder = tmpfs("size=100m")
    path = command.run_file(configuration(folder / "run"))
    command.succeeds("fishers", path)
    tmpfs("ro")
    before = contents(folder)
    for arguments in (("run", path), ("run", folder / "run"), ("report", folder / "run")):
        assert f"cannot write to {folder / 'run'}" in command.refused(*arguments)
    assert f"cannot write to {folder / 'new'}" in command.refused("run", path, "--run-dir", folder / "new")
    command.succeeds("status", folder / "run")
    assert contents(folder) == before


def start(*arguments: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "npeff", *map(str, arguments)],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_run_of_a_directory_is_refused_while_the_first_goes_on(command: Command) -> None:
    run_dir, gate = command.folder / "run", command.folder / "gate"
    tree = configuration(run_dir, "GatedTask", task__options={"gate": str(gate)}, fishers__batch_size=16)
    path = command.run_file(tree)
    with start("fishers", path) as first:
        deadline = time.monotonic() + 60
        while not (run_dir / "shards" / "00000.json").exists():
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = contents(run_dir)
        for stage in ("run", "fishers", "report"):
            said = command.refused(stage, path)
            assert f"{run_dir} is in use by another command (process {first.pid} on " in said
        assert contents(run_dir) == before
        gate.touch()
        _, stderr = first.communicate(timeout=60)
        assert (first.returncode, stderr) == (0, "")


@pytest.mark.slow  # tests/execution/test_executor.py has the exceptions of actors
def test_an_error_inside_a_ray_actor_looks_the_same(command: Command) -> None:
    tree = configuration(command.folder / "run", "UnpicklableErrorTask", executor={"kind": "ray", "workers": 1})
    process = start("run", command.run_file(tree))
    _, stderr = process.communicate(timeout=120)
    said = error_line(process.returncode, stderr)
    assert "model() raised UnpicklableError: code 3 at here (defective_tasks.py, line " in said


def test_a_gpu_that_is_not_there_is_said(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tree = configuration(command.folder / "run", executor={"kind": "serial", "gpus_per_worker": 1})
    assert "torch finds no GPU" in command.refused("run", command.run_file(tree))
