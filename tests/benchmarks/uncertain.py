"""Are components of uncertain examples more selective than components of all examples?

    python tests/benchmarks/uncertain.py [--model digits|minilm] [--splits 0 1] [--below 0.9 0.99]
                                         [--folder FOLDER] [--output FILE]

`factorization.examples: uncertain` fits the components on the examples whose largest class probability is below
`max_probability`. The other settings are those of npeff in methods.py, and the top examples are chosen among all
held-out examples. Everything is measured by passes (`verification.exact: true`), so that the ratios of both signs have
all three baselines. `README.md` beside this file keeps results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fisher_stage import minilm
from methods_stage import runs
from methods_stage.scores import Row, median, share
from quickstart import machine

BASELINES = {"same class and trace": "kl_ratio_matched", "trace alone": "kl_ratio_trace", "random": "kl_ratio"}
COLUMNS = ("fitted", "sign", "matched", *BASELINES, "all components", "above controls", "KL of the top", "reached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["digits", "minilm"], default="digits")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1], help="seeds of the runs")
    parser.add_argument("--below", type=float, nargs="+", default=[0.9, 0.99], help="values of max_probability")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/methods"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/uncertain.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.model == "minilm" and not minilm.available():
        print("minilm: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
        return
    choices: dict[str, dict[str, Any]] = {"all examples": {"name": "npeff-exact"}}
    for bound in arguments.below:
        name = f"uncertain-{bound}".replace(".", "-")
        choices[f"p < {bound:g}"] = {"name": name, "examples": "uncertain", "max_probability": bound}
    if arguments.model == "digits":
        problem = runs.digits(arguments.folder, None)
    else:
        problem = runs.minilm_pairs(arguments.folder, None, 1500)
    results: dict[str, dict[str, Any]] = {}
    for title, factorization in choices.items():
        fitted, rows = [], list[list[Row]]()
        for split in arguments.splits:
            run = runs.lifted(problem.config(split, factorization=factorization, verification={"exact": True}))
            record = run.record("factorize")
            assert record is not None
            fitted.append(record["n_fit"])
            rows.append(runs.verified(run))
        for sign in (True, False):
            result = {"fitted": "; ".join(map(str, fitted)), "sign": "informative" if sign else "other"}
            results[f"{title}, {result['sign']}"] = result | _summary(rows, sign)
    print(f"\n{problem.name}: held-out examples; medians over the matched components (95%)\n")
    print(f"| components of | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (len(COLUMNS) + 1))
    for title, result in results.items():
        print(f"| {title.rsplit(',', 1)[0]} | {' | '.join(str(result.get(column, '–')) for column in COLUMNS)} |")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=2, default=str) + "\n")
    print(f"\nwritten to {arguments.output}")


def _summary(splits: Sequence[Sequence[Row]], informative: bool) -> dict[str, Any]:
    """Summarize the rows of one sign. Rows without ratios, because no step reached the target, are not counted."""
    tested = [
        [row for row in rows if row["examples"] == "held_out" and row["informative"] is informative] for rows in splits
    ]
    known = [[row for row in rows if row["kl_ratio_matched"] is not None] for rows in tested]
    matched = [found for rows in known if (found := [row for row in rows if row["matched"]])]
    n_tested, n_known = (sum(map(len, groups)) for groups in (tested, known))
    facts: dict[str, Any] = {
        "matched": f"{sum(map(len, matched))} of {n_tested}",
        "reached": f"{n_known} of {n_tested}",
    }
    if not matched:
        return facts
    for title, column in BASELINES.items():
        facts[title] = median([np.array([row[column] for row in rows], dtype=np.float64) for rows in matched])
    every = [np.array([row["kl_ratio_matched"] for row in rows], dtype=np.float64) for rows in known if rows]
    facts["all components"] = median(every)
    facts["above controls"] = share([row["above_controls"] for rows in matched for row in rows])
    facts["KL of the top"] = f"{np.median([row['kl_top'] for rows in matched for row in rows]):.3g}"
    return facts


if __name__ == "__main__":
    main()
