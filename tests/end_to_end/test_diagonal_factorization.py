"""D-NPEFF through the stages: what is factorized, that workers and interruptions change nothing, and how a run ends.

Legend: N examples, P parameters, K components.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import scipy.sparse
from end_to_end.nan_digits import DAMAGED
from npeff.cli import main as cli
from npeff.errors import NpeffError
from npeff.execution.create import make_executor
from npeff.execution.executor import Executor
from npeff.execution.serial import SerialExecutor
from npeff.factorization import entries_by_column
from npeff.interchange.export_run import export_run
from npeff.query.components import ComponentStore
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import SilentProgress
from npeff.runs.stage import recorded
from npeff.stages.factorize import FACTORIZE, stored_diagonals
from npeff.stages.status import status
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from places import place, write_configuration
from scipy.optimize import nnls

N, K, TOP = 120, 4, 60
KINDS = ("diagonal_groups", "diagonal_entries")


def config_of(path: Path, kind: str, shard_size: int = 30, **factorization: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(path),
            "task": {"name": "end_to_end.nan_digits:NanDigits", "options": {"limit": N, "epochs": 2}},
            "fishers": {
                "sketch": {"dim": 64},
                "shard_size": shard_size,
                "diagonal": {"top_entries": TOP, "groups": True},
            },
            "factorization": {
                "n_components": K,
                "kind": kind,
                "checkpoint_every": 2,
                "max_iterations": 12,
                "tolerance": 1e-9,
                **factorization,
            },
            "executor": {"kind": "serial"},
        }
    )


@pytest.fixture(scope="module")
def fishers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs with Fishers alone, by their number of shards."""
    folders = {}
    for n_shards in (1, 4):
        run = RunDirectory.create(config_of(tmp_path_factory.mktemp("fishers") / "run", KINDS[0], -(-N // n_shards)))
        npeff.compute_fishers(run)
        folders[n_shards] = run.path
    return folders


def prepared(path: Path, fishers: dict[int, Path], kind: str, n_shards: int = 4, **factorization: Any) -> RunDirectory:
    """A run whose Fishers are there, of a configuration that differs in its factorization."""
    shutil.copytree(fishers[n_shards], path)
    write_configuration(path, config_of(path, kind, -(-N // n_shards), **factorization))
    return RunDirectory.open(path)


@pytest.fixture(scope="module", params=KINDS)
def finished(request: pytest.FixtureRequest, fishers: dict[int, Path], tmp_path_factory: Any) -> RunDirectory:
    run = prepared(tmp_path_factory.mktemp("finished") / "run", fishers, request.param)
    return npeff.run(run)


def rows_of(run: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    """What is factorized, dense: the fitted examples' rows and the others', over all parameters or groups."""
    store = FisherStore.open(run.fishers)
    stored = store.read_rows(np.arange(N))
    if run.config.factorization.kind == "diagonal_groups":
        x = stored["grouped_diagonal"].astype(np.float64)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    else:
        layout = store.attrs["parameter_layout"]
        x = np.zeros((N, sum(int(np.prod(shape)) for shape in layout["shapes"])))
        np.add.at(x, (np.arange(N)[:, None], stored["diagonal_indices"]), stored["diagonal_values"])
    fit = np.asarray(read_table(run.table("examples"), "examples")["split"].to_pylist()) == "fit"
    return x[fit & stored["valid"]], x[~fit & stored["valid"]]


def dense_components(run: RunDirectory, dim: int) -> np.ndarray:
    stored = open_factorization(run.factorization)
    h_KD = np.zeros((K, dim))
    columns = np.arange(dim) if stored.columns is None else np.asarray(stored.columns[...])
    h_KD[:, columns] = stored.read_components()
    return h_KD


def test_the_factorization_is_of_the_stored_diagonals(finished: RunDirectory) -> None:
    fit, held_out = rows_of(finished)
    h = dense_components(finished, fit.shape[1])
    stored = open_factorization(finished.factorization)
    w = stored.read_coefficients()
    assert np.isnan(w[DAMAGED]).all()
    split = np.asarray(read_table(finished.table("examples"), "examples")["split"].to_pylist())
    w_fit = w[(split == "fit") & ~np.isnan(w[:, 0])].astype(np.float64)
    record = finished.record("factorize")
    assert record is not None
    assert record["factorized"] == finished.config.factorization.kind
    assert record["loss"] == pytest.approx(np.square(fit - w_fit @ h).sum(), rel=1e-5)
    assert record["explained"] == pytest.approx(1 - record["loss"] / np.square(fit).sum(), rel=1e-6)
    residuals = sum(nnls(h.T, row)[1] ** 2 for row in held_out)
    assert record["explained_held_out"] == pytest.approx(1 - residuals / np.square(held_out).sum(), rel=1e-5)
    assert record["explained"] > 0.5
    np.testing.assert_allclose(np.linalg.norm(h, axis=1), 1, rtol=1e-6)
    assert (h >= 0).all()
    assert (np.diff(np.square(w_fit).sum(0)) <= 1e-9).all()
    if finished.config.factorization.kind == "diagonal_entries":
        assert stored.columns is not None
        assert np.asarray(stored.columns[...]).tolist() == np.flatnonzero(fit.any(0)).tolist()


def test_components_are_lifted_and_verified(finished: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    states = {row.stage: (row.state, row.details) for row in status(finished)}
    assert {state for state, _ in states.values()} == {"complete"}
    assert "median cosine to the fitted component" in states["lift"][1]
    lifted = finished.record("lift")
    assert lifted is not None
    assert lifted["median_cosine"] > 0.8
    rows = read_table(finished.table("verification"), "verification").to_pylist()
    assert {(row["component"], row["examples"], row["sign"]) for row in rows} == {
        (component, split, sign) for component in range(K) for split in ("fit", "held_out") for sign in (1, -1)
    }
    for component in range(K):
        direction = DirectionStore.open(finished.directions).read(component)
        assert sum(np.square(array).sum() for array in direction.values()) == pytest.approx(1, rel=1e-5)
    with pytest.raises(RunDirectoryError, match="only kind fishers can be exported"):
        export_run(finished.path, finished.path / "x.h5", what="factorization")
    with pytest.raises(SystemExit) as end:
        cli.main(["select", str(finished.path)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "factorization.kind: fishers" in said


WHO = ["serial", pytest.param("three_actors", marks=[pytest.mark.ray, pytest.mark.slow])]


def executor_of(who: str, request: pytest.FixtureRequest) -> Executor:
    executor: Executor = SerialExecutor() if who == "serial" else request.getfixturevalue(who)
    return executor


@pytest.mark.parametrize("who", WHO)
def test_blocks_and_workers_change_no_direction(
    finished: RunDirectory, tmp_path: Path, who: str, request: pytest.FixtureRequest
) -> None:
    """By another memory limit every component is a block of its own; one that is there already stays."""
    expected = [DirectionStore.open(finished.directions).read(component) for component in range(K)]
    shutil.copytree(finished.path, path := tmp_path / "run")
    shutil.rmtree(path / place("directions.zarr"))
    config = finished.config.with_lift(memory_limit_mb=1)
    write_configuration(path, config)
    run = RunDirectory.open(path)
    npeff.lift(run, executor=executor_of(who, request))
    again = DirectionStore.open(run.directions)
    for component, direction in enumerate(expected):
        for name, array in again.read(component).items():
            np.testing.assert_allclose(array, direction[name], rtol=0, atol=1e-6 * np.abs(direction[name]).max())


def test_a_model_is_repaired_along_them(finished: RunDirectory) -> None:
    config = finished.config.repair.model_copy(update={"direction": "own"})
    with pytest.raises(RunDirectoryError, match="those of diagonals do not determine own ones"):
        npeff.repair(RunDirectory(finished.path, finished.config.model_copy(update={"repair": config})))
    assert npeff.repair(finished)["direction"] == "lifted"


def test_the_component_store_answers(finished: RunDirectory) -> None:
    store = ComponentStore.open(finished.path)
    h = np.asarray(open_factorization(finished.factorization).read_components())
    similar = store.similar_components(0)
    np.testing.assert_allclose(similar["cosine"].to_numpy(), np.sort((h @ h[0])[1:])[::-1], atol=1e-9)
    assert len(store.top_examples(0, n=5)) == 5
    assert len(store.components_table()) == K
    assert store.summary()["explained"] > 0.5
    page = finished.report.read_text()
    assert "diagonal Fishers" in page
    assert "cosine with the component" in page
    assert "npeff lift" not in page
    assert "npeff verify" not in page


# --- Workers, shards, interruptions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_actors() -> Iterator[Executor]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)  # where the task lies
        with make_executor(
            "ray", address="local", workers=3, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=120.0
        ) as executor:
            yield executor


def losses_of(run: RunDirectory) -> list[float]:
    return read_table(run.table("history"), "history")["loss"].to_pylist()


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_workers_change_no_loss(
    kind: str, who: str, fishers: dict[int, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one = prepared(tmp_path / "one", fishers, kind, 1)
    npeff.factorize(one)
    for n_shards in (1, 4):  # three actors and one shard leave two actors idle
        run = prepared(tmp_path / str(n_shards), fishers, kind, n_shards)
        npeff.factorize(run, executor=executor_of(who, request))
        np.testing.assert_allclose(losses_of(run), losses_of(one), rtol=1e-8)
        expected, found = (open_factorization(each.factorization) for each in (one, run))
        np.testing.assert_allclose(found.read_components(), expected.read_components(), atol=1e-6)
        np.testing.assert_allclose(found.read_coefficients(), expected.read_coefficients(), atol=1e-5)


def test_large_data_are_worked_on_in_single_precision(
    fishers: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single, double = (prepared(tmp_path / name, fishers, "diagonal_groups") for name in ("single", "double"))
    npeff.factorize(double)
    monkeypatch.setattr(stored_diagonals, "_DOUBLE_BYTES", 0)
    npeff.factorize(single)
    assert losses_of(single) != losses_of(double)
    assert losses_of(single)[-1] == pytest.approx(losses_of(double)[-1], rel=1e-5)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(
    kind: str, fishers: dict[int, Path], tmp_path: Path
) -> None:
    whole, broken = (prepared(tmp_path / name, fishers, kind) for name in ("whole", "broken"))
    npeff.factorize(whole)

    class Progress(SilentProgress):
        def stage(self, *arguments: Any, **more: Any) -> Any:
            from contextlib import nullcontext

            def tick(done: int, fact: str = "", last: bool = False, **numbers: float) -> None:
                if done == 7:
                    raise Interrupted

            return nullcontext(tick)

    with pytest.raises(Interrupted):
        npeff.factorize(broken, progress=Progress())
    assert recorded(broken, FACTORIZE) is None
    said: list[str] = []
    progress = SilentProgress()
    progress.say = said.append  # type: ignore[method-assign]
    npeff.factorize(broken, progress=progress)
    assert "resuming from iteration 6" in said
    one, other = (open_factorization(run.factorization) for run in (whole, broken))
    np.testing.assert_array_equal(one.read_components(), other.read_components())
    np.testing.assert_array_equal(one.read_coefficients(), other.read_coefficients())
    assert losses_of(whole) == losses_of(broken)


def test_entries_in_no_column_are_counted_and_left_out() -> None:
    values = np.array([[3.0, 2.0, 0.0], [2.0, 1.0, 1.0]])
    indices = np.array([[7, 2, 0], [9, 4, 2]])
    rows, outside = entries_by_column(values, indices, np.array([2, 7]))
    np.testing.assert_array_equal(rows.toarray(), [[2, 3], [1, 0]])
    np.testing.assert_array_equal(outside, [0, 5])
    assert isinstance(rows, scipy.sparse.csr_array)
    nothing, outside = entries_by_column(values, indices, np.zeros(0, np.int64))
    assert nothing.shape == (2, 0)
    np.testing.assert_array_equal(outside, [13, 6])


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("diagonal_groups", "groups: true; add this key"),
        ("diagonal_entries", "top_entries; add this key, such as 1024"),
    ],
)
def test_diagonals_that_are_not_stored_are_refused(kind: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    document = {"run_dir": "x", "task": {"name": "digits"}, "factorization": {"n_components": 2, "kind": kind}}
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=f"kind: {kind} needs fishers.diagonal.{key}$"):
        RunConfig.from_yaml(path)


def test_more_components_than_examples_are_refused(fishers: dict[int, Path], tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", fishers, "diagonal_groups", n_components=N)
    with pytest.raises(NpeffError, match=f"n_components={N} exceeds"):
        npeff.factorize(run)
