"""Polishing: directions that a narrow sketch has blurred become those of a factorization in all parameters."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
from npeff.cli import main as cli
from npeff.execution.executor import WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.stages.lift import worker as lift_worker
from npeff.storage.checksums import read_json
from npeff.storage.errors import StoreError
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from places import write_configuration

N, K, STEPS = 120, 3, 2


def config_of(path: Path, sketch: dict[str, Any], **lift: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(path),
            "task": {"name": "digits", "options": {"limit": N, "epochs": 2}},
            "parameters": {"include": ["7.*", "0.*", "2.bias"]},
            "fishers": {"sketch": sketch, "shard_size": 60},
            "factorization": {"n_components": K, "stability_examples": 0, "tolerance": 1e-8},
            "lift": {"direction": "own"} | lift,
            "executor": {"kind": "serial"},
        }
    )


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Factorized in 48 coordinates, not lifted."""
    run = RunDirectory.create(config_of(tmp_path_factory.mktemp("narrow") / "run", {"dim": 48}))
    npeff.compute_fishers(run)
    npeff.factorize(run)
    return run


def copy_of(run: RunDirectory, path: Path, **lift: Any) -> RunDirectory:
    shutil.copytree(run.path, path)
    write_configuration(path, config_of(path, {"dim": 48}, **lift))
    return RunDirectory.open(path)


def directions_of(run: RunDirectory) -> np.ndarray:
    """(K, P)"""
    store = DirectionStore.open(run.directions)
    return np.stack(
        [np.concatenate([array.ravel() for array in store.read(component).values()]) for component in range(K)]
    )


def dense(run: RunDirectory, tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Â of the same examples in all parameters (N, R, P), and W of those fitted on, in float64."""
    whole = RunDirectory.create(config_of(tmp_path / "whole", {"kind": "identity"}))
    npeff.compute_fishers(whole)
    factors = FisherStore.open(whole.fishers).read_rows(np.arange(N), ("factors",))["factors"].astype(np.float64)
    w = open_factorization(run.factorization).read_coefficients().astype(np.float64)
    split = np.asarray(read_table(run.table("examples"), "examples")["split"].to_pylist())
    w[split != "fit"] = 0
    return factors, w


def test_steps_are_those_of_their_definition_and_the_loss_falls(narrow: RunDirectory, tmp_path: Path) -> None:
    factors, w = dense(narrow, tmp_path)
    losses = []
    for steps in range(STEPS + 1):
        run = copy_of(narrow, tmp_path / f"{steps}", polish_steps=steps)
        npeff.lift(run)
        found = directions_of(run)
        if steps > 0:
            products = np.einsum("nrp,kp->nrk", factors, before)  # noqa: F821
            u = np.einsum("nk,nrk,nrp->kp", w, products, factors)
            expected = np.linalg.solve((w.T @ w) * (before @ before.T), u)  # noqa: F821
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(np.abs((found * expected).sum(1)), 1, atol=2e-4)  # fp16 factors
        before = found  # noqa: F841
        t = np.square(np.einsum("nrp,kp->nrk", factors, found)).sum(1)
        gram = np.square(found @ found.T)
        losses.append(float(((w @ gram) * w).sum() - 2 * (w * t).sum()))
        record = run.record("lift")
        assert record is not None
        facts = [read_json(run.partial_results("lift") / f"{component:05d}.json") for component in range(K)]
        assert [fact["polished"] for fact in facts] == [steps] * K
        assert not list((run.partial_results("lift") / "polish").rglob("*.safetensors"))
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0]


class _Interrupted(Exception):
    pass


class _Stops(SerialExecutor):
    """Has every component lifted by itself, and ends after some of them."""

    def __init__(self, units: int = -1) -> None:
        super().__init__()
        self.workers, self.left = K, units

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
        for found in super().map(spec, method, items, **options):
            yield found
            self.left -= 1
            if self.left == 0:
                raise _Interrupted


def test_it_goes_on_to_the_same_directions_wherever_it_is_interrupted(narrow: RunDirectory, tmp_path: Path) -> None:
    undisturbed = copy_of(narrow, tmp_path / "undisturbed", polish_steps=2)
    npeff.lift(undisturbed, executor=_Stops())
    expected = directions_of(undisturbed)
    for units in (K + 1, 4 * K + 2):
        run = copy_of(narrow, tmp_path / f"{units}", polish_steps=2)
        with pytest.raises(_Interrupted):
            npeff.lift(run, executor=_Stops(units))
        npeff.lift(run, executor=_Stops())
        np.testing.assert_array_equal(directions_of(run), expected)


def test_a_lost_direction_is_made_again_with_all_others(narrow: RunDirectory, tmp_path: Path) -> None:
    run = copy_of(narrow, tmp_path / "run", polish_steps=1)
    npeff.lift(run)
    expected = directions_of(run)
    (run.partial_results("lift") / "00002.json").unlink()
    run.record_file("lift").unlink()
    npeff.lift(run)
    np.testing.assert_array_equal(directions_of(run), expected)


def test_a_damaged_direction_is_made_again_by_check(narrow: RunDirectory, tmp_path: Path) -> None:
    run = copy_of(narrow, tmp_path / "run", polish_steps=1)
    npeff.lift(run)
    expected = directions_of(run)
    chunk = next(path for path in (run.directions / "7.weight" / "c" / "1").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert [damage.what for damage in npeff.check(run)] == ["direction 1"]
    npeff.check(run, recompute=True)
    np.testing.assert_array_equal(directions_of(run), expected)


def test_examples_that_came_with_a_batch_need_not_be_finite(tmp_path: Path) -> None:
    """Where labels are drawn, batches are those of the Fishers, with an invalid example in one of them."""
    document = config_of(tmp_path / "run", {"dim": 48}, polish_steps=1).model_dump()
    document["task"]["name"] = "end_to_end.nan_digits:NanDigits"
    document["fishers"] |= {"labels": "sampled", "rank": 2}
    run = RunDirectory.create(RunConfig.model_validate(document))
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift):
        stage(run)
    assert np.isfinite(directions_of(run)).all()
    np.testing.assert_allclose(np.linalg.norm(directions_of(run), axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fishers", "diagonal_groups"])
def test_a_component_that_no_example_uses_has_no_direction_and_harms_no_other(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = config_of(tmp_path / "run", {"dim": 48}, polish_steps=int(kind == "fishers")).model_dump()
    document["fishers"]["diagonal"]["groups"] = True
    document["factorization"]["kind"] = kind
    run = RunDirectory.create(RunConfig.model_validate(document))
    for stage in (npeff.compute_fishers, npeff.factorize):
        stage(run)

    class Unused:
        def __init__(self, path: Path) -> None:
            self._stored = open_factorization(path)

        def read_coefficients(self) -> np.ndarray:
            coefficients = self._stored.read_coefficients().copy()
            coefficients[:, 1] = 0
            return coefficients

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stored, name)

    monkeypatch.setattr(lift_worker, "open_factorization", Unused)
    npeff.lift(run)
    lengths = np.linalg.norm(directions_of(run), axis=1)
    np.testing.assert_allclose(lengths, [1, 0, 1], atol=1e-5)


def test_damaged_scores_are_said_to_be_so(narrow: RunDirectory, tmp_path: Path) -> None:
    run = copy_of(narrow, tmp_path / "run", polish_steps=1)
    with pytest.raises(_Interrupted):
        npeff.lift(run, executor=_Stops(2 + 2 * K))  # two parts, all directions and scores
    damaged = run.partial_results("lift") / "polish" / "001" / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(StoreError, match="missing or damaged: delete it and run the same command again"):
        npeff.lift(run, executor=_Stops())
    damaged.unlink()
    npeff.lift(run, executor=_Stops())
    assert not damaged.parent.parent.exists()


def test_what_cannot_be_polished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="polish_steps needs the directions of all components"):
        RunConfig.from_yaml(_written(tmp_path / "a.yaml", "lift: {polish_steps: 1, components: [0]}"))
    diagonal = "fishers: {diagonal: {groups: true}}\nlift: {polish_steps: 1}"
    with pytest.raises(ConfigError, match=r"lift.polish_steps needs factorization.kind: fishers"):
        RunConfig.from_yaml(_written(tmp_path / "b.yaml", diagonal, kind="diagonal_groups"))
    with pytest.raises(SystemExit) as end:
        cli.main(["run", str(tmp_path / "a.yaml")])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def _written(path: Path, more: str, kind: str = "fishers") -> Path:
    path.write_text(f"run_dir: x\ntask: {{name: digits}}\nfactorization: {{n_components: 4, kind: {kind}}}\n{more}\n")
    return path
