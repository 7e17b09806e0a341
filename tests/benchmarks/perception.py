"""Difference scaling: recovery of a known scale, coverage of the intervals, and an opponent.

    python tests/benchmarks/perception.py [--simulations 200] [--draws 1000] [--figure FILE] [--output FILE]

A simulated observer compares the 81 triplets of 13 levels, with the scale log(1 + 4s)/log 5 and σ = 0.1. The opponent
is a least-squares fit of the same contrasts to the probits of the observed proportions, clipped to 1/(2n) and
1 − 1/(2n) for n trials per triplet. `--figure` writes the picture of docs/perception.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from npeff.perception.difference_scaling import DifferenceScaling, answer_probability, triplets
from npeff.perception.gaussian_texture import frequency_information
from npeff.perception.matching import area_matching_score
from npeff.perception.scales import perceptual_scale
from numpy.typing import NDArray
from quickstart import machine
from scipy.special import ndtri

N_LEVELS, SIGMA, LEVEL = 13, 0.1, 0.95
LEVELS = np.linspace(0, 1, N_LEVELS)
TRUTH = np.log1p(4 * LEVELS) / math.log(5)
REPETITIONS = (5, 25, 100)
RECOVERIES = 20
WIDTH, HEIGHT, MARGIN = 420, 320, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=200, help="experiments of the coverage")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws of an interval")
    parser.add_argument("--figure", type=Path, help="an SVG file")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/perception.json"))
    arguments = parser.parse_args()
    if arguments.figure is not None:
        arguments.figure.write_text(_figure(), encoding="utf-8")
        return
    found = {"machine": machine(), "recovery": _recovery(), "coverage": _coverage(arguments)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {arguments.output}")


def answers(psi_n: NDArray[np.float64], sigma: float, repetitions: int, seed: int) -> NDArray[np.float64]:
    """Return the rows of a simulated observer."""
    shown = np.repeat(triplets(len(psi_n)), repetitions, axis=0)
    drawn = np.random.default_rng(seed).random(len(shown)) < answer_probability(psi_n, sigma, shown)
    return np.column_stack([shown, drawn])


def least_squares(rows: NDArray[np.float64], repetitions: int) -> NDArray[np.float64]:
    """Return the opponent's scale."""
    shown, of_N = np.unique(rows[:, :3].astype(int), axis=0, return_inverse=True)
    share_T = np.bincount(of_N.ravel(), rows[:, 3]) / repetitions
    probits_T = ndtri(np.clip(share_T, 1 / (2 * repetitions), 1 - 1 / (2 * repetitions)))
    contrasts_Tn = np.zeros((len(shown), N_LEVELS))
    for place, coefficient in enumerate((1, -2, 1)):
        contrasts_Tn[np.arange(len(shown)), shown[:, place]] = coefficient
    slopes_n = np.linalg.lstsq(contrasts_Tn[:, 1:], probits_T, rcond=None)[0]
    return np.concatenate([[0], slopes_n]) / slopes_n[-1]


def _recovery() -> list[dict[str, float]]:
    print(f"\nLargest error of the scale, mean of {RECOVERIES} experiments\n")
    print(
        "| answers per triplet | maximum likelihood | least squares | estimate of σ | ms per fit |\n" + "|---" * 5 + "|"
    )
    found = []
    for repetitions in REPETITIONS:
        errors, opponents, sigmas, seconds = [], [], [], []
        for seed in range(RECOVERIES):
            rows = answers(TRUTH, SIGMA, repetitions, seed)
            began = time.process_time()
            fitted = DifferenceScaling().fit(rows)
            seconds.append(time.process_time() - began)
            errors.append(np.abs(fitted.psi_ - TRUTH).max())
            opponents.append(np.abs(least_squares(rows, repetitions) - TRUTH).max())
            sigmas.append(fitted.sigma_)
        row = {
            "repetitions": repetitions,
            "error": float(np.mean(errors)),
            "least_squares": float(np.mean(opponents)),
            "sigma": float(np.mean(sigmas)),
            "ms": 1e3 * float(np.median(seconds)),
        }
        found.append(row)
        cells = [f"{row[name]:.3f}" for name in ("error", "least_squares", "sigma")]
        print(f"| {repetitions} | {' | '.join(cells)} | {row['ms']:.1f} |")
    return found


def _coverage(arguments: argparse.Namespace) -> dict[str, Any]:
    inside_n, of_sigma, seconds = np.zeros(N_LEVELS), 0, []
    for seed in range(arguments.simulations):
        fitted = DifferenceScaling().fit(answers(TRUTH, SIGMA, 25, 1000 + seed))
        began = time.process_time()
        found = fitted.intervals(LEVEL, n_draws=arguments.draws, seed=seed)
        seconds.append(time.process_time() - began)
        inside_n += (found.low_n <= TRUTH) & (found.high_n >= TRUTH)
        of_sigma += found.sigma[0] <= SIGMA <= found.sigma[1]
    share_n = inside_n[1:-1] / arguments.simulations
    result = {
        "simulations": arguments.simulations,
        "mean": float(share_n.mean()),
        "lowest": float(share_n.min()),
        "highest": float(share_n.max()),
        "sigma": of_sigma / arguments.simulations,
        "seconds": float(np.median(seconds)),
    }
    print(f"\n95% intervals, 25 answers per triplet, {arguments.simulations} experiments, {arguments.draws} draws:")
    print(f"coverage {result['mean']:.3f} on average ({result['lowest']:.3f} to {result['highest']:.3f} by level),")
    print(f"{result['sigma']:.3f} for σ; {result['seconds']:.2f} s per experiment\n")
    return result


def _figure() -> str:
    """Return the picture of the documentation: a measured scale of spatial frequency and the predicted one."""
    frequencies = np.linspace(1, 5, N_LEVELS)
    predicted = perceptual_scale(lambda z: frequency_information(z, 1.1), frequencies).psi_n
    fitted = DifferenceScaling().fit(answers(predicted, SIGMA, 25, 0))
    found, score = fitted.intervals(0.99), area_matching_score(LEVELS, fitted.psi_, predicted)

    def x(value: float) -> float:
        return MARGIN + value * (WIDTH - MARGIN - 16)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - value * (HEIGHT - MARGIN - 40)

    def line(values: NDArray[np.float64], style: str) -> str:
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(LEVELS, values, strict=True))
        return f'<polyline fill="none" {style} points="{points}"/>'

    marks = [
        f'<line x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="#1f5fa8"/>'
        f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="#1f5fa8"/>'
        for s, v, low, high in zip(LEVELS, fitted.psi_, found.low_n, found.high_n, strict=True)
    ]
    ticks = [
        f'<text x="{x(s):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{f:g}</text>'
        for s, f in zip((0, 0.5, 1), (1, 3, 5), strict=True)
    ]
    ticks += [f'<text x="{x(0) - 8:.1f}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in (0, 0.5, 1)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12" fill="#1c2126">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            f'<text x="{MARGIN}" y="20">Scale of spatial frequency: measured (99% intervals), predicted,</text>',
            f'<text x="{MARGIN}" y="34">straight line. Area matching score {score:.2f}</text>',
            f'<path d="M{x(0)} {y(1)}V{y(0)}H{x(1)}" fill="none" stroke="#888"/>',
            line(LEVELS, 'stroke="#888" stroke-dasharray="4 4"'),
            line(predicted, 'stroke="#b4531f" stroke-width="2"'),
            *marks,
            *ticks,
            f'<text x="{x(0.5)}" y="{HEIGHT - 10}" text-anchor="middle">spatial frequency z₀</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    main()
