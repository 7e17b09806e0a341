"""Do components find the heuristics that were planted into a model's training labels, and does repair mend them?

    python tests/benchmarks/heuristics.py [--seeds 0 1 2 3 4] [--components 48] [--examples 4800] [--plant-rate 0.7]
                                          [--counter-share 0.3] [--top 20] [--edits 6] [--max-harm 0.01]
                                          [--verbose] [--output FILE]

Every seed is a run of its own: the task `planted-heuristics` draws its pairs and trains its model, and the command's
own stages compute Fishers and factorize them on two thirds of the examples, and choose edits of the model on these.
What is printed of components and of the edited model is measured on the other third; a component that has the best AUC
was chosen on the first two. Prints tables and writes JSON.

A heuristic is *used* on an example where its cue is there and the model gives its answer; the model is *fooled* where
it is used and wrong. Whatever knows the prediction has a high AUC for either against all other examples, so it is given
again among the examples with that prediction, cue or no cue. Next to a single component's AUC stand that of a logistic
regression on all coefficients of an example, and that of the model's probability of the heuristic's answer, up or down,
which needs no Fishers.

Legend: N examples, K components, C classes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import torch
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import LogProgress, SilentProgress
from npeff.tasks import load_task
from quickstart import machine
from safetensors.torch import load_file
from scipy.special import softmax
from scipy.stats import hypergeom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ANSWERS = {"overlap": 0, "negation": 2}
"""The class that each heuristic says."""
TAKEN = ("heuristic", "template", "counter_example", "correct", "prediction")
"""Columns of the examples' table."""
SIGNIFICANT = 0.01
"""Of a p-value times the number of components that it is the best of."""


def measured(
    options: dict[str, Any], n_components: int, top: int, repair: dict[str, Any], *, verbose: bool
) -> dict[str, Any]:
    """One run: how often the model is right, what the components say of either heuristic, and what a repair mends."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        document = {
            "run_dir": f"{folder}/run",
            "seed": options["seed"],
            "task": {"name": "planted-heuristics", "options": options},
            "factorization": {"n_components": n_components, "stability_examples": 0},
            "repair": repair,
            "executor": {"kind": "serial"},
        }
        run = RunDirectory.create(RunConfig.model_validate(document))
        progress = LogProgress() if verbose else SilentProgress()
        npeff.compute_fishers(run, progress=progress)
        fit = npeff.factorize(run, progress=progress)
        store = npeff.ComponentStore.open(run.path)
        table = store.table("examples").to_pydict()
        coefficients_NK = np.asarray(store.coefficients.compute())
        npeff.lift(run, progress=progress)
        edits = npeff.repair(run, progress=progress)["edits"]
        correct_after_N = correct_after(run) if edits else np.array(table["correct"])
    columns = {name: np.array(table[name]) for name in TAKEN}
    columns["held_out"] = np.array(table["split"]) == "held_out"
    columns["p_NC"] = softmax(np.array(table["logits"], dtype=np.float64), axis=1)
    correct, counter = columns["correct"], columns["counter_example"]
    held_out = columns["held_out"]
    return {
        "options": options,
        "repair": {
            "edits": edits,
            **{
                name: {"n": int(part.sum()), "before": correct[part].mean(), "after": correct_after_N[part].mean()}
                for name, part in {
                    "counter": held_out & counter,
                    "elsewhere": held_out & ~counter,
                    **{heuristic: held_out & counter & (columns["heuristic"] == heuristic) for heuristic in ANSWERS},
                }.items()
            },
        },
        "n_components": n_components,
        "explained": fit["explained"],
        "explained_held_out": fit["explained_held_out"],
        "accuracy_elsewhere": correct[~counter].mean(),
        "accuracy_no_cue": correct[columns["heuristic"] == "none"].mean(),
        "accuracy_counter": correct[counter].mean(),
        "heuristics": {name: found(name, columns, coefficients_NK, top) for name in ANSWERS},
        "seconds": time.monotonic() - began,
    }


def correct_after(run: RunDirectory) -> np.ndarray:
    """Which examples the edited model, as it was saved, gets right."""
    task = load_task(run.config.task.name, run.config.task.options)
    model, examples = task.model(run.task_cache), task.examples(run.task_cache)
    model.load_state_dict(load_file(run.repaired / "model.safetensors"), strict=False)
    with torch.no_grad():
        predicted = task.logits(model, examples.batch(range(len(examples)))).argmax(1).numpy()
    return predicted == np.array(examples.table()["label"])


def found(name: str, columns: dict[str, np.ndarray], coefficients_NK: np.ndarray, top: int) -> dict[str, Any]:
    """What the components say of one heuristic."""
    answer, held_out = ANSWERS[name], columns["held_out"]
    cue = columns["heuristic"] == name
    counter = cue & columns["counter_example"]
    same_prediction = columns["prediction"] == answer
    used, fooled = cue & same_prediction, counter & same_prediction
    everywhere = np.ones_like(cue)
    return {
        "accuracy_counter": columns["correct"][counter].mean(),
        "fooled_share_of_mistakes": fooled.sum() / max(1, (counter & ~columns["correct"]).sum()),
        **{
            key: enrichment(truth[held_out], coefficients_NK[held_out], columns["template"][held_out], top)
            for key, truth in (("counter_examples_in_top", counter), ("fooled_in_top", fooled))
        },
        "auc": {
            which: auc(truth, among, held_out, coefficients_NK, columns["p_NC"][:, answer])
            for which, truth, among in (
                ("used, all", used, everywhere),
                ("used, same prediction", used, same_prediction),
                ("fooled, all", fooled, everywhere),
                ("fooled, same prediction", fooled, same_prediction),
                ("fooled, used", fooled, used),
            )
        },
    }


def enrichment(truth: np.ndarray, coefficients_NK: np.ndarray, templates: np.ndarray, top: int) -> dict[str, Any]:
    """Of the component whose `top` examples have the most: their share, and P(as many among examples drawn at random),
    hypergeometric, times K. An example with coefficient 0 is not among a component's examples."""
    N, K = coefficients_NK.shape
    tests = []
    for component in range(K):
        order = np.argsort(-coefficients_NK[:, component], kind="stable")[:top]
        order = order[coefficients_NK[order, component] > 0]
        p = hypergeom.sf(truth[order].sum() - 1, N, truth.sum(), len(order))
        tests.append((min(1.0, K * float(p)), component, order))
    p, component, order = min(tests, key=lambda test: test[:2])
    return {
        "component": component,
        "share": float(truth[order].mean()) if len(order) else 0.0,
        "expected": float(truth.mean()),
        "p": p,
        "n_significant": sum(test[0] < SIGNIFICANT for test in tests),
        "templates": dict(Counter(templates[order].tolist()).most_common()),
    }


def auc(
    truth: np.ndarray, among: np.ndarray, held_out: np.ndarray, coefficients_NK: np.ndarray, p_N: np.ndarray
) -> dict[str, Any]:
    """On held-out examples: of the component that is best on the fitted ones, of a regression on all, of the model's
    probability with the sign that is better on the fitted ones."""
    fitted, judged = among & ~held_out, among & held_out
    if any(len(set(truth[part])) < 2 for part in (fitted, judged)):
        return dict.fromkeys(("component", "one", "all", "probability"))
    best = int(np.argmax([roc_auc_score(truth[fitted], column[fitted]) for column in coefficients_NK.T]))
    sign = 1 if roc_auc_score(truth[fitted], p_N[fitted]) >= 0.5 else -1
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(coefficients_NK[fitted], truth[fitted])
    scores = {
        "one": coefficients_NK[judged, best],
        "all": probe.decision_function(coefficients_NK[judged]),
        "probability": sign * p_N[judged],
    }
    return {"component": best} | {name: float(roc_auc_score(truth[judged], score)) for name, score in scores.items()}


def show(results: list[dict[str, Any]]) -> None:
    print(f"\n{'':>6}{'accuracy':>41}{'explained':>11}\n{'seed':>6}", end="")
    print(f"{'elsewhere':>11}{'no cue':>8}{'overlap ✗':>11}{'negation ✗':>11}{'held out':>11}{'s':>6}")
    for row in results:
        heuristics = row["heuristics"]
        print(
            f"{row['options']['seed']:>6}{row['accuracy_elsewhere']:>11.3f}{row['accuracy_no_cue']:>8.3f}"
            f"{heuristics['overlap']['accuracy_counter']:>11.3f}{heuristics['negation']['accuracy_counter']:>11.3f}"
            f"{row['explained_held_out']:>11.3f}{row['seconds']:>6.0f}"
        )
    print("\nrepair: accuracy on held-out pairs, before → after, by the edited model")
    print(f"{'seed':>6}{'counter-examples':>24}{'elsewhere':>24}{'overlap ✗':>24}{'negation ✗':>24}{'edits':>7}")
    for row in results:
        cells = (row["repair"][part] for part in ("counter", "elsewhere", *ANSWERS))
        texts = [f"{c['before']:.3f} → {c['after']:.3f} ({c['after'] - c['before']:+.3f})" for c in cells]
        print(f"{row['options']['seed']:>6}" + "".join(f"{t:>24}" for t in texts) + f"{len(row['repair']['edits']):>7}")
    for name in ANSWERS:
        print(f"\n{name}: share of the best component's top examples (expected share; p; components with p < 0.01)")
        print(f"{'seed':>6}{'counter-examples':>32}{'fooled':>32}")
        for row in results:
            cells = (row["heuristics"][name][key] for key in ("counter_examples_in_top", "fooled_in_top"))
            texts = [f"{c['share']:.2f} ({c['expected']:.2f}; {c['p']:.0e}; {c['n_significant']})" for c in cells]
            print(f"{row['options']['seed']:>6}" + "".join(f"{text:>32}" for text in texts))
        print(f"{name}: AUC of one component / all components / the model's probability")
        print(f"{'seed':>6}" + "".join(f"{which:>26}" for which in results[0]["heuristics"][name]["auc"]))
        for row in results:
            cells = (_cell(value) for value in row["heuristics"][name]["auc"].values())
            print(f"{row['options']['seed']:>6}" + "".join(f"{cell:>26}" for cell in cells))


def _cell(value: dict[str, Any]) -> str:
    return " / ".join("–" if value[key] is None else f"{value[key]:.2f}" for key in ("one", "all", "probability"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--components", type=int, default=48)
    parser.add_argument("--examples", type=int, default=4800)
    parser.add_argument("--plant-rate", type=float, default=0.7)
    parser.add_argument("--counter-share", type=float, default=0.3)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--edits", type=int, default=6, help="repair.max_edits")
    parser.add_argument("--max-harm", type=float, default=0.01, help="repair.max_harm")
    parser.add_argument("--verbose", action="store_true", help="show the progress of every run")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/heuristics.json"))
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    about, results = machine(), []
    for seed in arguments.seeds:
        options = {
            "seed": seed,
            "n_examples": arguments.examples,
            "plant_rate": arguments.plant_rate,
            "counter_share": arguments.counter_share,
        }
        repair = {"max_edits": arguments.edits, "max_harm": arguments.max_harm}
        results.append(measured(options, arguments.components, arguments.top, repair, verbose=arguments.verbose))
        output.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")
        print(f"seed {seed} done in {results[-1]['seconds']:.0f} s", flush=True)
    show(results)
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
