"""The update rules of the method's published implementation (NPEFF reference, 2023), as an opponent.

W starts uniform in [0, 1), G normal with variance 2/(K·D). First `G_ONLY` iterations change G alone; a joint one is

    W ← W ∘ T / (W (GGᵀ)^∘2 + 1e-9),  T_ij = ‖Â_i g_j‖²        (multiplicative; keeps W ≥ 0)
    G ← G − 4·lr·{[(WᵀW) ∘ (GGᵀ)] G − Σ_i (W_i ∘ Â_i Gᵀ)ᵀ Â_i}  (a gradient step)

without line search or stopping rule. Both updates of an iteration share Â Gᵀ, so that one costs the same two products
as a pass of this project's solver, in float32 and blocks of the same size alike: written to be as fast as it can be.

Shapes: N examples, B examples of a block, R rank, D sketch, K components.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from npeff.factorization import BLOCK_ROWS
from torch import Tensor

G_ONLY = 100
STEP_SIZES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class ReferenceRun:
    step_size: float
    loss: float
    """After the last pass; infinite where the updates diverged."""
    cpu_s: float
    """Of the passes, without the evaluation of the loss."""
    passes: int


def best_reference_run(factors_NRD: Tensor, n_components: int, passes: int, seed: int) -> list[ReferenceRun]:
    """A run with each step size, the best first; with smaller ones, a third each time, if all of these diverge."""
    runs = [reference_run(factors_NRD, n_components, passes, seed, size) for size in STEP_SIZES]
    while not any(math.isfinite(run.loss) for run in runs) and runs[-1].step_size > 1e-6:
        smaller = min(run.step_size for run in runs) / 3
        runs.append(reference_run(factors_NRD, n_components, passes, seed, smaller))
    return sorted(runs, key=lambda run: run.loss)


def reference_run(factors_NRD: Tensor, n_components: int, passes: int, seed: int, step_size: float) -> ReferenceRun:
    """The iterations above, `passes` in all."""
    n, _, dim = factors_NRD.shape
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.rand(n, n_components, generator=generator)
    g_KD = torch.randn(n_components, dim, generator=generator) * math.sqrt(2 / (n_components * dim))
    began = time.process_time()
    for done in range(passes):
        _pass_(factors_NRD, w_NK, g_KD, step_size, joint=done >= G_ONLY)
        if not bool(torch.isfinite(g_KD).all()):
            return ReferenceRun(step_size, math.inf, time.process_time() - began, done + 1)
    cpu_s = time.process_time() - began
    loss = reference_loss(factors_NRD, w_NK, g_KD)
    total = float(_fisher_squares(factors_NRD))
    # a factorization worse than none at all has diverged, if not yet to infinity
    return ReferenceRun(step_size, loss if loss < 1e3 * total else math.inf, cpu_s, passes)


def reference_loss(factors_NRD: Tensor, w_NK: Tensor, g_KD: Tensor) -> float:
    """Σ_i ‖F̂_i − Σ_j W_ij g_j g_jᵀ‖² in float64."""
    g_KD, wt = g_KD.double(), 0.0
    for rows_BRD, w_BK in zip(_blocks(factors_NRD), _blocks(w_NK, factors_NRD.shape[1]), strict=True):
        wt += float(((rows_BRD.double() @ g_KD.T).square().sum(dim=1) * w_BK.double()).sum())
    w_NK = w_NK.double()
    fitted = float(((w_NK.T @ w_NK) * (g_KD @ g_KD.T).square()).sum())
    return float(_fisher_squares(factors_NRD)) - 2 * wt + fitted


def _pass_(factors_NRD: Tensor, w_NK: Tensor, g_KD: Tensor, step_size: float, *, joint: bool) -> None:
    gram_KK = g_KD @ g_KD.T
    squared_KK = gram_KK.square()
    pulled_KD = torch.zeros_like(g_KD)
    for rows_BRD, w_BK in zip(_blocks(factors_NRD), _blocks(w_NK, factors_NRD.shape[1]), strict=True):
        rows = rows_BRD.reshape(-1, rows_BRD.shape[2])
        b_KBR = (g_KD @ rows.T).view(len(g_KD), *rows_BRD.shape[:2])
        if joint:
            w_BK.mul_(b_KBR.square().sum(dim=2).T / (w_BK @ squared_KK + 1e-9))
        pulled_KD += (w_BK.T[:, :, None] * b_KBR).reshape(len(g_KD), -1) @ rows
    g_KD -= 4 * step_size * (((w_NK.T @ w_NK) * gram_KK) @ g_KD - pulled_KD)


def _fisher_squares(factors_NRD: Tensor) -> Tensor:
    return torch.stack([(rows.double() @ rows.double().mT).square().sum() for rows in _blocks(factors_NRD)]).sum()


def _blocks(examples: Tensor, rank: int | None = None) -> tuple[Tensor, ...]:
    return examples.split(max(1, BLOCK_ROWS["cpu"] // (rank or examples.shape[1])))
