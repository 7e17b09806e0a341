"""The time of a step, and the agreement with pytorch_optimizer."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from npeff.training import FAdam
from torch import nn

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072), (7300, 384), (1000, 768), (768,), (3072,), (384,)]
"""Of a Transformer: 10.7 million entries."""
ROUNDS = 15


def measured(other: type | None) -> dict[str, Any]:
    """Times of a step in alternating rounds, and the largest difference to the other FAdam after 20 steps."""
    made: dict[str, Any] = {
        "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "FAdam": lambda p: FAdam(p, lr=1e-3),
        "FAdam, no decay": lambda p: FAdam(p, lr=1e-3, weight_decay=0),
    }
    if other is not None:
        made["FAdam of pytorch_optimizer"] = lambda p: other(p, lr=1e-3)
    optimizers = {name: make(_with_gradients()) for name, make in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(ROUNDS + 2):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    n = sum(parameter.numel() for parameter in _with_gradients())
    base = seconds["AdamW, foreach"]
    found = {"n_parameters": n, "difference": None if other is None else _difference(other), "ms": {}, "relative": {}}
    for name, values in seconds.items():
        ratios = [value / reference for value, reference in zip(values, base, strict=True)]
        found["ms"][name] = 1e3 * statistics.median(values)
        found["relative"][name] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def _with_gradients() -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
    for parameter in made:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return made


def _difference(other: type) -> float:
    """In float64, without decay, after 20 steps."""
    both = []
    for make in (FAdam, other):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).double()
        dtypes = {} if make is FAdam else {"momentum_dtype": torch.float64, "fim_dtype": torch.float64}
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.0, **dtypes)
        for step in range(20):
            optimizer.zero_grad()
            inputs = torch.randn(16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            model(inputs).square().sum().backward()
            optimizer.step()
        both.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    return float((both[0] - both[1]).abs().max())
