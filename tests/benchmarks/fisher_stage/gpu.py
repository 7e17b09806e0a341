"""The stage's work on a GPU: a small BERT, and a decoder of about 1.3 billion parameters drawn at random.

Time of the whole over that of the passes nobody can avoid, what the rest goes to, and the most memory that is held.
Results are brought to the CPU, and not written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, LabelSpec, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from transformers import LlamaConfig, LlamaForCausalLM

from fisher_stage import minilm
from fisher_stage.causal_model import targets_of
from fisher_stage.workload import Workload, floor, interleaved, median_and_spread, pieces

N_PAIRS, PAIRS_BATCH = 512, 32
N_TEXTS, TEXTS_BATCH, LENGTH, DRAWS = 32, 8, 512, 4
DECODER: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
TINY_DECODER: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gpu(rounds: int, tiny: bool) -> dict[str, Any] | None:
    if not torch.cuda.is_available() and not tiny:
        print("gpu: not run, as torch finds no GPU (--tiny tries the section on the CPU)")
        return None
    device = torch.device("cpu" if tiny else "cuda")
    about = "CPU, tiny sizes" if tiny else torch.cuda.get_device_name(device)
    print(f"gpu, on {about}, {rounds} rounds")
    models: dict[str, Callable[[torch.device, torch.dtype, bool], tuple[Workload, dict[str, int]]]] = {
        "decoder": decoder
    }
    if minilm.available():
        models = {"MiniLM": bert} | models
    else:
        print("  without MiniLM, as NPEFF_SHARED_DATA names no folder with the model and the data")
    rows = []
    for model, build in models.items():
        for precision, dtype in DTYPES.items():
            work, dims = build(device, dtype, tiny)
            rows.append({"model": model, "precision": precision, **_measured(work, dims, rounds, device)})
            _show(rows[-1])
            del work
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {"device": about, "rounds": rounds, "rows": rows}


def _measured(work: Workload, dims: dict[str, int], rounds: int, device: torch.device) -> dict[str, Any]:
    sketches = {name: make_sketch(SketchSpec("tensorsketch", dim), work.layout, 0) for name, dim in dims.items()}
    variants: dict[str, Callable[[], Any]] = {"floor": partial(floor, work)}
    collector = GradientCollector(work.model, work.logits, work.layout, work.labels)
    named = {f"sketch {name}": sketch for name, sketch in sketches.items()}
    variants["pieces"] = partial(pieces, work, collector, named, device)
    for name, sketch in sketches.items():
        fishers = PerExampleFishers(work.model, work.logits, work.layout, sketch, work.labels)
        variants[f"all {name}"] = partial(_all, work, fishers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = interleaved(variants, rounds, device)
    return {
        "n_examples": work.n_examples(),
        "n_parameters": work.layout.size,
        "examples_per_s": {name: work.n_examples() / float(np.median(times)) for name, times in seconds.items()},
        "times_the_floor": {name: median_and_spread(times / seconds["floor"]) for name, times in seconds.items()},
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _all(work: Workload, fishers: PerExampleFishers) -> None:
    for numbers, batch, targets in work.batches:
        found = fishers(batch, numbers, targets)
        found.factors_BRD.half().cpu()
        found.grams_BRR.cpu()


def bert(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Workload, dict[str, int]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        minilm.drawn_pairs(32 if tiny else N_PAIRS, folder / "pairs.txt")
        loaded = minilm.model_spec(minilm.config(folder, folder / "pairs.txt"), device.type).load()
    loaded.model.to(dtype)
    return minilm.workload(loaded, PAIRS_BATCH, N_PAIRS), {"D=1024": 1024, "D=4096": 4096}


def decoder(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Workload, dict[str, int]]:
    """Tokens at random: what they are does not change the cost."""
    count, length, size = (4, 16, 2) if tiny else (N_TEXTS, LENGTH, TEXTS_BATCH)
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY_DECODER if tiny else DECODER), max_position_embeddings=length)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.eval().to(device, dtype)
    tokens_NT = torch.randint(config.vocab_size, (count, length), device=device)
    batches = []
    for start in range(0, count, size):
        tokens_BT = tokens_NT[start : start + size]
        batches.append((range(start, start + size), tokens_BT, targets_of(tokens_BT)))
    work = Workload(
        model,
        lambda model, batch: model(batch, use_cache=False).logits,
        select_parameters(model, ("model.layers.*proj.weight",), ()),
        batches,
        model.get_input_embeddings(),
        LabelSpec("sampled", rank=DRAWS),
    )
    return work, {"D=4096": 4096}


def _show(row: dict[str, Any]) -> None:
    memory = row["peak_memory_bytes"]
    held = "" if memory is None else f", at most {memory / 2**30:.1f} GiB held"
    print(f"  {row['model']} {row['precision']}, {row['n_examples']} examples, P = {row['n_parameters']:,}{held}")
    for name, speed in row["examples_per_s"].items():
        ratio = row["times_the_floor"][name]
        spread = f"{ratio['median']:6.3f} × the floor ({ratio['least']:.3f} to {ratio['most']:.3f})"
        print(f"    {name:<16} {speed:10.1f} examples/s {spread}")
