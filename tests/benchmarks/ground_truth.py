"""Are the components the strategies that a model is known to use?

    python tests/benchmarks/ground_truth.py [moved] [compiled] [outputs] [trained] [tracr] [tracr-verified]
                                            [prototypes] [--examples 1500] [--seeds 0 1 2 3 4]
                                            [--components 12] [--sketch-dim 1024]
                                            [--tracr FOLDER ...] [--output FILE]

Each section prints a table and has its place in one JSON file:

    moved       the rules of the task `compiled-rules`, whose weights were set by hand, one or two on an example: which
                component tells a rule's examples, in which weights its direction lies, and what moving the model along
                it changes
    compiled    the same rules, up to four on an example: what each method finds of them
    outputs     the same, with an output for each rule
    trained     twelve rules that a network was trained on (task `trained-rules`), up to four on an example
    tracr       RASP programs that Tracr compiled (task `tracr-program`), from the folders of `--tracr`
    tracr-verified  the same through all stages, with the verification of the directions (several_rules/verified.py)
    prototypes  the kinds of several_rules/cross_terms.py, for rules that act together

`tracr-verified` exports the programs itself if there are no `--tracr`: it makes an environment with tracr and jax.

In all sections, two thirds of the examples are fitted, and a rule's component is chosen on them.

`moved`: the component is the one whose coefficients tell the examples of the rule best; energy is the share of its
direction's squared entries in the weights that only this rule uses. All else is measured on the other third, with
coefficients fitted to it: the component's AUC, beside the best of another component and the best of a class's
probability. Then the model is moved until the rule's examples have a mean KL of 0.5: the mean KL of all others, the
ratio of the two, and the share of each whose prediction changes. Of the two signs the one with the larger KL ratio is
shown; both are in the file. With `--sketch-dim 0` nothing is sketched. `--components` and `--sketch-dim` are of this
section only.

The other sections (several_rules/): the share of rules that a component tells with an AUC of at least 0.95, on the
held-out examples with the largest number of active rules (`tracr`: on all of them). A component is read in three ways:
by its coefficients, by its evidence and by its whitened evidence. In parentheses: 2.5% and 97.5% of the mean over seeds
when the held-out examples of each seed are resampled. Energy as above, of own and of whitened directions, with the
share of the Fishers' trace in these weights beside it (the ceiling). Spearman: score against strength, on the held-out
examples on which the rule is active; median over rules.

Shapes: N examples, R rank, D sketch, K components, P parameters.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.directions import accumulate_directions, lift_weights, parameter_norm, zero_directions
from npeff.factorization.estimator import NPEFF
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.models.predictions import kl_divergence
from npeff.sketches import SketchSpec, make_sketch
from npeff.tasks.planted.compiled import CompiledRulesTask
from npeff.verification import find_step_size, moved
from quickstart import machine
from several_rules import tables
from several_rules.programs import exported
from several_rules.verified import tracr_verified
from sklearn.metrics import roc_auc_score
from torch import Tensor

BATCH = 100
TARGET_KL = 0.5
"""Mean over a rule's examples, in nats: enough to change predictions."""
TARGET_AUC, TARGET_ENERGY = 0.95, 0.9


def moved_rules(seeds: Sequence[int], n_examples: int, n_components: int, sketch_dim: int) -> dict[str, Any]:
    """All seeds of the task `compiled-rules`; a seed is of the examples, the sketch and the starts."""
    print(
        f"{'seed':>4} {'rule':<20}{'examples':>9}{'AUC':>8}{'next AUC':>10}{'class AUC':>11}{'energy':>8}"
        f"{'KL others':>11}{'KL ratio':>10}{'changed':>9}{'others':>8}"
    )
    runs = []
    for seed in seeds:
        run = _moved_run(seed, n_examples, n_components, sketch_dim)
        runs.append(run)
        for row in run["rules"]:
            print(
                f"{seed:>4} {row['rule']:<20}{row['n_examples']:>9}{row['auc']:>8.4f}{row['next_auc']:>10.3f}"
                f"{row['class_auc']:>11.3f}{row['energy']:>8.3f}{row['kl_others']:>11.2g}{row['kl_ratio']:>10.3g}{row['changed']:>9.2f}"
                f"{row['changed_others']:>8.2f}",
                flush=True,
            )
        print(
            f"{seed:>4} explained {run['explained']:.3f} (held out {run['explained_held_out']:.3f}), "
            f"{run['n_distinct']} components for {len(run['rules'])} rules, share of Fishers in their rules' weights "
            f"{run['fisher_share']:.3f}, {run['seconds']:.0f} s",
            flush=True,
        )
    rows = [row for run in runs for row in run["rules"]]
    reached = sum(row["auc"] >= TARGET_AUC and row["energy"] >= TARGET_ENERGY for row in rows)
    print(f"{reached} of {len(rows)} rules with an AUC of {TARGET_AUC} and {TARGET_ENERGY:.0%} of the energy;", end=" ")
    print(f"lowest AUC {min(row['auc'] for row in rows):.4f}, lowest energy {min(row['energy'] for row in rows):.3f}")
    return {"n_components": n_components, "sketch_dim": sketch_dim, "target_kl": TARGET_KL, "runs": runs}


def _moved_run(seed: int, n_examples: int, n_components: int, sketch_dim: int) -> dict[str, Any]:
    began = time.monotonic()
    task = CompiledRulesTask(seed=seed, n_examples=n_examples)
    model, examples, masks = task.model(Path()), task.examples(Path()), task.rule_masks()
    table = examples.table()
    fired = {name: table[f"rule_{name}"].to_numpy() for name in masks}
    n_rules_N = table["n_rules"].to_numpy()
    layout = select_parameters(model)
    kind = SketchSpec("tensorsketch", sketch_dim) if sketch_dim else SketchSpec("identity")
    fishers = PerExampleFishers(model, task.logits, layout, make_sketch(kind, layout, seed))
    exact = PerExampleFishers(model, task.logits, layout, make_sketch(SketchSpec("identity"), layout, 0))
    flat_masks = {name: _flat(mask, layout.names).bool() for name, mask in masks.items()}
    factors, norms, shares = [], [], []
    for start in range(0, len(examples), BATCH):
        rows = range(start, min(start + BATCH, len(examples)))
        batch = examples.batch(rows)
        found = fishers(batch)
        factors.append(found.factors_BRD)
        norms.append(found.frobenius_norms_B)
        energy_BP = (found if not sketch_dim else exact(batch)).factors_BRD.double().square().sum(1)
        for i, energy_P in zip(rows, energy_BP, strict=True):
            if n_rules_N[i]:
                inside = torch.stack([flat_masks[name] for name in masks if fired[name][i]]).any(0)
                shares.append(float(energy_P[inside].sum() / energy_P.sum()))
    factors_NRD, norms_N = torch.cat(factors), torch.cat(norms)
    n_fitted = 2 * len(examples) // 3
    held_out = np.arange(n_fitted, len(examples))
    npeff = NPEFF(n_components, random_state=seed).fit(factors_NRD[:n_fitted].numpy())
    coefficients_MK = npeff.transform(factors_NRD[n_fitted:].numpy())
    directions = _lifted(npeff, fishers, examples, factors_NRD[:n_fitted], norms_N[:n_fitted])

    batch = examples.batch(held_out.tolist())
    with torch.no_grad():
        original_MC = task.logits(model, batch)
    rules = []
    for name in masks:
        fires_M = fired[name][held_out]
        best = int(_aucs(fired[name][:n_fitted], npeff.coefficients_).argmax())
        aucs_K = _aucs(fires_M, coefficients_MK)
        direction = {parameter: value[best] for parameter, value in directions.items()}
        energy_P = _flat(direction, layout.names).double().square()
        moves = [
            _moved_predictions(task, model, batch, original_MC, fires_M, direction, sign=sign) for sign in (1.0, -1.0)
        ]
        rules.append(
            {
                "rule": name,
                "component": best,
                "n_examples": int(fires_M.sum()),
                "auc": float(aucs_K[best]),
                "next_auc": float(np.delete(aucs_K, best).max()),
                "class_auc": float(_aucs(fires_M, original_MC.softmax(1).numpy()).max()),
                "energy": float(energy_P[flat_masks[name]].sum() / energy_P.sum()),
                **max(moves, key=lambda move: move["kl_ratio"]),
                "moves": moves,
            }
        )
    return {
        "seed": seed,
        "n_examples": len(examples),
        "n_parameters": layout.size,
        "explained": npeff.explained_,
        "explained_held_out": _explained(factors_NRD[n_fitted:], coefficients_MK, npeff.components_),
        "n_distinct": len({row["component"] for row in rules}),
        "fisher_share": float(np.mean(shares)),
        "seconds": time.monotonic() - began,
        "rules": rules,
    }


def _aucs(fires_M: np.ndarray, scores_MK: np.ndarray) -> np.ndarray:
    """(K,): how well each score tells the examples on which a rule fires from all others."""
    return np.array([roc_auc_score(fires_M, scores_M) for scores_M in scores_MK.T])


def _flat(tensors: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """(P,)"""
    return torch.cat([tensors[name].flatten() for name in names])


def _lifted(
    npeff: NPEFF, fishers: PerExampleFishers, examples: Any, factors_NRD: Tensor, norms_N: Tensor
) -> dict[str, Tensor]:
    """Unit directions (K, *shape) by the name of a parameter, from the examples that were fitted."""
    coefficients_NK = torch.from_numpy(npeff.coefficients_).double()
    n_components = len(npeff.components_)
    weights_KNR = lift_weights(
        factors_NRD / norms_N.sqrt()[:, None, None],
        coefficients_NK,
        torch.from_numpy(npeff.components_),
        coefficients_NK.T @ coefficients_NK,
        range(n_components),
        norms_N,
    )
    directions = zero_directions(fishers.collector.layout, n_components, dtype=torch.float64)
    for start in range(0, len(factors_NRD), BATCH):
        rows = range(start, min(start + BATCH, len(factors_NRD)))
        accumulate_directions(fishers.collector, examples.batch(rows), weights_KNR[:, start : rows.stop], directions)
    lengths_K = sum(value.flatten(1).square().sum(1) for value in directions.values()).sqrt()
    return {name: value / lengths_K.view(-1, *(1 for _ in value.shape[1:])) for name, value in directions.items()}


def _explained(factors_NRD: Tensor, coefficients_NK: np.ndarray, components_KD: np.ndarray) -> float:
    """1 − loss / Σ‖F̂‖² of examples that were not fitted; each F̂ is of unit norm."""
    grams_NRR = factors_NRD.double() @ factors_NRD.double().mT
    scale_N = grams_NRR.flatten(1).norm(dim=1)
    h_KD, w_NK = torch.from_numpy(components_KD), torch.from_numpy(coefficients_NK).double()
    t_NK = (factors_NRD.double() @ h_KD.T).square().sum(1) / scale_N[:, None]
    fitted = ((w_NK.T @ w_NK) * (h_KD @ h_KD.T).square()).sum()
    return float((2 * (w_NK * t_NK).sum() - fitted) / len(factors_NRD))


def _moved_predictions(
    task: CompiledRulesTask,
    model: torch.nn.Module,
    batch: Tensor,
    original_MC: Tensor,
    fires_M: np.ndarray,
    direction: dict[str, Tensor],
    *,
    sign: float,
) -> dict[str, float]:
    """What changes at the step that gives the rule's examples the target KL."""
    fires = torch.from_numpy(fires_M)

    def logits_at(epsilon: float) -> Tensor:
        with torch.no_grad(), moved(model, direction, sign * epsilon):
            return task.logits(model, batch)

    step = find_step_size(
        lambda epsilon: float(kl_divergence(logits_at(epsilon), original_MC)[fires].mean()),
        TARGET_KL,
        longest=parameter_norm(model, direction),
    )
    moved_MC = logits_at(step.epsilon)
    kl_M = kl_divergence(moved_MC, original_MC)
    changed_M = (moved_MC.argmax(1) != original_MC.argmax(1)).double()
    kl, kl_others = float(kl_M[fires].mean()), float(kl_M[~fires].mean())
    return {
        "sign": sign,
        "epsilon": step.epsilon,
        "kl": kl,
        "kl_others": kl_others,
        "kl_ratio": kl / kl_others,
        "changed": float(changed_M[fires].mean()),
        "changed_others": float(changed_M[~fires].mean()),
    }


def _verified_programs(seeds: Sequence[int], programs: Sequence[Path], folder: Path) -> dict[str, Any]:
    found = programs or exported(folder)
    return tracr_verified(seeds, found, folder) if found else {"skipped": "no exported programs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections",
        nargs="*",
        help="moved, compiled, outputs, trained, tracr, tracr-verified, prototypes; all unless given",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--examples", type=int, default=1500)
    parser.add_argument("--components", type=int, default=12)
    parser.add_argument("--sketch-dim", type=int, default=1024)
    parser.add_argument("--tracr", type=Path, nargs="+", default=[], help="folders of exported programs")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/ground_truth.json"))
    arguments = parser.parse_args()
    output: Path = arguments.output
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "moved": lambda: moved_rules(arguments.seeds, arguments.examples, arguments.components, arguments.sketch_dim),
        "compiled": lambda: tables.compiled(arguments.seeds, arguments.examples),
        "outputs": lambda: tables.outputs(arguments.seeds, arguments.examples),
        "trained": lambda: tables.trained(arguments.seeds, arguments.examples),
        "tracr": lambda: tables.tracr(arguments.seeds, arguments.tracr),
        "tracr-verified": lambda: _verified_programs(arguments.seeds, arguments.tracr, output.parent / "tracr"),
        "prototypes": lambda: tables.prototypes(arguments.seeds, arguments.examples),
    }
    if unknown := set(arguments.sections) - set(sections):
        parser.error(f"no section {sorted(unknown)[0]!r}: choose from {', '.join(sections)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections or sections:
        about = machine()
        everything = json.loads(output.read_text()) if output.exists() else {}
        everything[name] = {"machine": about, **sections[name]()}
        output.write_text(json.dumps(everything, indent=2) + "\n")
        print()
    print(f"written to {output}")


if __name__ == "__main__":
    main()
