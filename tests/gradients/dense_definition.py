"""The slow definitions that the fast paths are held to: plain autograd, one example and one class at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from npeff.gradients import ParameterLayout
from torch import Tensor, nn


def dense_jacobian(
    model: nn.Module, logits_fn: Callable[[nn.Module, Any], Tensor], layout: ParameterLayout, example: Any
) -> tuple[Tensor, Tensor]:
    """Logits (C,) and their Jacobian (C, P) for a batch of one example."""
    training = model.training
    model.eval()
    named = dict(model.named_parameters())
    parameters = [named[name] for name in layout.names]
    logits = logits_fn(model, example)[0]
    rows = []
    for logit in logits:
        found = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    model.train(training)
    return logits.detach(), torch.stack(rows)


def dense_fishers(
    model: nn.Module, logits_fn: Callable[[nn.Module, Any], Tensor], layout: ParameterLayout, examples: Sequence[Any]
) -> Tensor:
    """(N, P, P) float64: E_y[∇log p(y) ∇log p(y)ᵀ] summed over the classes y."""
    fishers = []
    for example in examples:
        logits, jacobian_CP = dense_jacobian(model, logits_fn, layout, example)
        p = torch.softmax(logits.double(), dim=0)
        scores_CP = jacobian_CP.double() - p @ jacobian_CP.double()
        fishers.append(torch.einsum("y,yp,yq->pq", p, scores_CP, scores_CP))
    return torch.stack(fishers)
