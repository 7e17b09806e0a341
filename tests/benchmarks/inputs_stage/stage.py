"""What the stage `inputs` costs: CPU time beside its passes, two workers beside one, and memory."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import npeff
import torch
from npeff.execution.ray.executor import RayExecutor
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.worker_specs import model_spec
from npeff.store.fisher_store import FisherStore
from process_tree import measured

from inputs_stage.problems import problems

GOAL, GOAL_OF_TWO = 1.3, 1.7
EXPLAINED = {"digits": (600, 64, 5), "minilm": (600, 12, 1)}
"""Examples that the stage explains, draws of each, and alternating rounds."""
PARAMETERS = {"digits": "*", "minilm": "classifier.*"}
"""The Fishers are needed only to make a run."""


def stage_costs(folder: Path) -> list[dict[str, Any]]:
    """Print and return the cost of the stage on two problems."""
    print("\nthe stage `inputs`, median of alternating rounds (minimum to maximum)\n")
    print(
        f"| problem | CPU s | × its passes (goal {GOAL}) | wall s, one Ray worker | two: {GOAL_OF_TWO} × as fast? | "
        "memory, MiB |\n|---|---|---|---|---|---|"
    )
    found = []
    for name, (n_explained, samples, rounds) in EXPLAINED.items():
        if name in problems():
            run = _factorized(name, folder, n_explained, samples)
            found.append(_of(name, run, n_explained * samples, rounds))
    return found


def _factorized(name: str, folder: Path, n_explained: int, samples: int) -> RunDirectory:
    problem = problems()[name]
    config = {
        "run_dir": str(folder / f"stage-{name}"),
        "task": {"name": problem.task, "options": problem.options | {"limit": 600}},
        "parameters": {"include": [PARAMETERS[name]]},
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 64}, "shard_size": 64},
        "factorization": {"n_components": 2, "n_starts": 1, "max_iterations": 2, "stability_examples": 0},
        "inputs": {"examples": n_explained, "samples": samples},
        "executor": {"kind": "serial"},
    }
    run = RunDirectory.create(RunConfig.model_validate(config))
    npeff.compute_fishers(run)
    npeff.factorize(run)
    return run


def _of(name: str, run: RunDirectory, n_draws: int, rounds: int) -> dict[str, Any]:
    passes, stage = [], []
    _forget(run)
    npeff.inputs(run)  # imports what it needs
    for _ in range(rounds):
        passes.append(_seconds_of_passes(run, n_draws))
        _forget(run)
        began = time.process_time()
        npeff.inputs(run)
        stage.append(time.process_time() - began)
    ratios = [mine / theirs for mine, theirs in zip(stage, passes, strict=True)]
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers in (1, 2):
            walls[workers].append(_seconds_on_ray(run, workers))
    speeds = [one / two for one, two in zip(walls[1], walls[2], strict=True)]
    _forget(run)
    memory = measured([sys.executable, "-m", "npeff", "inputs", str(run.path)]).peak_memory_bytes / 2**20
    row = {
        "problem": name,
        "cpu_s": statistics.median(stage),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "one_worker_s": statistics.median(walls[1]),
        "speed_of_two": statistics.median(speeds),
        "speeds": speeds,
        "memory_mib": memory,
    }
    print(
        f"| {name} | {row['cpu_s']:.2f} | {row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{row['one_worker_s']:.1f} | {row['speed_of_two']:.2f} × ({min(speeds):.2f} to {max(speeds):.2f}) | "
        f"{memory:.0f} |",
        flush=True,
    )
    return row


def _forget(run: RunDirectory) -> None:
    """Delete the results of the stage."""
    shutil.rmtree(run.partial_results("inputs"), ignore_errors=True)
    for path in (run.record_file("inputs"), run.input_covariance):
        path.unlink(missing_ok=True)


def _seconds_of_passes(run: RunDirectory, n_draws: int) -> float:
    """CPU seconds of as many forward and input-gradient passes as there are draws, in batches of the run's size."""
    loaded = model_spec(run, fingerprint_of(run)).load()
    size = int(FisherStore.read_attributes(run.fishers)["batch_size"])
    plan = loaded.batches(range(len(loaded.examples)), size)
    seconds, done = 0.0, 0
    while done < n_draws:
        chosen = plan[(done // size) % len(plan)]
        inputs = loaded.flat_inputs(loaded.batch(chosen), len(chosen))
        began = time.process_time()
        values_BPF = inputs.values_BPF.detach().clone().requires_grad_()
        torch.autograd.grad(inputs.logits(values_BPF).log_softmax(1)[:, 0].sum(), values_BPF)
        seconds += time.process_time() - began
        done += len(chosen)
    return seconds * n_draws / done


def _seconds_on_ray(run: RunDirectory, workers: int) -> float:
    """Wall-clock seconds of the stage on Ray workers with one core each, without the start of Ray."""
    _forget(run)
    options = {"workers": workers, "cpus_per_worker": 1, "gpus_per_worker": 0.0, "timeout_s": 600.0}
    with contextlib.closing(RayExecutor("local", **options)) as executor:
        began = time.perf_counter()
        npeff.inputs(run, executor=executor)
        return time.perf_counter() - began
