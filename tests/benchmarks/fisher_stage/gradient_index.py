"""An index of a causal language model's gradients: ours, and the one that bergson builds, of the same batches.

One row an example, of one drawn label for each prediction, in the weights of every layer of the model's body. Each is
built in processes of its own, with one thread, in turn; seconds are of CPU time. Errors are those of the inner products
of the Fishers of rank one, normalised by their exact norms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.gradients import ParameterLayout, select_parameters
from npeff.store.fisher_store import FisherStore
from torch import Tensor
from transformers import AutoModelForCausalLM

from fisher_stage import causal_model
from fisher_stage.accuracy import inner_products, normalised_rows, off_diagonal_error
from fisher_stage.causal_model import Size
from fisher_stage.workload import Workload, median_and_spread

HERE = Path(__file__).parent
SIZES = (Size(width=768, length=32, n_texts=512, steps=150), Size(width=256, length=128, n_texts=256, steps=300))
"""A model as wide as the smallest that are in use, on texts of a sentence or two; and a narrow one on long texts, where
inner products of positions weigh most."""
BATCH, THREADS, PROJECTION, DIM = 16, 1, 16, 1024
COMPARED = ("cpu_s", "wall_s", "peak_memory_bytes", "peak_memory_above_model_bytes", "index_bytes")


def bergson(python: Path | None, rounds: int) -> dict[str, Any] | None:
    if python is None:
        print("bergson: not run, as there is no environment with bergson 2.5.1")
        return None
    results = [_compared(python, rounds, size) for size in SIZES]
    return {"sizes": results}


def _compared(python: Path, rounds: int, size: Size) -> dict[str, Any]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # to train; each index is built with one
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        causal_model.make(folder / "model", size)
        given = ["--model", str(folder / "model"), "--data", str(folder / "model" / "data.npz")]
        given += ["--threads", str(THREADS), "--batch-size", str(BATCH), "--rounds", "2"]
        commands = {
            "ours": [sys.executable, str(HERE / "our_index.py"), *given, "--dim", str(DIM)],
            "bergson": [str(python), str(HERE / "bergson_index.py"), *given, "--projection", str(PROJECTION)],
        }
        found: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
        for done in range(rounds):
            for who, command in commands.items():
                out = folder / f"{who}-{done}"
                _run([*command, "--out", str(out)])
                found[who].append(json.loads((out / "result.json").read_text()))
        weights = {who: set(results[0]["parameters"]) for who, results in found.items()}
        if weights["ours"] != weights["bergson"]:
            raise ValueError(f"not the same weights: {sorted(weights['ours'] ^ weights['bergson'])}")
        errors = _errors(folder)
    result: dict[str, Any] = {
        **asdict(size),
        "dim": DIM,
        "projection": PROJECTION,
        "threads": THREADS,
        "rounds": rounds,
        "errors": errors,
        "medians": {
            who: {name: float(np.median([one[name] for one in results])) for name in COMPARED}
            for who, results in found.items()
        },
        "ours_over_bergson": {
            name: median_and_spread(
                np.array([ours[name] / theirs[name] for ours, theirs in zip(*found.values(), strict=True)])
            )
            for name in COMPARED
        },
    }
    _show(result)
    return result


def _run(command: list[str]) -> None:
    """Raises RuntimeError with what the command wrote, if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def _errors(folder: Path) -> dict[str, float]:
    """Of what the first round stored."""
    with np.load(folder / "model" / "data.npz") as arrays:
        tokens_NT = torch.from_numpy(arrays["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    names = json.loads((folder / "bergson-0" / "result.json").read_text())["parameters"]
    work = _workload(model, select_parameters(model, names, ()), tokens_NT)
    store = FisherStore.open(folder / "ours-0" / "fishers.zarr")
    shards = [store.read_shard(shard) for shard in range(store.plan.n_shards)]
    norms_N = torch.from_numpy(np.concatenate([shard["frobenius_norms"] for shard in shards]))
    ours_ND = torch.from_numpy(np.concatenate([shard["factors"][:, 0] for shard in shards]))
    theirs_ND = torch.from_numpy(np.load(folder / "bergson-0" / "gradients.npy")).float()
    theirs_ND = theirs_ND / norms_N.sqrt()[:, None].float()
    exact_NN = _exact(work, norms_N)
    return {
        "ours": off_diagonal_error(inner_products(ours_ND, len(ours_ND)), exact_NN),
        "bergson": off_diagonal_error(inner_products(theirs_ND, len(theirs_ND)), exact_NN),
    }


def _workload(model: Any, layout: ParameterLayout, tokens_NT: Tensor) -> Workload:
    batches = []
    for start in range(0, len(tokens_NT), BATCH):
        numbers = range(start, min(start + BATCH, len(tokens_NT)))
        tokens_BT = tokens_NT[numbers.start : numbers.stop]
        batches.append((numbers, tokens_BT, causal_model.targets_of(tokens_BT)))
    return Workload(
        model,
        lambda model, batch: model(batch, use_cache=False).logits,
        layout,
        batches,
        model.get_input_embeddings(),
        causal_model.SAMPLED,
    )


def _exact(work: Workload, norms_N: Tensor) -> Tensor:
    """⟨F̂_i, F̂_j⟩ = (ĝ_i · ĝ_j)² (N, N), from the gradients in full, some texts' at a time held for all weights."""
    total_NN = torch.zeros((), dtype=torch.float64)
    for _, rows_Nx in normalised_rows(work, norms_N):
        total_NN = total_NN + (rows_Nx @ rows_Nx.T).double()
    return total_NN.square()


def _show(result: dict[str, Any]) -> None:
    about = f"width {result['width']}, {result['n_texts']} texts of {result['length']} tokens"
    print(f"bergson, {about}, {result['rounds']} rounds, one thread")
    units = {"cpu_s": (1, "s"), "wall_s": (1, "s")} | dict.fromkeys(COMPARED[2:], (2**20, "MiB"))
    for name, (divisor, unit) in units.items():
        ours, theirs = (result["medians"][who][name] / divisor for who in ("ours", "bergson"))
        ratio = result["ours_over_bergson"][name]
        spread = f"ratio {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})"
        print(f"  {name:<32} ours {ours:9.2f}   bergson {theirs:9.2f} {unit:<4} {spread}")
    print(f"  {'error':<32} ours {result['errors']['ours']:9.4f}   bergson {result['errors']['bergson']:9.4f}")
