"""The stages' results do not depend on who computes them: on shards, workers, batches, interruptions, or bad examples.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from end_to_end.nan_digits import DAMAGED
from npeff.cli import main as cli
from npeff.execution.create import make_executor
from npeff.execution.executor import Executor, WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.factorization import ExampleShard, SolverOptions, initial_state, match_components, solve
from npeff.factorization.estimator import NPEFF
from npeff.models.loaded import ModelSpec
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import SilentProgress
from npeff.stages.factorize.driver import run_solver
from npeff.stages.factorize.worker import SolverWorker
from npeff.stages.fishers.tables import held_out
from npeff.stages.fitted_examples import FittedExamples
from npeff.stages.status import status
from npeff.stages.verify.options import VerificationOptions, VerificationPaths
from npeff.stages.verify.worker import VerificationWorker
from npeff.store.checkpoint import CheckpointStore, write_checkpoint_array
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from npeff.store.tables import read_table
from npeff.tasks import load_task
from places import write_configuration
from planted import Planted, planted_fishers
from planted_run import SIGNATURE, planted_run
from safetensors.torch import load_file
from scipy import stats

pytestmark = pytest.mark.ray

HELD_OUT = 0.2


def prepared(path: Path, planted: Planted, n_shards: int) -> RunDirectory:
    options = {"held_out_fraction": HELD_OUT, "tolerance": 1e-8, "checkpoint_every": 2}
    return planted_run(path, planted, -(-len(planted.factors_NRD) // n_shards), factorization=options)


@pytest.fixture(scope="module")
def three_actors() -> Iterator[Executor]:
    with make_executor(
        "ray", address="local", workers=3, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=120.0
    ) as executor:
        yield executor


def actors(n: int, of: Executor) -> Executor:
    """The first ``n`` actors of an executor that somebody else closes."""
    fewer = copy.copy(of)
    fewer.workers = n
    return fewer


class Interrupted(Exception):
    pass


class Progress(SilentProgress):
    """Keeps what is said, and interrupts the stage at a given number of finished units."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.said: list[str] = []
        self._interrupt_at = interrupt_at

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
        def tick(done: int, fact: str = "", last: bool = False, **numbers: float) -> None:
            if done == self._interrupt_at:
                raise Interrupted

        yield tick

    def say(self, message: str) -> None:
        self.said.append(message)


# --- Factorization of planted Fishers ---------------------------------------------------------------------------------


def planted(seed: int) -> Planted:
    """2,000 examples to fit and 500 held-out ones."""
    return planted_fishers(n_examples=2500, rank=3, dim=256, n_components=16, noise=0.05, seed=seed)


def solved(run: RunDirectory) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Components, coefficients and history of a factorized run."""
    stored = open_factorization(run.factorization)
    history = read_table(run.table("history"), "history").drop_columns("seconds").to_pylist()
    return stored.read_components(), stored.read_coefficients(), history


def assert_loss_never_rises(run: RunDirectory) -> None:
    history = read_table(run.table("history"), "history").to_pylist()
    accepted = [row["loss"] for row in history if row["accepted"]]
    assert len(accepted) >= 3
    assert accepted == sorted(accepted, reverse=True)


def dense_loss(factors_NRD: np.ndarray, components_KD: np.ndarray, coefficients_NK: np.ndarray) -> float:
    """Σ_i ‖Â_iᵀ Â_i − Σ_j W_ij h_j h_jᵀ‖² by its definition, in float64."""
    h_KD, total = torch.from_numpy(components_KD), 0.0
    for a_BRD, w_BK in zip(
        torch.from_numpy(factors_NRD).double().split(250),
        torch.from_numpy(coefficients_NK).double().split(250),
        strict=True,
    ):
        fitted_BDD = (w_BK[:, :, None] * h_KD).mT @ h_KD
        total += float((a_BRD.mT @ a_BRD - fitted_BDD).square().sum())
    return total


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Planted components of seed 0, factorized in this process from one shard."""
    run = prepared(tmp_path_factory.mktemp("reference") / "run", planted(0), n_shards=1)
    npeff.factorize(run)
    return run


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_planted_components_are_recovered_as_in_memory(seed: int, tmp_path: Path) -> None:
    truth = planted(seed)
    run = prepared(tmp_path / "run", truth, n_shards=2)
    summary = npeff.factorize(run)
    components_KD, coefficients_NK, _ = solved(run)
    assert match_components(components_KD, truth.components_KD)[1].mean() >= 0.99
    assert summary["n_fit"] == 2000
    assert summary["stopped"] == "converged"
    assert_loss_never_rises(run)

    factors_NRD, held_out_N = truth.factors_NRD.astype(np.float32), held_out(2500, HELD_OUT, seed=0)
    estimator = NPEFF(16, tol=1e-8, random_state=seed, normalize=False).fit(factors_NRD[~held_out_N])
    assert summary["loss"] == pytest.approx(estimator.loss_, rel=1e-6)
    assert summary["explained"] == pytest.approx(estimator.explained_, rel=1e-6)
    assert dense_loss(factors_NRD[~held_out_N], components_KD, coefficients_NK[~held_out_N]) == pytest.approx(
        summary["loss"], rel=1e-8
    )
    matched = match_components(components_KD, estimator.components_)[0]
    np.testing.assert_allclose(
        coefficients_NK[held_out_N][:, matched[:, 0]],
        estimator.transform(factors_NRD[held_out_N])[:, matched[:, 1]],
        atol=2e-4,
    )
    estimator.components_ = components_KD
    np.testing.assert_allclose(coefficients_NK[held_out_N], estimator.transform(factors_NRD[held_out_N]), atol=1e-6)


@pytest.fixture(scope="module")
def undisturbed(three_actors: Executor, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Planted components of seed 0, factorized by two actors from five shards."""
    run = prepared(tmp_path_factory.mktemp("undisturbed") / "run", planted(0), n_shards=5)
    npeff.factorize(run, executor=actors(2, three_actors))
    return run


def assert_same_solution(run: RunDirectory, reference: RunDirectory) -> None:
    """Equal to rounding, as sums in another order are."""
    summary, expected = run.record("factorize"), reference.record("factorize")
    assert summary is not None
    assert expected is not None
    assert summary["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert summary["explained_held_out"] == pytest.approx(expected["explained_held_out"], rel=1e-6)
    components_KD, coefficients_NK, _ = solved(run)
    np.testing.assert_allclose(components_KD, solved(reference)[0], atol=1e-5)
    np.testing.assert_allclose(coefficients_NK, solved(reference)[1], atol=1e-4)
    assert match_components(components_KD, planted(0).components_KD)[1].mean() >= 0.99
    assert_loss_never_rises(run)


def test_two_actors_find_what_one_process_does(undisturbed: RunDirectory, reference: RunDirectory) -> None:
    assert_same_solution(undisturbed, reference)


def test_shards_do_not_matter(reference: RunDirectory, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", planted(0), n_shards=5)
    npeff.factorize(run)
    assert_same_solution(run, reference)


@pytest.mark.slow
def test_more_workers_than_shards_do_no_harm(reference: RunDirectory, three_actors: Executor, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", planted(0), n_shards=2)
    npeff.factorize(run, executor=three_actors)
    assert_same_solution(run, reference)


@pytest.mark.slow  # tests/stages/test_solver_workers.py has the same without Ray
def test_an_interrupted_run_goes_on_from_its_checkpoint(
    undisturbed: RunDirectory, three_actors: Executor, tmp_path: Path
) -> None:
    run = prepared(tmp_path / "run", planted(0), n_shards=5)
    two = actors(2, three_actors)
    with pytest.raises(Interrupted):
        npeff.factorize(run, executor=two, progress=Progress(interrupt_at=5))
    assert run.record("factorize") is None
    other = RunDirectory(tmp_path / "other", run.config)
    shutil.copytree(run.path, other.path)

    progress = Progress()
    npeff.factorize(run, executor=two, progress=progress)
    assert "resuming from iteration 4" in progress.said
    for mine, theirs in zip(solved(run), solved(undisturbed), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert len(solved(run)[2]) > 8, "there was enough left to do"

    progress = Progress()
    npeff.factorize(other, executor=SerialExecutor(), progress=progress)
    assert "resuming from iteration 4" in progress.said
    assert solved(other)[2][:4] == solved(undisturbed)[2][:4]
    assert_same_solution(other, undisturbed)


@pytest.mark.slow
def test_a_dead_component_is_reseeded_from_the_worst_example_of_all_workers(
    three_actors: Executor, tmp_path: Path
) -> None:
    """The run starts from a checkpoint with a component outside the span of the data, which no example can use."""
    truth = planted_fishers(n_examples=300, rank=3, dim=24, n_components=6, noise=0.05, seed=0, n_active=3)
    factors_NRD = np.pad(truth.factors_NRD, ((0, 0), (0, 0), (0, 1)))
    start_KD = np.pad(truth.components_KD, ((0, 0), (0, 1)))
    start_KD[2] = np.eye(25)[24]
    run = prepared(tmp_path / "run", Planted(factors_NRD, start_KD, truth.coefficients_NK), n_shards=4)
    options = SolverOptions(n_components=6, tolerance=1e-8)
    fit_N = ~held_out(300, HELD_OUT, seed=0)

    store = FisherStore.open(run.fishers)
    checkpoints = CheckpointStore(run.checkpoints, config_hash="mine")
    folder = checkpoints.begin(0)
    for shard, (first, last) in enumerate(store.plan):
        write_checkpoint_array(folder, f"coefficients/{shard:05d}", np.zeros((fit_N[first:last].sum(), 6), np.float32))
    state = initial_state(torch.from_numpy(start_KD), options)
    checkpoints.commit(0, {**state.to_arrays(), "history": np.empty((0, 8))})
    arguments = {
        "examples": FittedExamples(run.fishers, run.table("examples")),
        "options": options,
        "device": "cpu",
        "timeout_s": 60.0,
        "memory_limit_bytes": 2**30,
    }
    records = ShardRecords(run.shard_records, SIGNATURE).complete()
    outcome = run_solver(
        actors(2, three_actors),
        WorkerSpec(SolverWorker, arguments),
        checkpoints,
        {shard: record.checksum for shard, record in records.items()},
        checkpoint_every=100,
        on_iteration=lambda row: None,
        on_event=lambda message: None,
    )
    in_memory = solve([ExampleShard(factors_NRD[fit_N].astype(np.float32))], torch.from_numpy(start_KD), options)
    first, second = outcome.results
    assert outcome.history[0]["n_dead"] == 1
    assert outcome.history[-1]["n_dead"] == 0
    assert match_components(first.components_KD[:, :24], truth.components_KD)[1].min() > 0.99
    assert first.loss == pytest.approx(in_memory.loss, rel=1e-6)
    np.testing.assert_array_equal(first.components_KD, second.components_KD)
    assert sorted([*first.coefficients, *second.coefficients]) == [0, 1, 2, 3]


# --- The digits, from images to verified directions ------------------------------------------------------------------


def digits(
    path: Path,
    task: str = "digits",
    limit: int = 200,
    factorization: dict[str, Any] | None = None,
    direction: str = "whitened",
    **fishers: Any,
) -> RunDirectory:
    config = {
        "run_dir": str(path),
        "task": {"name": task, "options": {"limit": limit, "epochs": 4}},
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 512}, "shard_size": 64, **fishers},
        "factorization": {"n_components": 4, **(factorization or {})},
        "lift": {"direction": direction},
        "verification": {"top_examples": 8, "baseline_examples": 20},
        "executor": {"kind": "serial"},
    }
    return RunDirectory.create(RunConfig.model_validate(config))


def stored_files(run: RunDirectory) -> dict[str, bytes]:
    return {str(path.relative_to(run.fishers)): path.read_bytes() for path in run.fishers.rglob("*") if path.is_file()}


def stored_arrays(run: RunDirectory) -> dict[str, np.ndarray]:
    store = FisherStore.open(run.fishers)
    return store.read_rows(np.arange(store.plan.n_examples))


def test_the_stored_fishers_are_the_same_bits_whoever_computes_them(three_actors: Executor, tmp_path: Path) -> None:
    serial = digits(tmp_path / "serial")
    npeff.compute_fishers(serial)
    expected = stored_files(serial)
    assert sum(map(len, expected.values())) > 200 * 9 * 512 * 2, "all of the factors are there"
    for n in (1, 2):
        run = digits(tmp_path / f"{n} actors")
        npeff.compute_fishers(run, executor=actors(n, three_actors))
        assert stored_files(run) == expected
        assert read_table(run.table("examples"), "examples") == read_table(serial.table("examples"), "examples")


@pytest.mark.parametrize(
    "sketch",
    [pytest.param({"kind": "identity"}, marks=pytest.mark.slow), {"kind": "tensorsketch", "dim": 1024}],
)
def test_batches_do_not_matter(sketch: dict[str, Any], tmp_path: Path) -> None:
    runs = {
        batch_size: digits(
            tmp_path / f"{batch_size}", limit=50, sketch=sketch, batch_size=batch_size, store_dtype="float32"
        )
        for batch_size in (1, 7, 32)
    }
    for run in runs.values():
        npeff.compute_fishers(run)
    arrays = {batch_size: stored_arrays(run) for batch_size, run in runs.items()}
    for batch_size in (7, 32):
        for name, expected in arrays[1].items():
            scale = np.abs(expected).max()
            np.testing.assert_allclose(arrays[batch_size][name], expected, rtol=1e-4, atol=2e-5 * scale, err_msg=name)
    if sketch["kind"] == "identity":
        factors_NRD = arrays[32]["factors"].astype(np.float64)
        grams_NRR = factors_NRD @ factors_NRD.transpose(0, 2, 1) * arrays[32]["frobenius_norms"][:, None, None]
        scale = np.abs(grams_NRR).max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(arrays[32]["grams"] / scale, grams_NRR / scale, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(arrays[32]["grams"], axis=(1, 2)), arrays[32]["frobenius_norms"])


def test_an_invalid_example_is_left_out_and_harms_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, run = digits(tmp_path / "sound", limit=80), digits(tmp_path / "run", "end_to_end.nan_digits:NanDigits", 80)
    npeff.compute_fishers(sound)
    progress = Progress()
    summary = npeff.compute_fishers(run, progress=progress)
    assert summary["n_invalid"] == 1
    assert progress.said == ["1 of 80 examples have non-finite logits or gradients and are excluded"]
    assert status(run)[0].details == "80 examples, 1 invalid, rank 9"
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(run.path)])
    assert not ended.value.code
    assert "1 invalid" in capsys.readouterr().out

    arrays, expected = stored_arrays(run), stored_arrays(sound)
    assert np.flatnonzero(~arrays["valid"]).tolist() == [DAMAGED]
    assert expected["valid"].all()
    others = np.arange(80) != DAMAGED
    for name in arrays:  # equal but for rounding: how a batch is sketched depends on how much of it is live
        atol = 1e-3 * np.nanmax(np.abs(expected[name].astype(np.float64)), initial=0)
        np.testing.assert_allclose(
            arrays[name][others].astype(np.float64), expected[name][others].astype(np.float64), atol=atol, err_msg=name
        )

    for stage in (npeff.factorize, npeff.lift, npeff.verify):
        stage(run)
    coefficients_NK = open_factorization(run.factorization).read_coefficients()
    assert np.isnan(coefficients_NK).all(axis=1).nonzero()[0].tolist() == [DAMAGED]
    assert np.isfinite(coefficients_NK[others]).all()
    for name in ("coefficients", "top_examples"):
        listed = read_table(run.table(name), name)["example"].to_pylist()
        assert DAMAGED not in listed
        assert len(listed) > 30
    rows = read_table(run.table("verification"), "verification").to_pylist()
    assert len(rows) == 4 * 2 * 2
    assert all(np.isfinite(row["kl_ratio_matched"]) for row in rows if row["informative"])
    assert str(npeff.report(run)).endswith("index.html")


@pytest.fixture(scope="module")
def converged(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Digits in full coordinates, factorized until nothing moves any more, lifted and verified."""
    run = digits(
        tmp_path_factory.mktemp("converged") / "run",
        limit=100,
        factorization={"tolerance": 1e-12, "max_iterations": 400},
        direction="own",
        sketch={"kind": "identity"},
        store_dtype="float32",
    )
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift, npeff.verify):
        stage(run)
    return run


@pytest.mark.slow
def test_without_a_sketch_the_lifted_directions_are_the_components(converged: RunDirectory) -> None:
    record = converged.record("factorize")
    assert record is not None
    assert record["stopped"] == "converged"
    layout = FisherStore.open(converged.fishers).attrs["parameter_layout"]["names"]
    directions = DirectionStore.open(converged.directions)
    flat_KP = np.stack(
        [np.concatenate([directions.read(k)[name].ravel() for name in layout]) for k in range(4)], dtype=np.float64
    )
    cosines_K = (flat_KP * open_factorization(converged.factorization).read_components()).sum(axis=1)
    np.testing.assert_allclose(np.linalg.norm(flat_KP, axis=1), 1, rtol=1e-5)
    assert cosines_K.min() >= 1 - 1e-5
    components = read_table(converged.table("components"), "components")
    np.testing.assert_allclose(components["lift_cosine"].to_numpy(), cosines_K, atol=1e-6)
    energy = read_table(converged.table("layer_energy"), "layer_energy")
    assert energy["parameter"].to_pylist() == 4 * layout
    np.testing.assert_allclose(energy["energy"].to_numpy().reshape(4, -1).sum(axis=1), 1)


def test_a_direction_is_exported_under_the_parameters_names(
    converged: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(*arguments: str) -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(converged.path), str(tmp_path / "d.safetensors"), *arguments])
        return ended.value.code

    assert export("--what", "direction", "--component", "2") in (0, None)
    found, expected = load_file(tmp_path / "d.safetensors"), DirectionStore.open(converged.directions).read(2)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), values)
    for mistake in (["--what", "direction"], ["--component", "2"], ["--what", "direction", "--component", "4"]):
        assert export(*mistake) == 2
    assert "has no component 4: choose one of 0 to 3" in capsys.readouterr().err


def test_every_component_is_verified_in_both_signs_on_both_splits_with_controls(converged: RunDirectory) -> None:
    rows = read_table(converged.table("verification"), "verification").to_pylist()
    assert [(row["component"], row["examples"], row["sign"]) for row in rows] == [
        (component, examples, sign) for component in range(4) for examples in ("fit", "held_out") for sign in (1, -1)
    ]
    assert sum(row["informative"] for row in rows) == 8
    for row in rows:
        optional = ("examples", "kl_correlation", "other_kl_ratio_checked", "flip_from", "flip_to")
        measured = {name: value for name, value in row.items() if name not in optional}
        if row["informative"]:
            assert all(value is not None and np.isfinite(value) for value in measured.values())
            assert row["kl_ratio"] == pytest.approx(row["kl_top"] / row["kl_baseline"])
            assert row["kl_ratio_low"] <= row["kl_ratio"] <= row["kl_ratio_high"]
            assert row["target_kl"] == 0.1
        else:
            assert row["kl_ratio"] is None
            assert row["target_kl"] <= 0.1
        assert (row["kl_correlation"] is None) == (row["examples"] == "fit")
        assert row["n_baseline"] == 20
        assert 1 <= row["n_top"] <= 8
        assert 1 <= row["n_matched"] <= 3 * row["n_top"]
        assert row["other_component"] != row["component"]
        assert row["fisher_norm_ratio"] > 0
        if row["reached_target"]:
            assert row["kl_ratio_matched"] == pytest.approx(row["kl_top"] / row["kl_matched"])
            assert row["random_kl_ratio"] == pytest.approx(row["random_kl_top"] / row["random_kl_baseline"])
            assert row["other_kl_ratio"] == pytest.approx(row["other_kl_top"] / row["other_kl_baseline"])
            assert row["kl_ratio_matched_low"] <= row["kl_ratio_matched"] <= row["kl_ratio_matched_high"]
            assert row["kl_top"] == pytest.approx(row["target_kl"], rel=0.151)
    assert sum(row["reached_target"] for row in rows) >= 12


def test_selectivity_and_correlation_are_by_their_definition(converged: RunDirectory) -> None:
    """Moved along every direction by the step of its own verification, with nothing of the workers' code.

    Most of the stored values are predicted. Those that were measured, too, are compared without a tolerance for this.
    """
    task = load_task(converged.config.task.name, converged.config.task.options)
    model, examples = task.model(converged.task_cache), task.examples(converged.task_cache)
    held_out = np.flatnonzero(np.array(read_table(converged.table("examples"), "examples")["split"]) == "held_out")
    coefficients_NK = open_factorization(converged.factorization).read_coefficients()
    directions = DirectionStore.open(converged.directions)
    rows = read_table(converged.table("verification"), "verification").to_pylist()
    matrix = read_table(converged.table("selectivity"), "selectivity").to_pylist()

    def log_p() -> torch.Tensor:
        with torch.no_grad():
            return task.logits(model, examples.batch(range(100))).double().log_softmax(-1)

    before, n_checked = log_p(), 0
    for row in rows:
        if row["examples"] == "fit":
            continue
        with torch.no_grad():
            kept = {name: value.clone() for name, value in model.state_dict().items()}
            for name, value in directions.read(row["component"]).items():
                model.get_parameter(name).add_(torch.from_numpy(value), alpha=row["sign"] * row["epsilon"])
        after = log_p()
        model.load_state_dict(kept)
        kl_N = (after.exp() * (after - before)).sum(-1).numpy()
        rank = stats.spearmanr(coefficients_NK[held_out, row["component"]], kl_N[held_out]).statistic
        assert row["kl_correlation"] == pytest.approx(rank, abs=0.1)
        found = {m["component"]: m for m in matrix if (m["moved"], m["sign"]) == (row["component"], row["sign"])}
        assert sorted(found) == list(range(4))
        for component, entry in found.items():
            w_n = coefficients_NK[held_out, component]
            top = held_out[np.argsort(-w_n, kind="stable")[: min(8, (w_n > 0).sum())]]
            assert (entry["n_examples"], entry["examples"]) == (len(top), "held_out")
            assert entry["kl"] == pytest.approx(kl_N[top].mean(), rel=0.3, abs=2e-3)
            if entry["kl_checked"] is not None:
                n_checked += 1
                assert entry["kl_checked"] == pytest.approx(kl_N[top].mean(), rel=1e-3)
    assert n_checked == 2 * 4, "one sign of two components"


def test_a_fixed_step_is_taken_by_every_direction(converged: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(converged.path, tmp_path / "run")
    document = converged.config.model_dump() | {"run_dir": str(tmp_path / "run")}
    document["verification"] |= {"epsilon": 0.05, "selectivity_examples": 0, "correlation_examples": 0}
    write_configuration(tmp_path / "run", RunConfig.model_validate(document))
    run = RunDirectory.open(tmp_path / "run")
    run.reopen("verify")
    shutil.rmtree(run.partial_results("verify"))
    npeff.verify(run)
    rows = read_table(run.table("verification"), "verification").to_pylist()
    assert {row[name] for row in rows for name in ("epsilon", "random_epsilon", "other_epsilon")} == {0.05}
    assert len({row["kl_top"] for row in rows}) == len(rows)
    assert all(row["reached_target"] and row["kl_correlation"] is None for row in rows)
    assert not len(read_table(run.table("selectivity"), "selectivity"))


def test_verifying_leaves_the_parameters_as_they_were(converged: RunDirectory, tmp_path: Path) -> None:
    """A worker that has verified nothing before finds the same as the one that verified every component in a row."""
    task = converged.config.task
    worker = VerificationWorker(
        ModelSpec(task.name, task.options, converged.task_cache, ("*",), (), "cpu"),
        VerificationPaths.of(converged, tmp_path),
        VerificationOptions(
            n_top=8,
            n_baseline=20,
            target_kl=0.1,
            epsilon=None,
            n_selectivity=8,
            n_correlation=500,
            seed=0,
            batch_size=32,
        ),
    )
    rows = read_table(converged.table("verification"), "verification").to_pylist()
    for component in (3, 0):
        assert worker.verify(component) == [row for row in rows if row["component"] == component]
