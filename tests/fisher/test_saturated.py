"""Predictions that are nearly or exactly certain: their Fishers are tiny, or zero, and are stored as such."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import LabelSpec, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from npeff.stages.fishers.worker import _stored_form
from torch import Tensor, nn

GAPS = (0.0, 20.0, 90.0, 175.0, 300.0, 400.0, 700.0, 1000.0, 30000.0)
"""Differences in nats between the largest logit and all others."""


class Certain(nn.Module):
    """Logits are the inputs' first entries, with a gap that the last entry gives."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.mix = nn.Linear(4, n_classes)
        self.n_classes = n_classes

    def forward(self, values: Tensor) -> Tensor:
        first = torch.zeros(self.n_classes, dtype=values.dtype, device=values.device)
        first[0] = 1
        return self.mix(values[:, :4]) + values[:, 4:] * first


@pytest.mark.parametrize("kind", ["exact", "sampled"])
@pytest.mark.parametrize("n_classes", [2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_gap_is_stored_with_the_norm_of_its_definition(dtype: torch.dtype, n_classes: int, kind: str) -> None:
    torch.manual_seed(0)
    model = Certain(n_classes)
    gaps = torch.tensor(GAPS)
    values = torch.cat([torch.randn(1, 4).expand(len(gaps), 4), gaps[:, None]], 1)
    layout = select_parameters(model)
    sketch, labels = make_sketch(SketchSpec("identity"), layout, 0), LabelSpec(kind, 3 if kind == "sampled" else None)
    fishers = PerExampleFishers(model.to(dtype), lambda model, batch: model(batch), layout, sketch, labels)
    batch = fishers(values.to(dtype))
    assert batch.valid_B.all()
    stored = _stored_form(batch, torch.float16, with_logits=True)
    assert all(stored[name].isfinite().all() for name in ("factors", "frobenius_norms", "grams", "logits"))
    norms_B = batch.frobenius_norms_B
    unit_B = batch.unit_factors_BRD.double()
    expected = (norms_B > 0).double()
    torch.testing.assert_close((unit_B @ unit_B.mT).flatten(1).norm(dim=1), expected, rtol=2e-2, atol=0)
    if kind == "exact":
        # F = Jᵀ S J with J = x ⊗ I, so that ‖F‖ = |x|² ‖S‖, and S is nearly ε (1 - e₀)(1 - e₀)ᵀ-like for small ε
        tolerance = 5e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3
        logits = batch.logits.double()
        p_BC = logits.softmax(-1).numpy()
        inputs = values[:, :4].to(dtype).double()
        squares = (1 + inputs.square().sum(1)).numpy()
        for p_C, square, norm in zip(p_BC, squares, norms_B.numpy(), strict=True):
            others = p_C[1:]
            covariance = np.diag(p_C) - np.outer(p_C, p_C)
            covariance[0, 0] = others.sum() * p_C[0]  # 1 - p₀ without cancellation
            size = np.linalg.norm(covariance / (others.sum() or 1.0)) * others.sum()
            assert norm == pytest.approx(square * size, rel=tolerance, abs=0)
