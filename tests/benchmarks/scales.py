"""Scales of networks that tell a parameter of textures, against the ideal observer; cost of the stage.

    python tests/benchmarks/scales.py [--seeds 3] [--paths 16] [--figure FILE] [--output FILE]

Each network is trained by the task `gaussian-textures`, and its scale is the mean over textures that it has not seen.
`--figure` writes the picture of docs/scale.md, with the first network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.input_fisher.path import FisherPath, fisher_path
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.perception.matching import area_matching_score
from npeff.perception.scales import MeanScale, mean_scale
from npeff.stages.scale.curves import Curves
from npeff.stages.scale.other_spaces import of_stimulus
from numpy.typing import NDArray
from quickstart import machine

N_LEVELS = 101
POINTS, TOLERANCE = 64, 0.01
LEVELS = np.linspace(0, 1, N_LEVELS)
WIDTH, HEIGHT, MARGIN = 420, 320, 48
TASKS: dict[str, dict[str, Any]] = {
    "z0, 4 elements": {},
    "b_z, 4 elements": {"parameter": "b_z"},
    "sigma_theta, 4 elements": {"parameter": "sigma_theta"},
    "z0, Gaussian field, noise 1": {"elements": None, "noise": 1.0},
}
"""Options of the task. The first has several seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="networks of the first task")
    parser.add_argument("--paths", type=int, default=16, help="textures of a scale")
    parser.add_argument("--figure", type=Path, help="an SVG file")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/scales.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.figure is not None:
        _, mean, predicted = _measured({}, 0, arguments.paths)
        arguments.figure.write_text(_figure(mean, predicted), encoding="utf-8")
        return
    columns = ("AMS", "largest difference", "of one texture (median)", "length / ideal", "points", "s per path", "met")
    print(f"| task | seed | {' | '.join(columns)} |")
    print("|---" * 9 + "|")
    found = []
    for place, (name, options) in enumerate(TASKS.items()):
        for seed in range(arguments.seeds if place == 0 else 1):
            row, _, _ = _measured(options, seed, arguments.paths)
            found.append({"task": name, "seed": seed, **row})
            cells = [f"{row[key]:.3g}" for key in row]
            print(f"| {name} | {seed} | {' | '.join(cells)} |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine(), "scales": found}, indent=2) + "\n")
    print(f"written to {arguments.output}")


def _loaded(options: dict[str, Any], seed: int, paths: int, cache: Path) -> LoadedModel:
    given = {"seed": seed, "n_examples": paths, **options}
    spec = ModelSpec("gaussian-textures", given, cache, ("*",), (), "cpu")
    spec.prepare()
    return spec.load()


def _measured(options: dict[str, Any], seed: int, n_paths: int) -> tuple[dict[str, float], MeanScale, FisherPath]:
    parameter = options.get("parameter", "z0")
    with tempfile.TemporaryDirectory() as folder:
        loaded = _loaded(options, seed, n_paths, Path(folder) / "task")
    curves, began = Curves(loaded, parameter), time.process_time()
    paths = [fisher_path(curves.of(example, None), points=POINTS, tolerance=TOLERANCE) for example in range(n_paths)]
    seconds = (time.process_time() - began) / n_paths
    predicted = of_stimulus(loaded, parameter, POINTS)
    ideal_n = np.interp(LEVELS, predicted.s_n, predicted.psi_n)
    mean = mean_scale([(path.s_n.tolist(), path.psi_n.tolist()) for path in paths], N_LEVELS)
    single = [np.abs(np.interp(LEVELS, path.s_n, path.psi_n) - ideal_n).max() for path in paths]
    return (
        {
            "matching": area_matching_score(LEVELS, mean.psi_n, ideal_n) or 0.0,
            "difference": float(np.abs(mean.psi_n - ideal_n).max()),
            "difference_of_one": float(np.median(single)),
            "length": float(np.median([path.length for path in paths])) / predicted.length,
            "points": float(np.median([len(path.s_n) for path in paths])),
            "seconds": seconds,
            "met": float(np.mean([path.tolerance_met for path in paths])),
        },
        mean,
        predicted,
    )


def _figure(mean: MeanScale, predicted: FisherPath) -> str:
    """Return the picture: the scale of the network with its interval, that of the ideal observer, the straight line."""
    ideal_n = np.interp(LEVELS, predicted.s_n, predicted.psi_n)
    score, difference = area_matching_score(LEVELS, mean.psi_n, ideal_n), np.abs(mean.psi_n - ideal_n).max()

    def x(value: float) -> float:
        return MARGIN + value * (WIDTH - MARGIN - 16)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - value * (HEIGHT - MARGIN - 40)

    def points(values: NDArray[np.float64], levels: NDArray[np.float64] = LEVELS) -> str:
        return " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(levels, values, strict=True))

    band = points(np.concatenate([mean.low_n, mean.high_n[::-1]]), np.concatenate([LEVELS, LEVELS[::-1]]))
    ticks = [
        f'<text x="{x(s):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{f:g}</text>'
        for s, f in zip((0, 1 / 3, 2 / 3, 1), (2, 4, 6, 8), strict=True)
    ]
    ticks += [f'<text x="{x(0) - 8:.1f}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in (0, 0.5, 1)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12" fill="#1c2126">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            f'<text x="{MARGIN}" y="20">Scale of a network (blue) and of an ideal observer (orange).</text>',
            f'<text x="{MARGIN}" y="34">Matching score {score:.2f}, largest difference {difference:.2f}</text>',
            f'<path d="M{x(0)} {y(1)}V{y(0)}H{x(1)}" fill="none" stroke="#888"/>',
            f'<polygon fill="#1f5fa8" fill-opacity="0.2" points="{band}"/>',
            f'<polyline fill="none" stroke="#888" stroke-dasharray="4 4" points="{points(LEVELS)}"/>',
            f'<polyline fill="none" stroke="#b4531f" stroke-width="2" points="{points(ideal_n)}"/>',
            f'<polyline fill="none" stroke="#1f5fa8" stroke-width="2" points="{points(mean.psi_n)}"/>',
            *ticks,
            f'<text x="{x(0.5)}" y="{HEIGHT - 10}" text-anchor="middle">spatial frequency z₀, cycles per image</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    main()
