"""Runs of models with unusual parts: right, or refused in one line that names the cause."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import unusual_tasks
import yaml
from in_process import command
from npeff.store.fisher_store import FisherStore
from torch import nn


def run_file(folder: Path, task: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(folder / "run"),
                "task": {"name": f"unusual_tasks:{task}"},
                "fishers": {
                    "sketch": {"kind": "identity"},
                    "shard_size": 24,
                    "store_dtype": "float32",
                    "batch_size": 5,
                },
                "factorization": {"n_components": 2, "stability_examples": 0},
                "executor": {"kind": "serial"},
            }
        )
    )
    return path


def expected_norms(task: unusual_tasks.PointTask, left_out: tuple[str, ...]) -> np.ndarray:
    """Norms of the Fishers by plain autograd for one example at a time."""
    values, model = task.examples(Path()).batch(range(24)), task.model(Path()).eval()
    for tensors in (each for module in model.modules() for each in (module._parameters, module._buffers)):
        for name, value in tensors.items():
            if value is not None and value.is_inference():
                tensors[name] = nn.Parameter(value.clone())
    parameters = [value for name, value in model.named_parameters() if name not in left_out]
    norms = []
    for value in values:
        log_p = task.logits(model, value[None]).log_softmax(-1)[0]
        rows = []
        for entry in log_p:
            found = torch.autograd.grad(entry, parameters, retain_graph=True)
            flat = [(each.to_dense() if each.is_sparse else each).flatten() for each in found]
            rows.append(torch.cat(flat).double() * entry.exp().double().sqrt())
        rows_CP = torch.stack(rows).detach()
        norms.append(float((rows_CP @ rows_CP.T).norm()))
    return np.array(norms)


@pytest.mark.parametrize(
    ("task", "left_out", "tolerance"),
    [
        ("MadeUnderInferenceMode", (), 1e-5),
        pytest.param("OtherCheckpoint", (), 1e-5, marks=pytest.mark.slow),
        pytest.param("Complex", ("filter",), 1e-5, marks=pytest.mark.slow),
        ("Autocast", (), 2e-2),
        ("SparseBag", (), 1e-5),
    ],
)
def test_a_supported_model_has_the_fishers_of_plain_autograd(
    task: str, left_out: tuple[str, ...], tolerance: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("run", run_file(tmp_path, task)) == 0
    norms_N = FisherStore.open(tmp_path / "run/fishers.zarr").read_rows(range(24), ("frobenius_norms",))[
        "frobenius_norms"
    ]
    np.testing.assert_allclose(norms_N, expected_norms(getattr(unusual_tasks, task)(), left_out), rtol=tolerance)
    printed = capfd.readouterr()
    lines = (printed.out + printed.err).splitlines()
    said = [line for line in lines if line.startswith("left out of the Fishers: ")]
    assert said == [
        f"left out of the Fishers: {name} is complex64: Fishers of complex parameters are not supported"
        for name in left_out
    ]


@pytest.mark.parametrize(
    ("task", "cause"),
    [
        ("Scripted", "module '' is a TorchScript module, whose layers cannot be observed: return the original Python"),
        (
            "ReentrantCheckpoint",
            "the backward pass of the model fails (When use_reentrant=True, torch.utils.checkpoint",
        ),
        ("Dropout", "the logits differ between two passes over the same batch, because of dropout or another random"),
        ("BagByFrequency", "an embedding with scale_grad_by_freq divides gradients by the number of occurrences"),
        ("BatchStatistics", "the logits of an example depend on the other examples in its batch"),
    ],
)
def test_any_other_model_is_refused_with_its_cause(
    task: str, cause: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("fishers", run_file(tmp_path, task)) == 2
    assert cause in capfd.readouterr().err.splitlines()[-1]
