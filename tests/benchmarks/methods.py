"""One protocol for all methods: do the directions of their components change their own examples, and only those?

    python tests/benchmarks/methods.py [--model digits|minilm|pydoc] [--splits 0 1] [--permutations 5] [--components K]
                                       [--pairs 1500] [--methods gradients …] [--controls shuffled …]
                                       [--folder FOLDER] [--output FILE]

Every method is a factorization of the same Fishers with the same number of components. Its directions are whitened and
verified with the same number of top examples and the same rule for the baseline. Nothing is tuned for one method. The
main number is the median of the matched KL ratio on held-out examples, for the informative sign, with a bootstrap
interval over the components. Four rows are controls:

- `random, own directions`: random components without whitening. The bar is a matched ratio of 1.3.
- `npeff, not normalized`: npeff of Fishers that are not divided by their norms. Its top examples have large Fishers,
  which raises the ratio with a random baseline. The matched ratio must not rise with it.
- `npeff, permuted weights`: npeff of models whose weights are permuted within each tensor, pooled over the
  permutations. The bar: at most 5% of the components are above all controls, with Bonferroni's correction for the
  number of components of a run.
- `npeff, shuffled examples`: the directions of npeff, with coefficients that are shuffled over the examples. The top
  examples are then random. The bar is the same 5%.

Everything is kept in the folder, and the same command goes on where it stopped. `--model minilm` needs
NPEFF_SHARED_DATA; `--model pydoc` trains its model, in three minutes or less, and needs nothing that Python and the
extra `hf` do not have. `README.md` beside this file keeps results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from fisher_stage import minilm
from methods_stage import runs
from methods_stage.runs import Problem
from methods_stage.scores import Row, quotient, summary
from npeff.statistics.ratio_intervals import LEVEL
from quickstart import machine

NPEFF = "npeff"
OTHERS = ("gradients", "squared", "kmeans", "pca", "random")
"""Other methods, by their value of `factorization.kind`. That of npeff is `fishers`."""
CONTROLS = ("random-own", "not-normalized", "shuffled")
"""Rows that are controls, besides the permuted weights. Only `shuffled` needs no further lift."""
RANDOM_OWN, NOT_NORMALIZED = "random, own directions", "npeff, not normalized"
PERMUTED, SHUFFLED = "npeff, permuted weights", "npeff, shuffled examples"
CONTROL_ROWS = dict(zip(CONTROLS, (RANDOM_OWN, NOT_NORMALIZED, SHUFFLED), strict=True))
COLUMNS = ("matched ratio", "by trace", "raw ratio", "all components", "above 1", "above 2", "above controls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["digits", "minilm", "pydoc"], default="digits")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1], help="seeds of the runs")
    parser.add_argument("--permutations", type=int, default=5, help="number of models with permuted weights")
    parser.add_argument("--components", type=int, help="number of components; that of the run file by default")
    parser.add_argument("--pairs", type=int, default=1500, help="number of pairs of --model minilm")
    parser.add_argument("--methods", nargs="+", default=OTHERS, choices=OTHERS, help="besides npeff and the controls")
    parser.add_argument("--controls", nargs="*", default=CONTROLS, choices=CONTROLS, help="rows that are controls")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/methods"))
    parser.add_argument("--output", type=Path, help="runs/benchmarks/methods-MODEL.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.model == "digits":
        problem = runs.digits(arguments.folder, arguments.components)
    elif arguments.model == "pydoc":
        problem = runs.pydoc(arguments.folder, arguments.components)
    elif minilm.available():
        problem = runs.minilm_pairs(arguments.folder, arguments.components, arguments.pairs)
    else:
        print("minilm: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
        return
    output = arguments.output or Path(f"runs/benchmarks/methods-{arguments.model}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    about, rows = machine(), _rows_of_all(problem, arguments)
    results = {name: _result(each, rows[NPEFF]) for name, each in rows.items()}
    if arguments.permutations:
        permuted = _permuted(problem, arguments.splits[0], range(arguments.permutations))
        rows[PERMUTED] = permuted["plain"]
        results[PERMUTED] = _result(permuted["plain"], rows[NPEFF]) | {
            "above controls, corrected": summary(permuted["corrected"]).get("above controls")
        }
    _print(problem.name, results)
    found = {"machine": about, "splits": arguments.splits, "results": results, "rows": rows}
    output.write_text(json.dumps(found, indent=2, default=_to_json) + "\n")
    print(f"written to {output}")


def _rows_of_all(problem: Problem, arguments: argparse.Namespace) -> dict[str, list[list[Row]]]:
    """Return the rows of the table `verification`, by method and by split."""
    found: dict[str, list[list[Row]]] = {}
    for split in arguments.splits:
        own = runs.lifted(problem.config(split, factorization={"name": NPEFF}))
        found.setdefault(NPEFF, []).append(runs.verified(own))
        for kind in arguments.methods:
            run = runs.lifted(problem.config(split, factorization={"name": kind, "kind": kind}))
            found.setdefault(kind, []).append(runs.verified(run))
        for name in arguments.controls:
            found.setdefault(CONTROL_ROWS[name], []).append(_control(problem, split, name))
    return found


def _control(problem: Problem, split: int, name: str) -> list[Row]:
    """Return the rows of the table `verification` of one of `CONTROLS`."""
    if name == "shuffled":
        run = runs.lifted(problem.config(split, factorization={"name": NPEFF}))
        return runs.verified_otherwise(run, "verify-shuffled", runs.shuffled(run))
    if name == "random-own":
        random = {"name": name, "kind": "random"}
        return runs.verified(runs.lifted(problem.config(split, factorization=random, lift={"direction": "own"})))
    weighted = {"name": name, "example_weights": runs.SQUARED_NORM}
    run = runs.lifted(problem.config(split, factorization=weighted))
    return runs.verified_otherwise(run, "verify-not-normalized", runs.unnormalized(run))


def _permuted(problem: Problem, split: int, permutations: Sequence[int]) -> dict[str, list[list[Row]]]:
    """Return the rows of npeff for the models with permuted weights: with 95% confidence, and corrected.

    The table `verification` has the decision at the level of 95% and no p-value. The corrected decision is therefore
    measured again at the level 1 − 0.05/K.
    """
    found: dict[str, list[list[Row]]] = {"plain": [], "corrected": []}
    for permutation in permutations:
        config = problem.config(split, permutation, factorization={"name": NPEFF})
        run, corrected = runs.lifted(config), 1 - (1 - LEVEL) / config.factorization.n_components
        found["plain"].append(runs.verified(run))
        found["corrected"].append(runs.verified_otherwise(run, "verify-corrected", level=corrected))
    return found


def _result(rows: Sequence[Sequence[Row]], npeff: Sequence[Sequence[Row]]) -> dict[str, Any]:
    pooled, single = summary(rows), [summary([each]) for each in rows]
    compared = None if npeff is rows else quotient(npeff, rows)
    return {"pooled": pooled, "single": single, "npeff / this": compared}


def _print(problem: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{problem}: held-out examples, informative sign; medians and shares of the matched components (95%)\n")
    print(f"| method | matched | {' | '.join(COLUMNS)} | by run | npeff / this |")
    print("|" + "---|" * (len(COLUMNS) + 4))
    for name, result in results.items():
        pooled = result["pooled"]
        cells = [str(pooled.get(column, "–")) for column in COLUMNS]
        if corrected := result.get("above controls, corrected"):
            cells[-1] += f"; corrected {corrected}"
        by_run = "; ".join(str(each.get("matched ratio", "–")) for each in result["single"])
        cells += [by_run, str(result["npeff / this"] or "–")]
        print(f"| {name} | {pooled['matched']} of {pooled['components']} | {' | '.join(cells)} |")
    print()


def _to_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is not a value of JSON")


if __name__ == "__main__":
    main()
