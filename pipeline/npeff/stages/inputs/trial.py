"""The time of the stage `inputs`, from a few passes on some examples."""

from __future__ import annotations

import time

import torch

from npeff.models.loaded import LoadedModel
from npeff.runs.config import RunConfig


def seconds_per_pass(loaded: LoadedModel, batch_size: int) -> float:
    """Return the time of a forward pass and a backward pass to the inputs, for one example of a batch.

    Raises:
        TaskError: The task has no inputs.
    """
    chosen = loaded.batches(range(min(batch_size, len(loaded.examples))), batch_size)[0]
    flat = loaded.flat_inputs(loaded.batch(chosen), len(chosen))
    seconds = 0.0
    for _ in range(2):  # the first call is slower
        began = time.monotonic()
        values_BPF = flat.values_BPF.detach().requires_grad_()
        torch.autograd.grad(flat.logits(values_BPF).sum(), values_BPF)
        seconds = time.monotonic() - began
    return seconds / len(chosen)


def largest_number(config: RunConfig, n_examples: int) -> int:
    """Return the largest number of examples that the stage may explain."""
    wanted = config.inputs_or_default.examples
    if wanted == "top":
        return min(n_examples, 2 * config.factorization.n_components * config.report.top_examples)
    return n_examples if wanted == "all" else min(wanted, n_examples)


def passes_per_example(config: RunConfig, rank: int) -> float:
    """Return the number of passes for one example: a backward pass for each label row counts as half a pass."""
    options = config.inputs_or_default
    return options.samples * ((1 + rank) / 2 if options.label == "all" else 1)
