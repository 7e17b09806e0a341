"""Batches of a model, and the least that their Fishers can cost: passes that nobody can avoid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from npeff.gradients import GradientCollector, LabelSpec, LogitsFunction, ParameterLayout, frozen
from npeff.gradients.sums import total_gram
from npeff.sketches import Sketch
from torch import Tensor, nn

_CPU = torch.device("cpu")

Batch = tuple[Sequence[int], Any, Tensor | None]
"""Numbers of the examples, what the model takes, and targets of sequences of predictions."""


@dataclass(frozen=True)
class Workload:
    model: nn.Module
    logits: LogitsFunction
    layout: ParameterLayout
    batches: Sequence[Batch]
    embeddings: nn.Module
    """The module whose output all selected parameters come after."""
    labels: LabelSpec = field(default_factory=LabelSpec)

    def n_examples(self) -> int:
        return sum(len(numbers) for numbers, _, _ in self.batches)


def floor(work: Workload) -> None:
    """One forward pass, and R backward passes to the embeddings' output, of every batch; nothing else.

    What is passed back does not change the cost, so it is the logits: nothing is spent on the labels.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = work.embeddings.register_forward_hook(keep)
    try:
        with frozen(work.model):
            for _, batch, _ in work.batches:
                outputs.clear()
                logits = work.logits(work.model, batch)
                rank = work.labels.max_rank(logits.shape[-1])
                for row in range(rank):
                    torch.autograd.grad(logits, outputs[0], logits.detach(), retain_graph=row + 1 < rank)
    finally:
        handle.remove()


def clock(device: torch.device) -> float:
    """Seconds by the clock, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_clock(_device: torch.device) -> float:
    """Seconds of this process, on all cores. Other work on the machine changes them little."""
    return time.process_time()


def interleaved(
    variants: Mapping[str, Callable[[], Mapping[str, float] | None]],
    rounds: int,
    device: torch.device = _CPU,
    now: Callable[[torch.device], float] = clock,
) -> dict[str, np.ndarray]:
    """Seconds of each variant in each round, (rounds,), after one round to warm up; all take their turn in a round.

    A variant may return the seconds of its parts, by name, which are then given instead of its own.
    """
    seconds: dict[str, list[float]] = {}
    for done in range(rounds + 1):
        # the other way round every other time: what one leaves in caches must not always serve the same next one
        for name in list(variants)[:: 1 if done % 2 else -1]:
            began = now(device)
            parts = variants[name]() or {name: now(device) - began}
            if done:
                for part, value in parts.items():
                    seconds.setdefault(part, []).append(value)
    return {name: np.array(times) for name, times in seconds.items()}


def median_and_spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": float(values.min()), "most": float(values.max())}


def pieces(
    work: Workload,
    collector: GradientCollector,
    sketches: Mapping[str, Sketch],
    device: torch.device = _CPU,
    now: Callable[[torch.device], float] = clock,
) -> dict[str, float]:
    """Seconds of collecting what the rows are made of, of their Gram matrices, and of each sketch of them."""
    seconds = dict.fromkeys(["collect", "Grams", *sketches], 0.0)

    def timed(name: str, piece: Callable[..., Any], *arguments: Any) -> Any:
        began = now(device)
        result = piece(*arguments)
        seconds[name] += now(device) - began
        return result

    for numbers, batch, targets in work.batches:
        collected = timed("collect", collector.collect, batch, numbers, targets)
        with torch.no_grad():
            timed("Grams", total_gram, collected.contributions.values())
            for name, sketch in sketches.items():
                timed(name, sketch.apply, collected.contributions)
    return seconds
