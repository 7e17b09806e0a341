"""Do components mend wrong predictions better than training on the same examples, and along which directions?

    python tests/benchmarks/repair.py [--problems heuristics digits] [--seeds …] [--methods …] [--validation-only]
                                      [--folder FOLDER] [--output FILE]

Methods: the search of the stage `repair` along whitened and along own directions, one natural-gradient step with the
Fisher of all fitted examples, fine-tuning of all parameters, and LoRA of all Linear layers. All have the same tuning
examples: all fitted examples, or 50 of them, of which up to half have a wrong prediction. A third of the tuning
examples, the validation part, chooses one of six trials of each method (`sick`: of three), or none of them. The rest
trains it. All results are on the held-out examples, which take part in no choice. Their 95% intervals are bootstrap
intervals over the examples, within each seed. They do not contain the variation over models.

Everything is kept in the folder, and the same command goes on where it stopped. `--validation-only` prints the results
on the validation part and judges nothing. `README.md` beside this file keeps results.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.models.predictions import kl_divergence
from quickstart import machine
from repair_stage.problems import Prepared, Problem, prepared, problems
from repair_stage.scores import Estimate, Outcome, estimates
from repair_stage.trials import Chosen, batch_size_of, chosen, logits, methods

BUDGETS = ("50", "all")
COLUMNS = (
    *("method", "mended, %", "broken, %", "net change, points", "minus the first method", "net change by seed"),
    *("mean KL, nats", "changed models", "CPU s"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", default=["heuristics", "digits"], choices=problems())
    parser.add_argument("--seeds", type=int, nargs="+", help="those of each problem by default")
    parser.add_argument("--methods", nargs="+", help="all by default; the first is the reference")
    parser.add_argument("--validation-only", action="store_true", help="show the trials, and judge nothing")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/repair"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/repair.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "problems": {}}
    for name in arguments.problems:
        problem = problems()[name]
        records = _records(problem, arguments)
        if not arguments.validation_only:
            found["problems"][name] = {budget: _shown(problem, budget, records[budget]) for budget in BUDGETS}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(found, indent=2, default=asdict) + "\n")
    if not arguments.validation_only:
        print(f"\nwritten to {arguments.output}")


def _records(problem: Problem, arguments: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return one record per seed, for each budget and method."""
    records: dict[str, dict[str, list[dict[str, Any]]]] = {budget: {} for budget in BUDGETS}
    for seed in arguments.seeds or problem.seeds:
        made: Prepared | None = None
        for place, budget in enumerate(BUDGETS):
            known = methods(problem)
            for method, run in ((name, known[name]) for name in arguments.methods or known):
                key = "-".join((problem.name, str(seed), budget, method.replace(", ", "-")))
                file = arguments.folder / f"{key}.json"
                if not file.exists():
                    made = made or prepared(problem, seed, arguments.folder)
                    tuning, began = made.tunings[place], time.process_time()
                    choice = chosen(run(made, tuning, seed), made, tuning, batch_size_of(made))
                    seconds = time.process_time() - began
                    _print_trials(key, choice, seconds, [len(tuning.train), len(tuning.validation)])
                    if arguments.validation_only:
                        continue
                    record = _judged(made, choice) | {"seconds": seconds, "chosen": choice.trial, "tried": choice.tried}
                    file.write_text(json.dumps(record) + "\n")
                records[budget].setdefault(method, []).append(json.loads(file.read_text()))
    return records


def _print_trials(key: str, choice: Chosen, seconds: float, numbers: list[int]) -> None:
    print(f"{key}: {numbers[0]} training and {numbers[1]} validation examples, {seconds:.0f} s of CPU time", flush=True)
    for trial in choice.tried:
        values = {name: round(value, 4) for name, value in trial["validation"].items()}
        settings = {name: value for name, value in trial.items() if name != "validation"}
        print(f"   {'*' if trial is choice.trial else ' '} {settings} {values}", flush=True)


def _judged(made: Prepared, choice: Chosen) -> dict[str, Any]:
    """Return the results of the chosen model on the held-out examples."""
    loaded, size = made.loaded, batch_size_of(made)
    before, after = (logits(loaded, model, made.judged, size) for model in (loaded.model, choice.model))
    labels = torch.from_numpy(loaded.labels_N[made.judged])
    return {
        "wrong": made.wrong_N[made.judged].tolist(),
        "right_after": (after.argmax(-1) == labels).tolist(),
        "kl": kl_divergence(after, before).tolist(),
    }


def _shown(problem: Problem, budget: str, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print the table of a budget, and return its values."""
    outcomes = {
        method: [
            Outcome(np.array(each["wrong"]), np.array(each["right_after"]), np.array(each["kl"])) for each in found
        ]
        for method, found in records.items()
    }
    wrong, n = (sum(count(each.wrong_n) for each in next(iter(outcomes.values()))) for count in (np.sum, len))
    rows: dict[str, dict[str, Estimate]] = estimates(outcomes)
    print(f"\n{problem.name}, {budget} tuning examples: {n} judged examples, {wrong} of them wrong before\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    result = {}
    for method, row in rows.items():
        changed = sum(each["chosen"] is not None for each in records[method])
        seconds = sum(each["seconds"] for each in records[method])
        cells = (
            row["mended"].text(),
            row["broken"].text(),
            row["net"].text(sign=True),
            "" if method == next(iter(rows)) else row["net - reference"].text(sign=True),
            "; ".join(f"{100 * each.net():+.1f}" for each in outcomes[method]),
            row["kl"].text(1.0, 3),
            f"{changed} of {len(records[method])}",
            f"{seconds:.0f}",
        )
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
        trials = [{name: each[name] for name in ("chosen", "tried")} for each in records[method]]
        result[method] = {"estimates": row, "seconds": seconds, "seeds": trials}
    return result


if __name__ == "__main__":
    main()
