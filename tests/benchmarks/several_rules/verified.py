"""The section `tracr-verified` of ground_truth.py: compiled programs through all stages up to the verification.

Every run has the default settings, except K, the seed and `verification.exact`. The small-step ratios are those of
infinitesimal steps: the column `small_step_ratio` has the matched baseline, and `small-step raw` is the ratio of the
mean of ‖A_i ĝ‖² over the held-out top examples to that over all other held-out examples, from exact gradients.

The rules are scored as in `scores`: the component with the highest AUC on the fitted examples is chosen, and measured
on the held-out ones. A fourth score is the probability of a class. The direction is that of the run, which is whitened.
Its energy in a set of weights is the fraction of its squared entries, beside three references: the fraction of the
trace of the Fishers in these weights, over the fitted examples on which the rule is active (the ceiling) and over those
on which it is not, the expected energy of a random direction with the same norm in every tensor (chance), and the mean
over the other components. There are two sets for a rule: the weights that only this rule uses,
and those of the hidden units whose activity at the position of the prediction has an AUC of at least 0.95 for the rule
or for its absence, on the fitted examples.

A last line for each run tells in which parameter most of the trace is, and how many values the trace has on the
held-out examples and on the top examples of a component, to 1%: few values leave few examples for the matched baseline.

Legend: N examples, K components, R rank, D sketch, P parameters, r rules, C classes, S resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import torch
from methods_stage.scores import counted, median, summary, tested
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.sketches import SketchSpec, make_sketch
from npeff.stages.verify import headline
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.splits import Splits
from npeff.store.tables import read_table
from npeff.tasks.planted.tracr import TracrProgramTask
from npeff.verification.controls import top_examples
from torch import Tensor

from several_rules.scores import FOUND, RESAMPLES, aucs, best_components, evidence
from several_rules.truths import BATCH

N_COMPONENTS = 8
READOUTS = ("coefficients", "evidence", "whitened", "class")
COLUMNS = ("matched ratio", "small-step raw", "small-step matched", "raw ratio", "by trace", "all components")
ENERGIES = ("energy", "ceiling", "inactive", "chance", "others")
SHARES = ("above 1", "above 2", "above controls")


def tracr_verified(seeds: Sequence[int], programs: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Verify exported programs. The seeds are those of the runs: of the split, the sketch and the starts."""
    runs = {path.name: [_run(path, seed, folder) for seed in seeds] for path in programs}
    found: dict[str, Any] = {"seeds": list(seeds), "n_components": N_COMPONENTS, "programs": {}}
    print(f"\n| | matched | {' | '.join([*COLUMNS, *SHARES])} |\n|{'---|' * (len(COLUMNS) + len(SHARES) + 2)}")
    groups = {name: [run.rows for run in each] for name, each in runs.items()}
    groups |= {"both": [rows for each in groups.values() for rows in each]}
    for name, rows in groups.items():
        about = {**summary(rows), **_small_steps(rows)}
        found["programs"][name] = {"verification": about}
        cells = [str(about.get(column, "–")) for column in (*COLUMNS, *SHARES)]
        print(f"| {name} | {about['matched']} of {about['components']} | {' | '.join(cells)} |")
    for name, each in runs.items():
        found["programs"][name] |= {
            "runs": [{**run.facts, "rules": run.rules} for run in each],
            "rules": _mean_rules([run.rules for run in each]),
        }
        _print_rules(name, found["programs"][name]["rules"])
        for run in each:
            print(f"{name}, seed {run.facts['seed']}: {run.facts['headline'][-1]}")
            print(_about_traces(run))
    return _plain(found)


@dataclass(frozen=True)
class _Verified:
    rows: list[dict[str, Any]]
    """Of the table `verification`, with the column ``small_step_raw`` for the held-out examples."""
    rules: list[dict[str, Any]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Exact:
    """What needs the Fishers in all parameters."""

    evidence_NK: np.ndarray
    """‖A_i ĝ_k‖² of the Fishers as they are, not normalized."""
    shares_NM: np.ndarray
    """Fraction of the trace in each set of weights."""
    by_tensor: dict[str, float]
    """Mean fraction of the trace in each parameter."""
    log_traces_N: np.ndarray
    """To 1%."""


def _run(program: Path, seed: int, folder: Path) -> _Verified:
    document = {
        "run_dir": str(folder / f"{program.name}-seed-{seed}"),
        "seed": seed,
        "task": {"name": "tracr-program", "options": {"folder": str(program)}},
        "fishers": {},
        "factorization": {"n_components": N_COMPONENTS},
        "verification": {"exact": True},
        "executor": {"kind": "serial"},
    }
    run = RunDirectory.create(RunConfig.model_validate(document))
    npeff.compute_fishers(run)
    fitted, lifted, record = npeff.factorize(run), npeff.lift(run), npeff.verify(run)
    rows, examples = (read_table(run.table(name), name) for name in ("verification", "examples"))
    task, splits = TracrProgramTask(str(program)), Splits.of(examples)
    names = select_parameters(task.model(Path())).names
    units = _telling_units(task, examples, splits.fit_N)
    masks = [_flat(mask, names) for mask in (*task.rule_masks().values(), *units)]
    directions_KP = _directions(run, names)
    exact = _exact(task, directions_KP, torch.stack(masks))
    coefficients_NK = open_factorization(run.factorization).read_coefficients()
    verified = rows.to_pylist()
    _add_columns(verified, exact, coefficients_NK, splits.held_out_N)
    facts = {
        "seed": seed,
        "n_fitted": int(splits.fit_N.sum()),
        "n_held_out": int(splits.held_out_N.sum()),
        "n_parameters": directions_KP.shape[1],
        "explained": fitted["explained"],
        "explained_held_out": fitted.get("explained_held_out"),
        "median_lift_cosine": lifted["median_cosine"],
        "trace_by_tensor": exact.by_tensor,
        "n_traces": len(np.unique(exact.log_traces_N[splits.held_out_N])),
        "scores": record["scores"],
        "headline": headline(record["scores"]),
        "rows": verified,
    }
    print(f"{program.name}, seed {seed}: {facts['headline'][-2]}", flush=True)
    scores = _scores(run, task, coefficients_NK)
    rules = _rules(task, examples, splits, scores, _energies(directions_KP, masks, names, task), exact, units)
    return _Verified(verified, rules, facts)


def _add_columns(rows: list[dict[str, Any]], exact: _Exact, coefficients_NK: np.ndarray, held_N: np.ndarray) -> None:
    """Add ``small_step_raw`` and ``n_top_traces`` to the rows of the held-out examples."""
    for row in tested(rows):
        evidence_N, others_N = exact.evidence_NK[:, row["component"]], held_N.copy()
        top = top_examples(coefficients_NK[:, row["component"]], held_N, row["n_top"])
        others_N[top] = False
        row["small_step_raw"] = float(evidence_N[top].mean() / evidence_N[others_N].mean())
        row["n_top_traces"] = len(np.unique(exact.log_traces_N[top]))


def _flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def _directions(run: RunDirectory, names: Sequence[str]) -> Tensor:
    """(K, P), of unit length."""
    store = DirectionStore.open(run.directions)
    found = [_flat({name: torch.from_numpy(value) for name, value in store.read(k).items()}, names)
             for k in range(N_COMPONENTS)]  # fmt: skip
    return torch.nn.functional.normalize(torch.stack(found).double())


def _scores(run: RunDirectory, task: TracrProgramTask, coefficients_NK: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of all examples (N, K) or (N, C), by readout."""
    store = FisherStore.open(run.fishers)
    rows = store.read_rows(np.arange(store.plan.n_examples), ["factors"])
    factors_NRD = torch.from_numpy(rows["factors"].astype(np.float32))
    components_KD = torch.from_numpy(open_factorization(run.factorization).read_components()).double()
    sketches_KD = DirectionStore.open(run.directions).read_sketches()
    assert sketches_KD is not None
    with torch.no_grad():
        logits_NC = task.logits(task.model(Path()), task.examples(Path()).batch(range(len(factors_NRD))))
    by_component = evidence(factors_NRD, components_KD), evidence(factors_NRD, torch.from_numpy(sketches_KD).double())
    found = (coefficients_NK, *by_component, logits_NC.softmax(1).numpy())
    return dict(zip(READOUTS, found, strict=True))


def _exact(task: TracrProgramTask, directions_KP: Tensor, masks_MP: Tensor) -> _Exact:
    model, examples = task.model(Path()), task.examples(Path())
    layout = select_parameters(model)
    fishers = PerExampleFishers(model, task.logits, layout, make_sketch(SketchSpec("identity"), layout, 0))
    parameters = dict(model.named_parameters())
    sizes = [parameters[name].numel() for name in layout.names]
    evidence_BK, shares_BM, tensors_Bt, traces_B = [], [], [], []
    for start in range(0, len(examples), BATCH):
        factors_BRP = fishers(examples.batch(range(start, min(start + BATCH, len(examples))))).factors_BRD.double()
        evidence_BK.append((factors_BRP @ directions_KP.T).square().sum(1))
        energy_BP = factors_BRP.square().sum(1)
        traces_B.append(energy_BP.sum(1))
        energy_BP = energy_BP / traces_B[-1][:, None]
        shares_BM.append(energy_BP @ masks_MP.double().T)
        tensors_Bt.append(torch.stack([part.sum(1) for part in energy_BP.split(sizes, 1)], 1))
    return _Exact(
        torch.cat(evidence_BK).numpy(),
        torch.cat(shares_BM).numpy(),
        dict(zip(layout.names, torch.cat(tensors_Bt).mean(0).tolist(), strict=True)),
        torch.cat(traces_B).log().numpy().round(2),
    )


def _telling_units(task: TracrProgramTask, examples: Any, fit_N: np.ndarray) -> list[dict[str, Tensor]]:
    """Return the weights of the hidden units that tell each rule, as masks by parameter name."""
    model: Any = task.model(Path())
    inputs: list[Tensor] = []
    hooks = [
        layer.mlp_in.register_forward_hook(lambda *call: inputs.append(call[2][:, task.program.position].relu()))
        for layer in model.layers
    ]
    with torch.no_grad():
        model(task.examples(Path()).batch(range(len(examples))))
    for hook in hooks:
        hook.remove()
    found = []
    for rule in task.program.rules:
        active_N = examples[f"rule_{rule}"].to_numpy(zero_copy_only=False).astype(bool)
        masks = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in model.named_parameters()}
        for i, units_NU in enumerate(inputs):
            # rounded, because values that are equal in the program differ by rounding
            aucs_U = aucs(active_N[fit_N], units_NU[fit_N].numpy().round(4), np.ones((1, int(fit_N.sum()))))[0]
            tells_U = torch.from_numpy(np.maximum(aucs_U, 1 - aucs_U) >= FOUND)
            masks[f"layers.{i}.mlp_in.weight"][tells_U] = True
            masks[f"layers.{i}.mlp_in.bias"][tells_U] = True
            masks[f"layers.{i}.mlp_out.weight"][:, tells_U] = True
        found.append(masks)
    return found


def _energies(
    directions_KP: Tensor, masks: Sequence[Tensor], names: Sequence[str], task: TracrProgramTask
) -> list[dict[str, np.ndarray]]:
    """Return the energy of all directions in each set of weights, and that of random ones (K,)."""
    parameters = dict(task.model(Path()).named_parameters())
    sizes = [parameters[name].numel() for name in names]
    energy_KP = directions_KP.square()
    by_tensor_Kt = torch.stack([part.sum(1) for part in energy_KP.split(sizes, 1)], 1)
    found = []
    for mask_P in masks:
        share_t = torch.stack([part.double().mean() for part in mask_P.split(sizes)])
        found.append({"energy": energy_KP[:, mask_P].sum(1).numpy(), "chance": (by_tensor_Kt @ share_t).numpy()})
    return found


def _rules(
    task: TracrProgramTask,
    examples: Any,
    splits: Splits,
    scores: Mapping[str, np.ndarray],
    energies: Sequence[Mapping[str, np.ndarray]],
    exact: _Exact,
    units: Sequence[Mapping[str, Tensor]],
) -> list[dict[str, Any]]:
    fit_N, held_N, n_rules = splits.fit_N, splits.held_out_N, len(task.program.rules)
    n_held = int(held_N.sum())
    draws_SN = np.random.default_rng(0).multinomial(n_held, np.full(n_held, 1 / n_held), size=RESAMPLES)
    weights_SN = np.concatenate([np.ones((1, n_held)), draws_SN])
    rules = []
    for r, name in enumerate(task.program.rules):
        active_N = examples[f"rule_{name}"].to_numpy(zero_copy_only=False).astype(bool)
        row: dict[str, Any] = {"rule": name, "n_held_out": int(active_N[held_N].sum())}
        row["n_units"] = int(sum(mask[:, 0].sum() for key, mask in units[r].items() if key.endswith("mlp_in.weight")))
        for readout, scores_NK in scores.items():
            (best,) = best_components(active_N[fit_N][:, None], scores_NK[fit_N])
            auc_S = aucs(active_N[held_N], scores_NK[held_N][:, [best]], weights_SN)[:, 0]
            interval = [float(bound) for bound in np.percentile(auc_S[1:], [2.5, 97.5])]
            row[readout] = {"best": best, "auc": float(auc_S[0]), "interval": interval}
            if readout == "class":
                continue
            for kind, m in (("own", r), ("units", n_rules + r)):
                energy_K, chance_K = energies[m]["energy"], energies[m]["chance"]
                row[readout][kind] = {
                    "energy": float(energy_K[best]),
                    "chance": float(chance_K[best]),
                    "others": float(np.delete(energy_K, best).mean()),
                    "ceiling": float(exact.shares_NM[fit_N & active_N, m].mean()),
                    "inactive": float(exact.shares_NM[fit_N & ~active_N, m].mean()),
                }
        rules.append(row)
    return rules


def _small_steps(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    columns = {"small-step raw": "small_step_raw", "small-step matched": "small_step_ratio"}
    matched = [found for rows in runs if (found := counted(rows))]
    return {
        name: median([np.array([row[column] for row in rows]) for rows in matched])
        for name, column in columns.items()
        if matched
    }


def _about_traces(run: _Verified) -> str:
    shares = run.facts["trace_by_tensor"]
    most = max(shares, key=lambda name: shares[name])
    counts = [row["n_top_traces"] for row in tested(run.rows)]
    return (
        f"{shares[most]:.1%} of the trace is in {most}; the trace has {run.facts['n_traces']} values on "
        f"{run.facts['n_held_out']} held-out examples, and {min(counts)} to {max(counts)} "
        f"(median {np.median(counts):g}) on the top examples of a component"
    )


def _mean_rules(runs: Sequence[Any]) -> Any:
    """Return the means over runs of all numbers in equal structures."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: _mean_rules([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        return [_mean_rules(each) for each in zip(*runs, strict=True)]
    return first if isinstance(first, str) else float(np.mean(runs))


def _print_rules(program: str, rules: Sequence[dict[str, Any]]) -> None:
    print(f"\n{program}: AUC on held-out examples; energy of the component that is chosen by evidence, with")
    print(f"{', '.join(ENERGIES[1:])}\n")
    print(f"| rule | active | {' | '.join(READOUTS)} | own weights | telling units | in their weights |")
    print("|" + "---|" * (len(READOUTS) + 5))
    for row in rules:
        aucs_text = [f"{row[readout]['auc']:.2f}" for readout in READOUTS]
        energies = [", ".join(f"{row['evidence'][kind][name]:.3f}" for name in ENERGIES) for kind in ("own", "units")]
        energies.insert(1, f"{row['n_units']:.0f}")
        print(f"| {row['rule']} | {row['n_held_out']:.0f} | {' | '.join([*aucs_text, *energies])} |")
    print()


def _plain(value: Any) -> Any:
    """Return the value as JSON holds it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
