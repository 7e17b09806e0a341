"""What does `npeff spectrum` cost, and what does the sketch do to the statistics?

    python tests/benchmarks/spectrum.py [--examples 100000] [--dim 4096] [--skip-cost] [--output FILE] [--figure FILE]

Cost: the time of the pass over a store of random Fishers of rank 2, against the product of as many rows (float32 blocks
added up in float64, measured on an eighth of the rows in the same process), the time of the eigenvalues, and the
largest memory above that of the process before the stage. Digits: the statistics of sketches of 1,024 and 4,096
dimensions relative to those of the whole mean Fisher. Prints tables and writes JSON. `--figure` writes the picture of
docs/spectrum.md from the output file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import torch
from quickstart import machine

sys.path.insert(0, str(Path(__file__).parents[1]))

from npeff.execution.executor import WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.store.tables import read_table
from planted_run import run_with_fishers

RANK, SHARD = 2, 1000


class Timed(SerialExecutor):
    """Measures the time of each method of the worker."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **more: Any) -> Iterator[tuple[Any, Any]]:
        began = time.perf_counter()
        yield from list(super().map(spec, method, items, **more))
        self.seconds[method] = self.seconds.get(method, 0.0) + time.perf_counter() - began


def write_store(path: Path, n_examples: int, dim: int) -> None:
    """Write a run of random Fishers whose eigenvalues decay."""
    rng = np.random.default_rng(0)
    scales_D = (1.0 + np.arange(dim)) ** -0.5

    def factors(start: int, stop: int) -> np.ndarray:
        rows = rng.standard_normal((stop - start, RANK, dim), dtype=np.float32) * scales_D.astype(np.float32)
        norms = np.linalg.norm(rows @ rows.transpose(0, 2, 1), axis=(1, 2))
        return rows / np.sqrt(norms)[:, None, None]

    fishers = {"store_dtype": "float16"}
    run_with_fishers(path, (n_examples, RANK, dim), factors, SHARD, factorization={"n_components": 2}, fishers=fishers)


def product_seconds(n_rows: int, dim: int) -> float:
    """The time of the whole D×D product of rows, in blocks of 2,048."""
    rows = torch.randn(2048, dim)
    total = torch.zeros(dim, dim, dtype=torch.float64)
    began = time.perf_counter()
    for _ in range(max(1, n_rows // 8 // 2048)):
        total += rows.T @ rows
    return (time.perf_counter() - began) / max(1, n_rows // 8 // 2048) * n_rows / 2048


def peak_mb() -> float:
    """The largest memory of this process so far. That of ``getrusage`` includes the parent's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(path: Path, queue: Any) -> None:
    """Run the stage. In a process of its own, so that the peak of memory is that of the stage."""
    run = RunDirectory.open(path)
    executor, stage = Timed(), npeff.spectrum  # imports the stage
    before = peak_mb()
    began = time.perf_counter()
    stage(run, executor=executor)
    seconds = time.perf_counter() - began
    queue.put({"seconds": seconds, **executor.seconds, "start_mb": before, "above_start_mb": peak_mb() - before})


def cost(n_examples: int, dim: int) -> dict[str, float]:
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path, queue = Path(folder) / "run", spawned.Queue()
        write_store(path, n_examples, dim)
        first = product_seconds(n_examples * RANK, dim)
        process = spawned.Process(target=measure, args=(path, queue))
        process.start()
        found: dict[str, float] = queue.get()
        process.join()
    found["product"] = (first + product_seconds(n_examples * RANK, dim)) / 2  # before and after: others work, too
    found["ratio"] = found["add"] / found["product"]
    return found


def statistics(folder: Path, name: str, sketch: dict[str, Any]) -> tuple[dict[str, float], list[float]]:
    """Return the statistics of the digits with a sketch, and the eigenvalues."""
    document = {
        "run_dir": str(folder / name),
        "task": {"name": "digits", "options": {"limit": 150}},
        "fishers": {"sketch": sketch, "shard_size": 32},
        "factorization": {"n_components": 3},
        "executor": {"kind": "serial"},
    }
    run = RunDirectory.create(RunConfig.model_validate(document))
    npeff.compute_fishers(run)
    npeff.spectrum(run)
    rows = read_table(run.table("spectrum_statistics"), "spectrum_statistics").to_pylist()
    n_examples = max(each["n_examples"] for each in rows)
    values = {row["name"]: row["value"] for row in rows if row["n_examples"] == n_examples}
    eigenvalues = read_table(run.table("spectrum"), "spectrum")["eigenvalue"].to_pylist()
    return values, [value for value in eigenvalues if value > 1e-9 * eigenvalues[0]]


def digits() -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """Return the statistics and the eigenvalues of the digits for each sketch."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        found["exact"] = statistics(Path(folder), "exact", {"kind": "identity"})
        for dim in (1024, 4096):
            found[str(dim)] = statistics(Path(folder), str(dim), {"kind": "tensorsketch", "dim": dim})
    return {name: values for name, (values, _) in found.items()}, {name: list_ for name, (_, list_) in found.items()}


WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 320, 52, 50, 44
CURVES = {
    "exact": ("identity", "#1f5fa8"),
    "4096": ("D = 4,096 (on it)", "#3b7a3b"),
    "1024": ("D = 1,024 (on it)", "#b4531f"),
}


def figure(eigenvalues: dict[str, list[float]], n_parameters: int) -> str:
    """Return the picture of the documentation: the share of the trace in the first directions, for each sketch."""
    most = max(len(values) for values in eigenvalues.values())

    def x(number: float) -> float:
        return LEFT + np.log(number) / np.log(most) * (WIDTH - LEFT - 16)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    marks = []
    for row, (name, (label, colour)) in enumerate(CURVES.items()):
        shares = np.cumsum(eigenvalues[name]) / np.sum(eigenvalues[name])
        points = " ".join(f"{x(i + 1):.1f},{y(share):.1f}" for i, share in enumerate(shares))
        marks.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks.append(f'<text x="{x(most) - 130:.0f}" y="{y(0.3) + 18 * row:.0f}" fill="{colour}">{label}</text>')
        if name != "exact":
            continue
        for share in (0.9, 0.99):
            count = int(np.searchsorted(shares, share)) + 1
            marks.append(f'<path d="M{LEFT} {y(share):.1f}H{x(count):.1f}V{y(0):.1f}" fill="none" stroke="#bbb"/>')
            marks.append(f'<text x="{x(count) + 4:.1f}" y="{y(0.03):.1f}">{count} for {share:.0%}</text>')
    ticks = [f'<text x="{x(n):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{n:,}</text>' for n in (1, 10, 100)]
    ticks += [f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.0%}</text>' for v in (0, 0.5, 1)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12" fill="#1c2126">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            f'<text x="{LEFT}" y="20">Share of the information in the first directions: network for digits,</text>',
            f'<text x="{LEFT}" y="36">{n_parameters:,} parameters, 150 examples</text>',
            f'<path d="M{LEFT} {TOP}V{y(0):.1f}H{WIDTH - 16}" fill="none" stroke="#888"/>',
            *marks,
            *ticks,
            f'<text x="{x(most**0.5):.0f}" y="{HEIGHT - 8}" text-anchor="middle">number of directions</text>',
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--skip-cost", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/spectrum.json"))
    parser.add_argument("--figure", type=Path, help="an SVG file")
    arguments = parser.parse_args()
    if arguments.figure is not None:
        eigenvalues = json.loads(arguments.output.read_text())["eigenvalues"]
        arguments.figure.write_text(figure(eigenvalues, 9802), encoding="utf-8")
        return
    found, eigenvalues = digits()
    exact = found["exact"]
    print(f"{'statistic':<28}{'exact':>12}{'D = 1,024':>12}{'D = 4,096':>12}")
    for name, value in exact.items():
        relative = [found[dim][name] / value if value else float("nan") for dim in ("1024", "4096")]
        print(f"{name:<28}{value:>12.5g}{relative[0]:>12.4f}{relative[1]:>12.4f}")
    result: dict[str, Any] = {"machine": machine(), "digits": found, "eigenvalues": eigenvalues}
    if not arguments.skip_cost:
        result["cost"] = cost(arguments.examples, arguments.dim)
        for name, value in result["cost"].items():
            print(f"{name:<28}{value:>12.4g}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
