"""How much CPU time it takes to come to the loss that the reference's updates have after 300 passes, one thread.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.factorization import (
    ExampleShard,
    Factorization,
    IterationRecord,
    SolverOptions,
    SolverState,
    match_components,
    solve,
    starting_components,
)
from npeff.models.batch_size import peak_bytes
from planted import HARD_PROBLEMS, hard_problem
from torch import Tensor

from solver_stage.minilm_fishers import minilm_factors
from solver_stage.reference_updates import best_reference_run

ROUNDS = 5
"""Of the way to the reference's loss, which takes a second: the median counts. The reference takes half a minute."""
WANTED = {"shared direction": 15}
"""Times less CPU time than the reference; 4 in the other planted problems, 30 on MiniLM/SICK."""


def planted(seeds: int, tiny: bool) -> dict[str, Any]:
    """The planted problems: CPU time, passes, loss beside the best found, components beside the true ones."""
    changes: dict[str, float] = {"n_examples": 400, "dim": 96, "n_components": 12} if tiny else {}
    _title("planted")
    found: dict[str, Any] = {}
    for name in HARD_PROBLEMS:
        found[name] = []
        for seed in range(seeds):
            problem, n_fitted = hard_problem(name, seed, **changes)
            factors_NRD = torch.from_numpy(problem.factors_NRD).float()
            row = race(factors_NRD, n_fitted, seed, passes=120 if tiny else 300)
            if n_fitted == len(problem.components_KD):
                oracle = _solved(factors_NRD, torch.from_numpy(problem.components_KD), n_fitted, seed)
                row["loss_from_the_true_components"] = oracle.loss
            cosines = match_components(row.pop("components"), problem.components_KD)[1]
            row["mean_cosine"], row["least_cosine"] = float(cosines.mean()), float(cosines.min())
            row["loss_over_best"] = row["loss"] / min(
                row["loss"], row["reference"]["loss"], row.get("loss_from_the_true_components", np.inf)
            )
            found[name].append(row)
            _line(f"{name}, seed {seed}", row, f"cos {row['mean_cosine']:.4f}, loss {row['loss_over_best']:.5f} × best")
        ratios = [row["times_less"] for row in found[name] if row["times_less"] is not None]
        if ratios:
            wanted = WANTED.get(name, 4)
            print(f"  median {statistics.median(ratios):.1f} times less CPU time (wanted {wanted})", flush=True)
    return found


def minilm(cache: Path, tiny: bool) -> dict[str, Any] | None:
    """The Fishers of a fine-tuned MiniLM on SICK, D = 4,096."""
    factors_NRD = minilm_factors(cache, 96 if tiny else None)
    if factors_NRD is None:
        print("minilm   needs NPEFF_SHARED_DATA, a folder with models/minilm-sick and data/sick: left out")
        return None
    _title(f"MiniLM/SICK, {tuple(factors_NRD.shape)}")
    found = {}
    for n_components in (8,) if tiny else (32, 64):
        row = race(factors_NRD, n_components, seed=0, passes=120 if tiny else 300)
        del row["components"]
        found[f"K = {n_components}"] = row
        _line(f"K = {n_components}", row, "wanted 30 times less")
    return found


def race(factors_NRD: Tensor, n_components: int, seed: int, passes: int) -> dict[str, Any]:
    """The reference with its best step size, then this solver: to the reference's loss, and to its own end."""
    reference, *others = best_reference_run(factors_NRD, n_components, passes, seed)
    began = time.process_time()
    solved = _solved(factors_NRD, _start(factors_NRD, n_components, seed), n_components, seed)
    cpu_s = time.process_time() - began
    reached = [record.iteration for record in solved.history if record.accepted and record.loss <= reference.loss]
    to_loss_s = [_seconds_of(factors_NRD, n_components, seed, reached[0]) for _ in range(ROUNDS if reached else 0)]
    to_its_loss_s = statistics.median(to_loss_s) if reached else None
    return {
        "reference": asdict(reference),
        "other_step_sizes": [asdict(run) for run in others],
        "to_its_loss_cpu_s": to_its_loss_s,
        "to_its_loss_rounds_cpu_s": to_loss_s,
        "to_its_loss_passes": reached[0] if reached else None,
        "times_less": reference.cpu_s / to_its_loss_s if reached else None,
        "cpu_s": cpu_s,
        "passes": solved.n_iter,
        "stopped": solved.stopped,
        "loss": solved.loss,
        "explained": solved.explained,
        "components": solved.components_KD.numpy(),
        "peak_mib": peak_bytes(torch.device("cpu")) / 2**20,
    }


def _seconds_of(factors_NRD: Tensor, n_components: int, seed: int, passes: int) -> float:
    """CPU time of a start and of so many passes."""
    began = time.process_time()
    start_KD = _start(factors_NRD, n_components, seed)
    ended: list[float] = []

    def look(state: SolverState, _record: IterationRecord) -> None:
        if state.iteration == passes:
            ended.append(time.process_time())

    _solved(factors_NRD, start_KD, n_components, seed, look, max_iterations=passes)
    return ended[0] - began


def _start(factors_NRD: Tensor, n_components: int, seed: int) -> Tensor:
    return starting_components(ExampleShard(factors_NRD), SolverOptions(n_components=n_components, seed=seed))


def _solved(
    factors_NRD: Tensor, start_KD: Tensor, n_components: int, seed: int, look: Any = None, **limits: int
) -> Factorization:
    options = SolverOptions(n_components=n_components, seed=seed, **limits)
    if len(start_KD) != n_components:
        start_KD = start_KD[:n_components]
    return solve([ExampleShard(factors_NRD)], start_KD, options, look)


def _title(what: str) -> None:
    print(f"{what}: CPU seconds of one thread; reference: 300 passes with its best step size")
    print(f"{'':34} {'reference':>16} {'this, to its loss':>22} {'times less':>11} {'to its end':>18}   MiB")


def _line(what: str, row: dict[str, Any], more: str) -> None:
    reference = row["reference"]
    to_loss = f"{row['to_its_loss_cpu_s']:8.2f} ({row['to_its_loss_passes']} passes)" if row["times_less"] else "never"
    times = f"{row['times_less']:.1f}" if row["times_less"] else "-"
    print(
        f"{what:34} {reference['cpu_s']:8.1f} lr {reference['step_size']:.0e} {to_loss:>20} {times:>11}"
        f" {row['cpu_s']:8.2f} ({row['passes']} passes) {row['peak_mib']:6.0f}   {more}",
        flush=True,
    )
