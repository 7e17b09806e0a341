"""How much does the statement `above_controls` depend on the random direction that was drawn for control (b)?

    python tests/benchmarks/controls.py [--directions 20] [--splits 0 1] [--folder FOLDER] [--output FILE]

The stage `verify` draws one random direction for each component. Its 95% statement resamples the examples and not the
direction. For the digits and the factorization of methods.py, each component is compared with many random directions,
on its held-out examples and with its informative sign. The table has the decision with one direction, for all of them,
and the decision if the direction is drawn again in each of the 2,000 draws. The same is done with coefficients that are
shuffled over the examples: there, no component should be above its controls. `README.md` beside this file keeps
results.

Legend: R random directions, S draws.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_stage import runs
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of, lifted_components
from npeff.stages.verify.examples import Effects
from npeff.stages.verify.options import VerificationPaths
from npeff.stages.verify.steps import Probe
from npeff.stages.verify.worker import VerificationWorker
from npeff.stages.worker_specs import model_spec
from npeff.statistics.ratio_intervals import DRAWS, LEVEL, Measured, confidence, ratio_draws
from npeff.verification import random_direction
from numpy.typing import NDArray
from quickstart import machine


@dataclass(frozen=True)
class Compared:
    """A component and its controls, on the held-out examples."""

    own: Measured
    others: list[Measured]
    """Controls (a) and (c)."""
    random: list[Measured]
    """Control (b), for each random direction."""
    seed: int

    def with_one(self) -> NDArray[np.bool_]:
        """Return the decision for each random direction, (R,)."""
        return np.array([confidence(self.own, [*self.others, each], self.seed).above_controls for each in self.random])

    def with_all(self) -> bool:
        """Return the decision if a direction is drawn in each draw."""
        own_S, *others = (ratio_draws(each, self.seed) for each in (self.own, *self.others))
        random_RS = np.stack([ratio_draws(each, self.seed) for each in self.random])
        drawn_S = np.random.default_rng([self.seed, 1]).integers(len(random_RS), size=DRAWS)
        threshold_S = np.max([np.ones(DRAWS), *others, random_RS[drawn_S, np.arange(DRAWS)]], axis=0)
        return bool(np.mean(own_S > threshold_S) >= LEVEL)

    def spreads(self) -> tuple[float, float]:
        """Return the standard deviations of the logarithm of control (b): over directions, and over draws."""
        over_directions = float(np.std(np.log([each.ratio for each in self.random]), ddof=1))
        over_draws = [np.std(np.log(ratio_draws(each, self.seed))) for each in self.random]
        return over_directions, float(np.mean(over_draws))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directions", type=int, default=20, help="number of random directions of a component")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1], help="seeds of the runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/methods"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/controls.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    problem, found = runs.digits(arguments.folder, None), dict[str, list[Compared]]()
    for split in arguments.splits:
        run = runs.lifted(problem.config(split, factorization={"name": "npeff"}))
        for name, factorization in [("npeff", run.factorization), ("npeff, shuffled examples", runs.shuffled(run))]:
            found.setdefault(name, []).extend(_compared(run, factorization, arguments.directions))
    results = {name: _summary(each) for name, each in found.items()}
    print(f"\n{problem.name}: held-out examples, informative sign, {arguments.directions} random directions\n")
    columns = list(next(iter(results.values())))
    print(f"| components | {' | '.join(columns)} |")
    print("|" + "---|" * (len(columns) + 1))
    for name, result in results.items():
        print(f"| {name} | {' | '.join(str(result[column]) for column in columns)} |")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")


def _compared(run: RunDirectory, factorization: Path, n_directions: int) -> list[Compared]:
    worker, found = _worker(run, factorization), list[Compared]()
    for component in lifted_components(run):
        direction = worker._tested_direction(component)
        assert direction is not None
        tested = worker._hypothesis(component, direction)
        groups, own = tested.groups["held_out"], tested.own
        if not len(groups.top) or not len(groups.matched.examples_m):
            continue
        before = worker._steps.unmoved(groups)
        seeds = [worker._seed(component, f"random direction {number}") for number in range(n_directions)]
        probes = {f"{seed}": Probe(random_direction(direction, seed=seed), None) for seed in seeds}
        result = worker._steps.test(own, tested.sign, groups, before, probes | tested.controls)
        traces_N = worker._candidates.traces_N
        traces = Effects(np.arange(len(traces_N)), traces_N)
        own_kl, of_traces, other, *random = (
            each.compared(groups.top, groups.matched)
            for each in (
                *(result.kl, traces, result.controls["other"].kl),
                *(result.controls[name].kl for name in probes),
            )
        )
        found.append(Compared(own_kl, [of_traces, other], random, tested.seeds["held_out"]))
    return found


def _worker(run: RunDirectory, factorization: Path) -> VerificationWorker:
    paths = replace(VerificationPaths.of(run, run.partial_results("controls")), factorization=factorization)
    return VerificationWorker(model_spec(run, fingerprint_of(run)), paths, runs.steps_only(run))


def _summary(found: list[Compared]) -> dict[str, Any]:
    one_CR = np.stack([each.with_one() for each in found])
    shares_R, of_component_C = one_CR.mean(axis=0), one_CR.mean(axis=1)
    over_directions, over_draws = np.median([each.spreads() for each in found], axis=0)
    return {
        "number": len(found),
        "median of (b)": f"{np.median([each.ratio for one in found for each in one.random]):.2f}",
        "SD of log (b) over directions": f"{over_directions:.2f}",
        "SD of log (b) over draws of examples": f"{over_draws:.2f}",
        "above controls, one direction": f"{shares_R.mean():.1%} ({shares_R.min():.0%} to {shares_R.max():.0%})",
        "above controls, direction drawn again": f"{np.mean([each.with_all() for each in found]):.1%}",
        "decision depends on the direction": f"{np.mean((of_component_C > 0) & (of_component_C < 1)):.0%}",
    }


if __name__ == "__main__":
    main()
