"""The natural gradients of a run are those of its mean Fisher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import npeff
import pytest
import torch
from gradients.dense_definition import dense_fishers
from npeff.errors import NpeffError
from npeff.execution.serial import SerialExecutor
from npeff.gradients import GradientCollector, LabelSpec, select_parameters
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import SilentProgress
from npeff.stages.step.fisher_rows import RunRows
from npeff.training import KroneckerPreconditioner, KroneckerSums, kronecker_layers
from npeff.training.low_rank import sketched_eigenvectors
from stages.small_net import N, SmallNet, prepared
from torch import Tensor

DAMPING = 0.01


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return prepared(tmp_path_factory.mktemp("natural-gradient") / "run")


@pytest.fixture(scope="module")
def fishers() -> Tensor:
    """The Fishers (N, P, P) of all examples, by their definition."""
    task = SmallNet()
    model = task.model(Path())
    layout = select_parameters(model)
    return dense_fishers(model, task.logits, layout, [task.batch([number]) for number in range(N)])


def gradient() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = SmallNet().model(Path()).named_parameters()
    return {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in values}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def solved(fisher: Tensor) -> Tensor:
    return torch.linalg.solve(fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64), flat(gradient()))


def test_the_exact_kind_is_the_dense_solution(run: RunDirectory, fishers: Tensor) -> None:
    found = npeff.natural_gradient(run, kind="exact", damping=DAMPING, tolerance=1e-10, max_iterations=400)
    expected = solved(fishers.mean(0))
    assert float((flat(found.precondition(gradient())) - expected).norm()) <= 1e-8 * float(expected.norm())


def test_the_diagonal_kind_is_the_stored_diagonal(run: RunDirectory, fishers: Tensor) -> None:
    found = npeff.natural_gradient(run.path, kind="diagonal", damping=DAMPING).precondition(gradient())
    torch.testing.assert_close(flat(found), solved(fishers.mean(0).diagonal().diag()), rtol=1e-6, atol=0)  # a float32


def test_the_low_rank_kind_is_the_part_of_the_fisher_in_its_directions(run: RunDirectory, fishers: Tensor) -> None:
    rows = RunRows(run, SerialExecutor(), torch.ones(N, dtype=torch.bool).numpy(), SilentProgress())
    vectors_kn = sketched_eigenvectors(rows.sketched, 6)
    spans = rows.block_weighted_sums(vectors_kn)
    basis_Pk, _ = torch.linalg.qr(torch.stack([flat({name: spans[name][k] for name in spans}) for k in range(6)], 1))
    restricted = basis_Pk @ (basis_Pk.T @ fishers.mean(0) @ basis_Pk) @ basis_Pk.T
    expected = solved(restricted)
    found = npeff.natural_gradient(run, kind="low_rank", damping=DAMPING, rank=6).precondition(gradient())
    assert float((flat(found) - expected).norm()) <= 1e-8 * float(expected.norm())
    values = torch.linalg.eigvalsh(restricted)[-6:]
    best = torch.linalg.eigvalsh(fishers.mean(0))[-6:]
    assert float(values.sum()) > 0.9 * float(best.sum()), "the directions are nearly those of the largest eigenvalues"


def test_the_kfac_kind_is_that_of_all_examples_at_once(run: RunDirectory) -> None:
    task = SmallNet()
    model = task.model(Path())
    layout = select_parameters(model)
    sums = KroneckerSums.empty(kronecker_layers(model, layout), layout)
    collector = GradientCollector(model, task.logits, layout, LabelSpec())
    sums.add(collector.collect(task.batch(range(N))), torch.ones(N, dtype=torch.bool))
    expected = KroneckerPreconditioner(sums, damping=DAMPING).precondition(gradient())
    found = npeff.natural_gradient(run, kind="kfac", damping=DAMPING).precondition(gradient())
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-9, atol=0)


def test_only_marked_examples_count(run: RunDirectory, fishers: Tensor) -> None:
    used = torch.arange(N) % 3 != 0
    used[20:30] = False  # a whole shard
    rows = RunRows(run, SerialExecutor(), used.numpy(), SilentProgress())
    weights_n = torch.randn(rows.n_rows, dtype=torch.float64)
    vector = gradient()
    mean = fishers[used].mean(0)
    torch.testing.assert_close(
        flat(rows.weighted_sum(rows.products(vector))), mean @ flat(vector), rtol=1e-9, atol=1e-12
    )
    assert float(weights_n @ rows.products(vector)) == pytest.approx(
        float(flat(rows.weighted_sum(weights_n)) @ flat(vector)), rel=1e-9
    )
    torch.testing.assert_close(flat(rows.diagonal()), mean.diagonal(), rtol=1e-9, atol=0)
    assert sum(map(len, rows.sketched())) == rows.n_rows


@pytest.mark.parametrize("labels", [{"labels": "sampled", "rank": 2}, {"labels": "truncated", "rank": 2}])
def test_other_labels(labels: dict[str, Any], tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", fishers=labels)
    rows = RunRows(run, SerialExecutor(), torch.ones(N, dtype=torch.bool).numpy(), SilentProgress())
    dense = torch.stack([flat(rows.weighted_sum(row)) for row in torch.eye(rows.n_rows, dtype=torch.float64)])
    expected = solved(dense.T @ dense)
    found = npeff.natural_gradient(run, kind="exact", damping=DAMPING, tolerance=1e-10, max_iterations=400)
    assert float((flat(found.precondition(gradient())) - expected).norm()) <= 1e-8 * float(expected.norm())
    torch.testing.assert_close(flat(rows.diagonal()), dense.square().sum(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0}, "damping must be a finite number above 0, not 0"),
        ({"damping": math.nan}, "damping must be a finite number above 0"),
        ({"damping": 1, "kind": "whole"}, "kind must be one of diagonal, kfac, low_rank, exact, not 'whole'"),
        ({"damping": 1, "kind": "low_rank", "rank": 0}, "must be a whole number of at least 1, not 0"),
        ({"damping": 1, "tolerance": 2}, "tolerance must be a number between 0 and 1"),
    ],
)
def test_bad_options_are_refused(run: RunDirectory, options: dict[str, Any], said: str) -> None:
    with pytest.raises(NpeffError, match=said) as caught:
        npeff.natural_gradient(run, **options)
    assert "\n" not in str(caught.value)


def test_runs_that_do_not_fit_are_refused(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NpeffError, match=r"the gradient of '0\.bias' is missing"):
        npeff.natural_gradient(run, damping=1).precondition({"0.weight": torch.ones(8, 6)})
    monkeypatch.setattr(SmallNet, "shift", 0.1)
    with pytest.raises(NpeffError, match="another model than the one of the stored Fishers"):
        npeff.natural_gradient(run, kind="exact", damping=1).precondition(gradient())
    empirical = prepared(tmp_path / "empirical", fishers={"labels": "empirical", "diagonal": {"mean": False}})
    with pytest.raises(NpeffError, match="set allow_empirical=True"):
        npeff.natural_gradient(empirical, damping=1)
    with pytest.raises(NpeffError, match=r"has no diagonal_fisher\.safetensors: set fishers\.diagonal\.mean: true"):
        npeff.natural_gradient(empirical, kind="diagonal", damping=1, allow_empirical=True)
    empirical.record_file("fishers").unlink()
    with pytest.raises(NpeffError, match="run `npeff fishers"):
        npeff.natural_gradient(empirical, damping=1, allow_empirical=True)
