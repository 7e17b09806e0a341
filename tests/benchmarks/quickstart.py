"""What the quickstart costs, stage by stage, and what its two costly parts cost next to their floors.

    python tests/benchmarks/quickstart.py [--output runs/benchmarks/quickstart.json]

Everything is measured in one run of a few minutes: first the command ``npeff demo``, five times; then its stages, by
the clock, with all cores; then, with one thread in this process, alternatives in turn, several rounds of them, in
seconds of CPU time, of which the fastest round counts: a machine that does other things as well slows some rounds,
never speeds one up. Waiting for the disk is not in CPU time, so the Fisher stage is timed by the clock too. `README.md`
beside this file keeps results and what was learnt.

Shapes: N examples, B batch, C classes, R rank, D sketch, K components, P parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import torch
from npeff.factorization import ExampleShard, SolverOptions, advance, initial_state
from npeff.fisher import PerExampleFishers
from npeff.gradients import LabelSpec, exact_label_factor
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.sketches import make_sketch
from npeff.stages.fishers.worker import FisherWorker
from npeff.store.component_store import open_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from process_tree import measured
from torch import Tensor

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
BATCH, N_BATCHED, N_SINGLE = 32, 256, 24
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/quickstart.json"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"machine": machine(), "command": command(Path(folder))}
        run, result["demo_s"] = demo(Path(folder) / "run")
        torch.set_num_threads(1)
        result["fishers_ms_per_example"] = fishers(run, Path(folder))
        result["solver"] = solver(run)
    show(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {output}")


def machine() -> dict[str, Any]:
    models = [line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def command(folder: Path) -> dict[str, Any]:
    """``npeff demo`` in empty folders: seconds and bytes of each round."""
    costs = [
        measured([sys.executable, "-m", "npeff", "demo", "--run-dir", str(folder / f"demo-{done}")])
        for done in range(ROUNDS)
    ]
    return {name: [asdict(cost)[name] for cost in costs] for name in asdict(costs[0])}


def demo(path: Path) -> tuple[RunDirectory, dict[str, float]]:
    """The quickstart in an empty folder: wall-clock seconds of each stage, and of everything."""
    config = RunConfig.from_yaml(QUICKSTART).model_copy(update={"run_dir": str(path)})
    began = time.monotonic()
    run = npeff.run(config)
    total = time.monotonic() - began
    seconds: dict[str, float] = {}
    for stage in ("fishers", "factorize", "lift", "verify"):
        record = run.record(stage)
        assert record is not None, stage
        seconds[stage] = record["seconds"]
    began = time.monotonic()
    npeff.report(run)
    seconds["report"] = time.monotonic() - began
    return run, seconds | {"imports": total - sum(seconds.values()), "total": total}


# --- Fishers ----------------------------------------------------------------------------------------------------------


def fishers(run: RunDirectory, folder: Path) -> dict[str, float]:
    """Milliseconds per example, one thread, batches of 32 where there are batches.

    floor: one forward pass, and R backward passes to the input; no gradient of a parameter at all.
    collected: the same by hooks, with what the rows of each layer are made of. in_memory: with their Grams and
    sketches. stage: with the store's writes; stage_by_the_clock: with waiting for the disk.
    vmap_of_grad and the loop have plain gradient rows as their result, P numbers each, neither Gram nor sketch.
    """
    config = run.config
    model = ModelSpec(config.task.name, config.task.options, run.task_cache, ("*",), (), "cpu")
    loaded = model.load()
    linear_map = make_sketch(config.fishers.sketch, loaded.layout, config.seed)
    compute = PerExampleFishers(loaded.model, loaded.logits, loaded.layout, linear_map)
    batches = [range(first, first + BATCH) for first in range(0, N_BATCHED, BATCH)]
    worker = _fisher_worker(run, model, folder)
    parameters = [dict(loaded.model.named_parameters())[name] for name in loaded.layout.names]
    trainable = [parameter.requires_grad for parameter in parameters]

    def floor() -> None:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for batch in batches:
            inputs = loaded.batch(batch).requires_grad_()
            logits = loaded.logits(loaded.model, inputs)
            factors_BCR = exact_label_factor(logits.detach()).to(logits.dtype)
            rank = factors_BCR.shape[2]
            for r in range(rank):
                torch.autograd.grad(logits, inputs, factors_BCR[:, :, r], retain_graph=r + 1 < rank)
        for parameter, needed in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(needed)

    def collected() -> None:
        for batch in batches:
            compute.collector.collect(loaded.batch(batch), len(batch))

    def in_memory() -> None:
        for batch in batches:
            compute(loaded.batch(batch), len(batch))

    def stage() -> None:
        for shard in range(N_BATCHED // config.fishers.shard_size):
            worker.compute((shard,))

    def vmap_of_grad() -> None:
        for batch in batches:
            vmap_rows(loaded, loaded.batch(batch))

    def loop() -> None:
        for index in range(N_SINGLE):
            loop_rows(loaded, parameters, loaded.batch([index]))

    batched = [floor, collected, in_memory, stage, vmap_of_grad]
    counts = dict.fromkeys(batched, N_BATCHED) | {loop: N_SINGLE}
    fastest = fastest_of(list(counts))
    result = {work.__name__: 1000 * seconds / counts[work] for work, seconds in fastest.items()}
    by_the_clock = fastest_of([stage], clock=time.perf_counter)[stage]
    return result | {"stage_by_the_clock": 1000 * by_the_clock / N_BATCHED}


def _fisher_worker(run: RunDirectory, model: ModelSpec, folder: Path) -> FisherWorker:
    """A worker as the stage makes it, on a store of its own."""
    store, config = FisherStore.open(run.fishers), run.config.fishers
    path = folder / "scratch" / "fishers.zarr"
    path.parent.mkdir()
    sizes = {"n_examples": store.plan.n_examples, "rank": store.rank, "dim": store.dim, "n_classes": store.n_classes}
    FisherStore.create(path, **sizes, shard_size=config.shard_size, store_dtype=config.store_dtype, attrs={})
    records = ShardRecords(path.parent / "shards", "benchmark")
    return FisherWorker(model, LabelSpec(), config.sketch, run.config.seed, path, records, BATCH)


def vmap_rows(loaded: LoadedModel, batch: Tensor) -> Tensor:
    """Gradient rows (B, R, P) by `torch.func.vmap` of `grad`, over examples and over the columns of L."""
    parameters = {name: value.detach() for name, value in loaded.model.named_parameters()}
    with torch.no_grad():
        factors_BCR = exact_label_factor(loaded.logits(loaded.model, batch)).float()

    def score(parameters: dict[str, Tensor], example: Tensor, direction_C: Tensor) -> Tensor:
        logits_C = torch.func.functional_call(loaded.model, parameters, (example[None],))[0]
        return logits_C @ direction_C

    per_row = torch.func.vmap(torch.func.grad(score), in_dims=(None, None, 1))
    rows = torch.func.vmap(per_row, in_dims=(None, 0, 0))(parameters, batch, factors_BCR)
    return torch.cat([rows[name].flatten(2) for name in loaded.layout.names], dim=2)


def loop_rows(loaded: LoadedModel, parameters: Sequence[Tensor], example: Tensor) -> Tensor:
    """√p_y ∇log p(y) for every class, (C, P), by ordinary autograd: C = R + 1 backward passes."""
    log_p_C = loaded.logits(loaded.model, example)[0].log_softmax(0)
    rows = []
    for log_p in log_p_C:
        gradients = torch.autograd.grad(log_p, parameters, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]) * (0.5 * log_p.detach()).exp())
    return torch.stack(rows)


# --- Solver -----------------------------------------------------------------------------------------------------------


def solver(run: RunDirectory) -> dict[str, float]:
    """Seconds of one pass over the demo's fitted Fishers, of its two matrix products alone, and of the step itself."""
    store = FisherStore.open(run.fishers)
    factors_NRD = torch.from_numpy(store.read_rows(np.arange(800), ["factors"])["factors"])
    components_KD = torch.from_numpy(open_factorization(run.factorization).read_components())
    shard, options = ExampleShard(factors_NRD), SolverOptions(n_components=len(components_KD))
    state = initial_state(components_KD, options)
    statistics = shard.accumulate(components_KD)
    rows, h_KD = factors_NRD.reshape(-1, store.dim), components_KD.float()
    block = 4096

    def one_pass() -> None:
        shard.accumulate(components_KD)

    def two_products() -> None:
        for part in rows.split(block):
            products = h_KD @ part.T
            products @ part

    def step() -> None:
        advance(state, statistics, options)

    fastest = fastest_of([one_pass, two_products, step])
    return {
        "n_examples": len(factors_NRD),
        "rank": store.rank,
        "dim": store.dim,
        "n_components": len(components_KD),
        "pass_s": fastest[one_pass],
        "two_products_s": fastest[two_products],
        "step_s": fastest[step],
    }


def fastest_of(
    works: Sequence[Callable[[], None]], clock: Callable[[], float] = time.process_time
) -> dict[Callable[[], None], float]:
    """Seconds of the fastest of some rounds, after one to warm up; in every round each work has its turn."""
    seconds: dict[Callable[[], None], list[float]] = {work: [] for work in works}
    for _ in range(ROUNDS + 1):
        for work in works:
            began = clock()
            work()
            seconds[work].append(clock() - began)
    return {work: min(times[1:]) for work, times in seconds.items()}


def show(result: dict[str, Any]) -> None:
    about = result["machine"]
    print(f"{about['cpu']}, {about['cores']} cores (load {about['load_before']:.1f}), torch {about['torch']}\n")
    for name, values in result["command"].items():
        print(f"command  {name:<32} {sorted(values)[len(values) // 2]:,.1f} ({min(values):,.1f} to {max(values):,.1f})")
    for name, seconds in result["demo_s"].items():
        print(f"demo     {name:<32} {seconds:8.2f} s")
    cost = result["fishers_ms_per_example"]
    for name, milliseconds in cost.items():
        times = f"{milliseconds / cost['floor']:6.2f} × the floor, {cost['stage'] / milliseconds:6.2f} of the stage"
        print(f"fishers  {name:<32} {milliseconds:8.3f} ms/example {times}")
    found = result["solver"]
    for name in ("pass_s", "two_products_s", "step_s"):
        times = found[name] / found["two_products_s"]
        print(f"solver   {name.removesuffix('_s'):<32} {found[name]:8.4f} s {times:6.2f} × the products")


if __name__ == "__main__":
    main()
