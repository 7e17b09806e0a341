"""What bergson 2.5.1 takes to build a gradient index of a causal language model on the CPU: the opponent.

    python3.11 -m venv VENV && VENV/bin/pip install bergson==2.5.1 torch==2.13.0
    VENV/bin/pip uninstall torchvision torchaudio     # unused; built for CUDA, they break a CPU build of torch
    VENV/bin/python tests/benchmarks/fisher_stage/bergson_index.py --model FOLDER --data FILE.npz --out FOLDER

Runs in an environment of its own, and so imports nothing of this project. The data file has ``input_ids`` and
``labels``, both (N, T) int64, all positions real. Labels are as transformers takes them: ``labels[:, t]`` is the target
of the logits at position t − 1, and −100 is no target.

The work measured is `bergson.build.build_worker` after it has loaded the model, with bergson's defaults: float32,
Rademacher projections of each module from both sides scaled to keep inner products in expectation, no optimizer's
normalization, no unit norms. Row i is the gradient of Σ_t −log p(labels[i, t]), a sum over positions, in the weights
of the Linear and Conv1D modules of ``model.base_model``: no biases, norms or embeddings, and no output head.

Writes to the output folder, which must be new or empty:
  result.json     CPU and wall-clock seconds (every round's, and the least), bytes of memory and disk, names of weights
  gradients.npy   (N, d) float32, as stored; d = modules × projection², or all weights with ``--projection 0``
  index/          bergson's own files, of the last round
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal model, by save_pretrained")
    parser.add_argument("--data", type=Path, required=True, help="NPZ file with input_ids and labels")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the results")
    parser.add_argument("--projection", type=int, default=16, help="rows and columns kept per module; 0: everything")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="builds; the memory is measured in the first")
    arguments = parser.parse_args()
    if min(arguments.batch_size, arguments.threads, arguments.rounds) < 1 or arguments.projection < 0:
        parser.error("--batch-size, --threads and --rounds must be at least 1, --projection at least 0")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model}: no model here; save one with save_pretrained")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if any(arguments.out.iterdir()):
        parser.error(f"{arguments.out}: not empty; name a new folder")
    # Read when torch and transformers are imported: hide GPUs, which bergson would take, and leave the network alone.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    try:
        input_ids_NT, labels_NT = read_data(arguments.data)
        result = measure(arguments, input_ids_NT, labels_NT)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "parameters"}, indent=2))


def read_data(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels, each (N, T) int64. Raises ValueError unless the file holds two such arrays."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with np.load(path) as arrays:
        missing = {"input_ids", "labels"} - set(arrays.files)
        if missing:
            raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}")
        input_ids_NT, labels_NT = arrays["input_ids"], arrays["labels"]
    for name, array in (("input_ids", input_ids_NT), ("labels", labels_NT)):
        if array.ndim != 2 or array.dtype != np.int64 or array.shape != input_ids_NT.shape:
            raise ValueError(f"{path}: {name} must be (N, T) int64 like input_ids, not {array.shape} {array.dtype}")
    # bergson leaves out sequences of one token.
    if len(input_ids_NT) < 1 or input_ids_NT.shape[1] < 2:
        raise ValueError(f"{path}: needs one sequence or more, of two tokens or more")
    return input_ids_NT, labels_NT


def measure(arguments: argparse.Namespace, input_ids_NT: np.ndarray, labels_NT: np.ndarray) -> dict[str, Any]:
    """Builds the index some times over and leaves the last; seconds, bytes, and what was measured.

    Raises ModuleNotFoundError without bergson, ValueError where the index is not what the module's docstring says.
    """
    try:
        import bergson
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: run this by the Python of an environment with bergson 2.5.1") from error
    import torch
    from bergson.config import DistributedConfig
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft
    from datasets import Dataset

    torch.set_num_threads(arguments.threads)
    n_examples, length = input_ids_NT.shape
    index = arguments.out / "index"
    config = bergson.IndexConfig(
        run_path=str(index),
        model=str(arguments.model),
        projection_dim=arguments.projection,
        token_batch_size=arguments.batch_size * length,
        distributed=DistributedConfig(nnode=1, nproc_per_node=1, node_rank=0),
    )
    data = Dataset.from_dict(
        {"input_ids": input_ids_NT.tolist(), "labels": labels_NT.tolist(), "length": [length] * n_examples}
    )
    model, _ = setup_model_and_peft(config)

    def build() -> None:
        """What build_worker and build do once the model is loaded."""
        bergson.collect_gradients(
            model=model,
            data=data,
            processor=create_processor(model, config),
            cfg=config,
            batches=allocate_batches(data["length"][:], config.token_batch_size),
        )
        shutil.move(config.partial_run_path, index)

    memory_before = reset_peak_memory()
    cpu_s, wall_s, memory_peak = [], [], 0
    for done in range(arguments.rounds):
        if done:
            shutil.rmtree(index)
        began_cpu, began_wall = time.process_time(), time.perf_counter()
        build()
        cpu_s.append(time.process_time() - began_cpu)
        wall_s.append(time.perf_counter() - began_wall)
        memory_peak = memory_peak or memory("VmHWM")  # later rounds find the heap that the first one left

    gradients_ND = bergson.load_gradients(index)
    modules = json.loads((index / "info.json").read_text())["grad_sizes"]
    names = [f"{model.base_model_prefix}.{module}.weight" for module in modules]
    parameters = dict(model.named_parameters())
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(f"the index has {unknown[0]}, which {arguments.model} has not; use a plain causal model")
    if not np.isfinite(gradients_ND).all() or not gradients_ND.any(axis=1).all():
        raise ValueError(f"{index}: rows that are not finite or all zero; give every example a label after the first")
    np.save(arguments.out / "gradients.npy", gradients_ND)
    return {
        "versions": {name: version(name) for name in ("bergson", "torch", "transformers")},
        "n_examples": n_examples,
        "length": length,
        "projection": arguments.projection,
        "batch_size": arguments.batch_size,
        "threads": arguments.threads,
        "dim": gradients_ND.shape[1],
        "dtype": str(gradients_ND.dtype),
        "cpu_s": min(cpu_s),
        "wall_s": min(wall_s),
        "cpu_s_of_rounds": cpu_s,
        "wall_s_of_rounds": wall_s,
        "peak_memory_bytes": memory_peak,
        "peak_memory_above_model_bytes": memory_peak - memory_before,
        "gradients_bytes": (index / "gradients.bin").stat().st_size,
        "index_bytes": sum(path.stat().st_size for path in index.rglob("*") if path.is_file()),
        "n_weights": sum(parameters[name].numel() for name in names),
        "parameters": names,
    }


def reset_peak_memory() -> int:
    """Sets the kernel's peak of resident memory to what is resident now, and returns that, in bytes; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status such as VmHWM, the peak of resident memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
