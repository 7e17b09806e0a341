"""Estimators of a Fisher matrix against the dense one, at three moments of training, and other libraries beside them.

    python tests/benchmarks/estimators.py [--seeds N] [--output FILE] [--figure FILE]

The network of the task `digits` (9,802 parameters), the mean Fisher of 100 training images, and three seeds of the
network. Six repetitions of the draws, or of the order of the examples. nngeometry, BackPACK and curvlinops run in an
environment that the script makes. `--figure` writes the picture of docs/estimators.md from the output file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from estimation.errors import Dense, measured
from estimation.figure import figure
from estimation.libraries import compared, show_libraries
from estimation.moments import moments
from quickstart import machine

NAMES = ("initialization", "half-trained", "converged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/estimators.json"))
    parser.add_argument("--figure", type=Path, help="an SVG file")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.figure is not None:
        found = json.loads(output.read_text())
        arguments.figure.write_text(figure(found["means"]), encoding="utf-8")
        return
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    began, of_seeds, libraries = time.process_time(), [], None
    for seed in range(arguments.seeds):
        of_moments = {}
        for moment in moments(seed):
            print(f"seed {seed}, {moment.name}: loss {moment.loss:.3f}", flush=True)
            dense = Dense(moment)
            of_moments[moment.name] = {
                "epochs": moment.epochs,
                "loss": moment.loss,
                "accuracy": moment.accuracy,
                "trace": dense.trace,
                "estimators": measured(moment, dense),
            }
            if seed == 0 and moment.name == "half-trained":
                libraries = compared(moment, dense, output.parent)
        of_seeds.append(of_moments)
    found = {
        "machine": machine(),
        "cpu_seconds": time.process_time() - began,
        "seeds": of_seeds,
        "means": {name: _mean([of_moments[name] for of_moments in of_seeds]) for name in NAMES},
        "libraries": libraries,
    }
    output.write_text(json.dumps(found, indent=2) + "\n")
    show(found["means"])
    show_libraries(libraries)
    print(f"\n{found['cpu_seconds']:.0f} s of CPU time; written to {output}")


def _mean(values: list[Any]) -> Any:
    """Return the mean over the seeds, for every number."""
    if isinstance(values[0], dict):
        return {name: _mean([each[name] for each in values]) for name in values[0]}
    return sum(values) / len(values)


def show(means: dict[str, Any]) -> None:
    for name, found in means.items():
        print(
            f"\n{name}: {found['epochs']:.1f} epochs, loss {found['loss']:.3f}, accuracy {found['accuracy']:.3f}, "
            f"trace {found['trace']:.3g}\n"
        )
        print("| estimator | trace | diagonal: bias | noise | rank correlation | matrix | largest | effective rank |")
        print("|---" * 8 + "|")
        for estimator, row in found["estimators"].items():
            print(
                f"| {estimator} | {_with_noise(row['trace'])} | {_number(row['diagonal']['bias'])} | "
                f"{_number(row['diagonal']['noise'])} | {row['rank_correlation']['mean']:.3f} | "
                f"{_number(row['matrix']['mean'])} | {_with_noise(row['largest'])} | "
                f"{_with_noise(row['effective_rank'])} |"
            )


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"


def _with_noise(row: dict[str, float]) -> str:
    return f"{row['mean']:.3f}" + (f" ± {row['noise']:.3f}" if row["noise"] else "")


if __name__ == "__main__":
    main()
