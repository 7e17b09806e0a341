"""What our attribution costs beside the passes that it needs: one forward and one input-gradient pass per draw."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from npeff.gradients import LabelSpec
from npeff.input_fisher.attribution import input_information
from npeff.input_fisher.moments import CovarianceKind

from inputs_stage.problems import KINDS, Prepared, prepared, problems

ROUNDS = 7
GOAL = 1.3
EXAMPLES = {"digits": (100, 4), "breast-cancer": (100, 8), "minilm": (20, 1)}
"""Examples of a batch, and draws of each in one pass. `passes` has as many rows."""


def costs(folder: Path) -> list[dict[str, Any]]:
    """Print and return the CPU time of attributions, in alternating rounds."""
    print(f"\nCPU time per example and draw, {ROUNDS} alternating rounds; goal: at most {GOAL} × the passes\n")
    print(
        "| problem, examples × draws in a pass | method | ms | × the passes (minimum to maximum) |\n|---|---|---|---|"
    )
    found = []
    for name, problem in problems().items():
        if name in EXAMPLES:
            made = prepared(problem, problem.seeds[0], folder)
            found += _of(name, made)
    return found


def _of(name: str, made: Prepared) -> list[dict[str, Any]]:
    samples = made.problem.samples
    n_examples, repeats = EXAMPLES[name]
    batch = made.loaded.batches(made.tested, n_examples)[0]
    inputs = made.inputs(batch * repeats)
    with torch.no_grad():
        classes_B = inputs.logits(inputs.values_BPF).argmax(1)

    def passes() -> None:
        for _ in range(samples // repeats):
            values_BPF = inputs.values_BPF.detach().clone().requires_grad_()
            chosen_B = inputs.logits(values_BPF).log_softmax(1).gather(1, classes_B[:, None])
            torch.autograd.grad(chosen_B.sum(), values_BPF)

    def ours(kind: CovarianceKind, **explained: Any) -> Callable[[], Any]:
        fixed = {"samples": samples, "repeats": repeats, **explained}
        return lambda: input_information(inputs, made.noises[kind], batch, **fixed)

    timed: dict[str, Callable[[], Any]] = {"the passes": passes}
    timed |= {f"FI, {kind}": ours(kind, classes_B=classes_B[: len(batch)]) for kind in KINDS}
    timed["input Fisher, all classes, one sampled label"] = ours("full", labels=LabelSpec("sampled", rank=1))
    seconds: dict[str, list[float]] = {method: [] for method in timed}
    for method in timed:
        timed[method]()  # the first call allocates
    for _ in range(ROUNDS):
        for method, run in timed.items():
            began = time.process_time()
            run()
            seconds[method].append((time.process_time() - began) / samples / len(batch))
    rows = []
    for method, measured in seconds.items():
        ratios = [value / floor for value, floor in zip(measured, seconds["the passes"], strict=True)]
        row = {
            "problem": name,
            "batch": len(batch),
            "repeats": repeats,
            "method": method,
            "ms": 1e3 * statistics.median(measured),
        }
        row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append(row)
        shown = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        print(f"| {name}, {len(batch)} × {repeats} | {method} | {row['ms']:.3f} | {shown} |", flush=True)
    return rows
