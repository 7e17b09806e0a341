"""What we take for what `bergson_index.py` measures, in a process of its own: Fishers of rank one, stored.

    python tests/benchmarks/fisher_stage/our_index.py --model FOLDER --data FILE.npz --out FOLDER

The same model, texts, batches and weights. The label of each prediction is drawn here too, with the seed of the file's
labels, so they are the same. Writes ``result.json`` with what the other's has, and the last round's ``fishers.zarr``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.models.heap import keep_freed_memory
from npeff.sketches import SketchSpec, make_sketch
from npeff.store.fisher_store import FisherStore
from npeff.tasks.huggingface.pretrained import with_fused_gelu

from fisher_stage.bergson_index import memory, read_data, reset_peak_memory
from fisher_stage.causal_model import SAMPLED, targets_of

WEIGHTS = ("transformer.h.*.attn.*.weight", "transformer.h.*.mlp.*.weight")
SHARD = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True)
    (arguments.out / "result.json").write_text(json.dumps(measure(arguments), indent=2) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    tokens_NT = torch.from_numpy(read_data(arguments.data)[0])
    model = with_fused_gelu(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)).eval()
    layout = select_parameters(model, WEIGHTS, ())
    path = arguments.out / "fishers.zarr"

    def build() -> None:
        """What a worker does once the model is loaded."""
        sketch = make_sketch(SketchSpec("tensorsketch", arguments.dim), layout, 0)
        fishers = PerExampleFishers(
            model, lambda model, batch: model(batch, use_cache=False).logits, layout, sketch, SAMPLED
        )
        store = FisherStore.create(
            path,
            n_examples=len(tokens_NT),
            rank=1,
            dim=arguments.dim,
            n_classes=model.config.vocab_size,
            shard_size=SHARD,
            store_dtype="float16",
            attrs={},
            with_logits=False,
        )
        fishers.collector.inspect(tokens_NT[:2], range(2), targets_of(tokens_NT[:2]))
        for shard in range(store.plan.n_shards):
            start, stop = store.plan.bounds(shard)
            parts = [
                stored(fishers, tokens_NT, range(first, min(first + arguments.batch_size, stop)))
                for first in range(start, stop, arguments.batch_size)
            ]
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            store.write_shard(shard, arrays)

    keep_freed_memory()
    memory_before = reset_peak_memory()
    cpu_s, wall_s, memory_peak = [], [], 0
    for _ in range(arguments.rounds):
        shutil.rmtree(path, ignore_errors=True)
        began_cpu, began_wall = time.process_time(), time.perf_counter()
        build()
        cpu_s.append(time.process_time() - began_cpu)
        wall_s.append(time.perf_counter() - began_wall)
        memory_peak = memory_peak or memory("VmHWM")  # later rounds find the heap that the first one left
    return {
        "n_examples": len(tokens_NT),
        "dim": arguments.dim,
        "cpu_s": min(cpu_s),
        "wall_s": min(wall_s),
        "peak_memory_bytes": memory_peak,
        "peak_memory_above_model_bytes": memory_peak - memory_before,
        "index_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "parameters": list(layout.names),
    }


def stored(fishers: PerExampleFishers, tokens_NT: torch.Tensor, numbers: range) -> dict[str, np.ndarray]:
    """A batch's arrays as a shard has them."""
    tokens_BT = tokens_NT[numbers.start : numbers.stop]
    found = fishers(tokens_BT, numbers, targets_of(tokens_BT))
    scale_B = found.frobenius_norms_B.rsqrt().float()
    arrays = {
        "factors": (found.factors_BRD * scale_B[:, None, None]).half(),
        "frobenius_norms": found.frobenius_norms_B,
        "grams": found.grams_BRR,
        "ranks": found.ranks_B,
        "kept_trace": found.kept_trace_B,
        "losses": found.losses_B.float(),
        "valid": found.valid_B,
        "labels": torch.full((len(numbers),), -1),
    }
    return {name: values.numpy() for name, values in arrays.items()}


if __name__ == "__main__":
    main()
