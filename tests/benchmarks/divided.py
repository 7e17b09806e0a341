"""What a model takes that is divided among the processes of a worker: memory, and time per example.

    python tests/benchmarks/divided.py [--parts memory speed] [--sizes 1 2 4] [--rounds 3] [--output FILE]

Memory: a GPT-2 of 1.2 GB with random weights, read from safetensors, and the Fishers of eight texts. For each number n
of processes: the parameters that a process holds at most (its shards and the units in memory), and the memory of all
processes together, above that after the imports, while the model is loaded and while Fishers are computed. Pages of the
model's file, which the system can drop, do not count. Bounds:
(1/n of the model + two blocks) · 1.1 for the parameters of a process with n > 1; 1.2 models + one block for loading.

Speed: a model whose blocks are large enough that passes dominate, with one thread per process. The same batches are
computed by one process and by two, in alternating rounds; bound: 1.5 times as fast. It needs two free cores.

Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from npeff.execution.team import TeamMember
from npeff.fisher import PerExampleFishers
from npeff.gradients import LabelSpec
from npeff.models.loaded import ModelSpec
from npeff.models.sharding import Shards
from npeff.sketches import SketchSpec, make_sketch
from npeff.tasks import Examples, Task
from process_tree import own_memory_of
from quickstart import machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

WORDS = 4096
MEMORY = {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 32}
SPEED = {"n_layer": 8, "n_embd": 512, "n_head": 8, "n_positions": 128}
_SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["memory", "speed"], choices=["memory", "speed"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes, for the memory")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of the speed")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/divided.json"))
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
        if "memory" in arguments.parts:
            path = model_folder(Path(folder) / "memory", MEMORY)
            found["memory"] = [run(path, size, n_batches=4, batch=2) for size in arguments.sizes]
            show_memory(found["memory"])
        if "speed" in arguments.parts:
            path = model_folder(Path(folder) / "speed", SPEED)
            rounds = [{size: run(path, size, n_batches=8, batch=4) for size in (1, 2)} for _ in range(arguments.rounds)]
            found["speed"] = rounds
            show_speed(rounds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def model_folder(folder: Path, size: dict[str, int]) -> Path:
    """Save a model with random weights, and tokens."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **size)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokens = torch.randint(WORDS, (64, size["n_positions"]))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    return folder


class RandomTexts(Task, Examples):
    """The next token after a text, of a model in a folder."""

    class_names = ()

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._tokens = load_file(Path(folder) / "tokens.safetensors")["tokens"]

    def model(self, cache: Path) -> nn.Module:
        return GPT2LMHeadModel.from_pretrained(self._folder)

    def skeleton(self, cache: Path) -> nn.Module:
        with torch.device("meta"):
            return GPT2LMHeadModel(GPT2Config.from_pretrained(self._folder))

    def examples(self, cache: Path) -> Examples:
        return self

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._tokens[list(indices)]

    def table(self) -> pa.Table:
        ids = [str(number) for number in range(len(self))]
        return pa.table({"id": ids, "label": pa.array([0] * len(self), pa.int64())})


def run(folder: Path, size: int, n_batches: int, batch: int) -> dict[str, Any]:
    """Load the model in `size` processes and compute the Fishers of some batches."""
    pipes, processes = [], []
    for rank in range(size):
        here, there = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_process, args=(there, str(folder), rank, size, n_batches, batch))
        process.start()
        pipes.append(here)
        processes.append(process)
    address = pipes[0].recv()
    for pipe in pipes[1:]:
        pipe.recv()
    watch = _Watch([process.pid for process in processes])
    for pipe in pipes:
        pipe.send(address)
    loaded = [pipe.recv() for pipe in pipes]
    loading = watch.peak()
    for pipe in pipes:
        pipe.send("compute")
    results = [pipe.recv() for pipe in pipes]
    computing = watch.peak()
    watch.end()
    for process in processes:
        process.join()
    return {
        "processes": size,
        "model_bytes": loaded[0]["model_bytes"],
        "largest_unit_bytes": loaded[0]["largest_unit_bytes"],
        "parameter_bytes": max(each["parameter_bytes"] for each in results),
        "loading_bytes": loading,
        "computing_bytes": computing,
        "load_s": max(each["load_s"] for each in loaded),
        "seconds": max(each["seconds"] for each in results),
        "cpu_s": sum(each["cpu_s"] for each in results),
        "fetched_bytes": sum(each["fetched_bytes"] for each in results),
        "n_examples": n_batches * batch,
    }


class _Watch:
    """The largest memory of some processes together above that at the beginning, without pages of files."""

    def __init__(self, pids: list[int | None]) -> None:
        self._pids = [str(pid) for pid in pids]
        self._before = self._now()
        self._peak, self._ends = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def peak(self) -> int:
        """Return the peak since the last call."""
        peak, self._peak = max(self._peak, self._now()), 0
        return peak - self._before

    def end(self) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(0.02):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        return sum(own_memory_of(pid) for pid in self._pids)


def _process(pipe: Connection, folder: str, rank: int, size: int, n_batches: int, batch: int) -> None:
    torch.set_num_threads(1)
    member = TeamMember(rank, size, "cpu", 600.0)
    pipe.send(member.open_rendezvous() if rank == 0 and size > 1 else None)
    address = pipe.recv()
    team = member.connect(*address) if size > 1 else None
    spec = ModelSpec("divided:RandomTexts", {"folder": folder}, Path(folder), ("*.weight", "*.bias"), (), "cpu")
    began = time.perf_counter()
    loaded = spec.load()
    shards = loaded.shards
    sizes = [] if shards is None else [unit.n_bytes for unit in shards.units]
    model_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    facts = {"model_bytes": model_bytes, "largest_unit_bytes": max(sizes, default=0)}
    pipe.send({**facts, "load_s": time.perf_counter() - began})
    pipe.recv()
    peak = _largest_present(shards) if shards is not None else [model_bytes]
    sketch = make_sketch(SketchSpec("tensorsketch", 256), loaded.layout, 0)
    fishers = PerExampleFishers(loaded.model, loaded.logits, loaded.layout, sketch, LabelSpec("sampled", rank=1))
    plan = [list(range(start, start + batch)) for start in range(0, n_batches * batch, batch)]
    fishers(*_arguments(loaded, plan[0][:1]))  # the first batch is checked
    if team is not None:
        team.serve()
    began, cpu = time.perf_counter(), time.process_time()
    for examples in plan[rank::size]:
        fishers(*_arguments(loaded, examples))
    if team is not None:
        team.serve()
    pipe.send(
        {
            "seconds": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu,
            "parameter_bytes": peak[0],
            "fetched_bytes": 0 if team is None else team.fetched_bytes,
        }
    )


def _arguments(loaded: Any, examples: list[int]) -> tuple[Any, list[int], Any]:
    batch, targets = loaded.with_targets(examples)
    return batch, examples, targets


def _largest_present(shards: Shards) -> list[int]:
    """Return a list whose entry becomes the largest memory for parameters: the shards and the units in memory."""
    kept, peak, fetch = sum(len(unit.shard) for unit in shards.units), [0], shards._fetch

    def counted(unit: Any) -> None:
        fetch(unit)
        present = sum(each.n_bytes for each in shards.units if each.is_present)
        peak[0] = max(peak[0], kept + present)

    shards._fetch = counted  # type: ignore[method-assign]
    return peak


def show_memory(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Memory in MiB; bounds in brackets")
    for column in ("processes", "model", "parameters of a process", "loading, all", "Fishers, all", "load, s"):
        table.add_column(column, justify="right")
    for row in rows:
        n, model, block = row["processes"], row["model_bytes"], row["largest_unit_bytes"]
        bound = 1.1 * (model / n + 2 * block) if n > 1 else model
        table.add_row(
            str(n),
            _mib(model),
            f"{_mib(row['parameter_bytes'])} ({_mib(bound)})",
            f"{_mib(row['loading_bytes'])} ({_mib(1.2 * model + block)})",
            _mib(row["computing_bytes"]),
            f"{row['load_s']:.1f}",
        )
    Console().print(table)


def show_speed(rounds: list[dict[int, dict[str, Any]]]) -> None:
    ratios = [each[1]["seconds"] / each[2]["seconds"] for each in rounds]
    cpu = [each[2]["cpu_s"] / each[1]["cpu_s"] for each in rounds]
    fetched = rounds[0][2]["fetched_bytes"] / rounds[0][2]["n_examples"]
    print(
        f"two processes are {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast as one, "
        f"goal 1.5, with {median(cpu):.2f} times the CPU time; {_mib(fetched)} MiB are fetched per example"
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


if __name__ == "__main__":
    main()
