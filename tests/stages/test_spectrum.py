"""The spectrum of a softmax regression, whose mean Fisher has a closed form."""

from __future__ import annotations

from pathlib import Path

import npeff
import numpy as np
import pytest
import torch
from npeff.fisher.spectrum import spectrum_statistics
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.store.tables import read_table
from stages.linear_digits import LinearDigits, N

INVALID = (3, 77)
P = 64 * 10 + 10


class SomeInvalidDigits(LinearDigits):
    """Some examples have pixels that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self._pixels[list(INVALID), 5] = float("nan")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    document = {
        "run_dir": str(tmp_path_factory.mktemp("spectrum") / "run"),
        "task": {"name": "stages.test_spectrum:SomeInvalidDigits"},
        "fishers": {"sketch": {"kind": "identity"}, "store_dtype": "float32", "diagonal": {"mean": True}},
        "factorization": {"n_components": 3},
        "executor": {"kind": "serial"},
    }
    made = RunDirectory.create(RunConfig.model_validate(document))
    npeff.compute_fishers(made)
    npeff.spectrum(made)
    return made


@pytest.fixture(scope="module")
def inputs_and_labels(run: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    """The inputs (n, 65), with a one for the bias, and S_i = diag(p) − p pᵀ (n, 10, 10) of the valid examples."""
    task = LinearDigits()
    pixels = np.delete(task.batch(range(N)).double().numpy(), INVALID, axis=0)
    with torch.no_grad():
        p_nC = task.model(Path()).double()(torch.from_numpy(pixels)).softmax(1).numpy()
    s_nCC = p_nC[:, :, None] * np.eye(10) - p_nC[:, :, None] * p_nC[:, None, :]
    return np.column_stack([pixels, np.ones(len(pixels))]), s_nCC


def test_the_mean_fisher_is_the_closed_form(
    run: RunDirectory, inputs_and_labels: tuple[np.ndarray, np.ndarray]
) -> None:
    x_nE, s_nCC = inputs_and_labels
    outer_nEE = x_nE[:, :, None] * x_nE[:, None, :]
    mean_CCEE = np.tensordot(s_nCC, outer_nEE, axes=(0, 0)) / len(x_nE)
    mean_PP = mean_CCEE.transpose(0, 2, 1, 3).reshape(P, P)  # the mean of S_i ⊗ x_i x_iᵀ
    expected = np.linalg.eigvalsh(mean_PP)[::-1]
    found = read_table(run.table("spectrum"), "spectrum")["eigenvalue"].to_numpy()
    assert len(found) == P == len(expected)
    assert found == pytest.approx(expected, abs=2e-6 * expected[0])
    n = N - len(INVALID)
    rows = read_table(run.table("spectrum_statistics"), "spectrum_statistics").to_pylist()
    values = {row["name"]: row["value"] for row in rows if row["n_examples"] == n and row["parameter_group"] is None}
    for name, value in spectrum_statistics(np.maximum(expected, 0), n, P).items():
        assert values[name] == pytest.approx(value, rel=1e-4), name
    norms = np.linalg.norm(s_nCC, axis=(1, 2)) * np.square(x_nE).sum(1)
    assert values["mean_squared_norm"] == pytest.approx(np.square(norms).mean(), rel=1e-5)
    assert {row["labels"] for row in rows} == {"exact"}


def test_traces_of_layers_are_exact(run: RunDirectory, inputs_and_labels: tuple[np.ndarray, np.ndarray]) -> None:
    x_nE, s_nCC = inputs_and_labels
    traces_n = np.trace(s_nCC, axis1=1, axis2=2)
    rows = read_table(run.table("spectrum_statistics"), "spectrum_statistics").to_pylist()
    found = {row["parameter_group"]: row["value"] for row in rows if row["parameter_group"] is not None}
    weight = (traces_n * np.square(x_nE[:, :-1]).sum(1)).mean()
    assert found == pytest.approx({"weight": weight, "bias": traces_n.mean()}, rel=1e-5)
