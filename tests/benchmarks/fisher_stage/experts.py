"""The stage's work on classifiers that are mixtures of experts, with random weights, on one thread.

CPU time of the whole over that of the passes nobody can avoid, and what the rest goes to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import nn

from fisher_stage.workload import Workload, cpu_clock, floor, interleaved, median_and_spread, pieces

SIZES: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "head_dim": 64}
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
WORDS: dict[str, Any] = {"vocab_size": 1000, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1536},
    "Qwen3Moe": {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 768},
    "GptOss": {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 768},
}
DIMS, LIMIT = (1024, 4096), 1.5
N_TEXTS, LENGTH = 16, 32


def experts(rounds: int, tiny: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    print(f"experts, one batch of {N_TEXTS} texts of {LENGTH} tokens, 1 thread, {rounds} rounds, CPU time")
    rows = []
    for family in FAMILIES:
        rows.append({"model": family, **_measured(_workload(family, tiny), rounds)})
        _show(rows[-1])
    return {"rounds": rounds, "n_examples": N_TEXTS, "length": LENGTH, "rows": rows}


def _workload(family: str, tiny: bool) -> Workload:
    torch.manual_seed(0)
    options = WORDS | FAMILIES[family] | (TINY if tiny else SIZES)
    model: nn.Module = getattr(transformers, f"{family}ForSequenceClassification")(
        getattr(transformers, f"{family}Config")(**options)
    ).eval()
    ids = torch.randint(1, WORDS["vocab_size"], (N_TEXTS, LENGTH))
    layout = select_parameters(model, exclude=("*embed_tokens*",))
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    batch = range(N_TEXTS), ids, None
    return Workload(model, lambda model, ids: model(ids, use_cache=False).logits, layout, [batch], embeddings)


def _measured(work: Workload, rounds: int) -> dict[str, Any]:
    sketches = {f"sketch D={dim}": make_sketch(SketchSpec("tensorsketch", dim), work.layout, 0) for dim in DIMS}
    collector = GradientCollector(work.model, work.logits, work.layout)
    variants: dict[str, Callable[[], Any]] = {
        "floor": partial(floor, work),
        "pieces": partial(pieces, work, collector, sketches, now=cpu_clock),
    }
    for name, sketch in sketches.items():
        fishers = PerExampleFishers(work.model, work.logits, work.layout, sketch)
        variants[name.replace("sketch", "all")] = partial(_all, work, fishers)
    seconds = interleaved(variants, rounds, now=cpu_clock)
    return {
        "n_parameters": work.layout.size,
        "ms_per_example": {name: 1000 * float(np.median(times)) / N_TEXTS for name, times in seconds.items()},
        "times_the_floor": {name: median_and_spread(times / seconds["floor"]) for name, times in seconds.items()},
    }


def _all(work: Workload, fishers: PerExampleFishers) -> None:
    for numbers, batch, targets in work.batches:
        fishers(batch, numbers, targets)


def _show(row: dict[str, Any]) -> None:
    print(f"  {row['model']}, P = {row['n_parameters']:,}")
    for name, ratio in row["times_the_floor"].items():
        spread = f"{ratio['median']:6.3f} × the floor ({ratio['least']:.3f} to {ratio['most']:.3f})"
        limit = f"  at most {LIMIT}" if name.startswith("all D") else ""
        print(f"    {name:<18} {row['ms_per_example'][name]:8.2f} ms/example {spread}{limit}")
