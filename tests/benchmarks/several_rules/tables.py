"""The sections of ground_truth.py with several active rules: draws, methods and numbers of components, and tables."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from npeff.tasks.planted.compiled import CompiledRulesTask
from npeff.tasks.planted.tracr import TracrProgramTask
from npeff.tasks.planted.trained import TrainedRulesTask
from verify_stage.baselines import Found

from several_rules.cross_terms import cross_terms, sparse_gradients
from several_rules.scores import METHODS, READOUTS, scored
from several_rules.truths import SketchedData, Truth, drawn

SKETCH_DIM = 512


@dataclass(frozen=True)
class Setting:
    """A kind of draw, and the numbers of components to fit to it."""

    name: str
    task: Callable[[int], Any]
    """From a seed."""
    n_active: int | None
    """Number of active rules of the held-out examples that are scored; None for all of them."""
    components: Sequence[int]


def _several(task: type, n_rules: int, n_examples: int, **options: Any) -> list[Setting]:
    """1 to 4 active rules at most, and 3 exactly; 1.5, 2 and 3 components for each rule where there is a bar."""
    many, one = [3 * n_rules // 2, 2 * n_rules, 3 * n_rules], [2 * n_rules]

    def setting(name: str, n_active: int, at_most: bool, components: Sequence[int]) -> Setting:
        chosen = {"n_examples": n_examples, "n_active": n_active, "at_most": at_most, **options}
        return Setting(name, lambda seed: task(seed=seed, **chosen), n_active, components)

    mixed = [setting(f"1 to {n}", n, True, many if n > 2 else one) for n in (1, 2, 3, 4)]
    return [*mixed, setting("always 3", 3, False, many)]


def compiled(seeds: Sequence[int], n_examples: int) -> dict[str, Any]:
    return _section(_several(CompiledRulesTask, 8, n_examples), seeds, METHODS)


def outputs(seeds: Sequence[int], n_examples: int) -> dict[str, Any]:
    """The compiled rules with an output for each rule."""
    settings = _several(CompiledRulesTask, 8, n_examples, separate_outputs=True)
    return _section([setting for setting in settings if setting.name == "always 3"], seeds, METHODS)


def trained(seeds: Sequence[int], n_examples: int) -> dict[str, Any]:
    return _section(_several(TrainedRulesTask, 12, n_examples), seeds, METHODS)


def tracr(seeds: Sequence[int], folders: Sequence[Path]) -> dict[str, Any]:
    """Exported programs; the seeds are those of the sketch and the starts."""
    if not folders:
        print("skipped: no exported programs: python -m npeff.tasks.planted.tracr_export counts FOLDER; --tracr FOLDER")
        return {"skipped": "no exported programs"}
    settings = []
    for folder in folders:
        n_rules = len(TracrProgramTask(str(folder)).program.rules)
        components = [3 * n_rules // 2, 2 * n_rules, 3 * n_rules]
        settings.append(Setting(folder.name, lambda _, folder=folder: TracrProgramTask(str(folder)), None, components))
    return _section(settings, seeds, METHODS)


def prototypes(seeds: Sequence[int], n_examples: int) -> dict[str, Any]:
    """The kinds of cross_terms.py beside NPEFF and NMF of gradients, with 2 components for each rule."""

    def started(method: str) -> Callable[[SketchedData, int, int], Found]:
        return lambda data, n_components, seed: cross_terms(data, METHODS[method](data, n_components, seed)[1])

    methods = {
        "npeff": METHODS["npeff"],
        "gradient-nmf": METHODS["gradient-nmf"],
        "cross (npeff)": started("npeff"),
        "cross (nmf)": started("gradient-nmf"),
        "sparse-gradients": sparse_gradients,
    }
    settings = []
    for task, n_rules in ((CompiledRulesTask, 8), (TrainedRulesTask, 12)):
        for setting in _several(task, n_rules, n_examples):
            if setting.n_active == 3:
                name = f"{task.__name__.removesuffix('RulesTask').lower()}, {setting.name}"
                settings.append(Setting(name, setting.task, 3, [2 * n_rules]))
    return _section(settings, seeds, methods)


def _section(
    settings: Sequence[Setting], seeds: Sequence[int], methods: dict[str, Callable[[SketchedData, int, int], Found]]
) -> dict[str, Any]:
    print(
        f"{'active':<20}{'method':<18}{'K':>3}  "
        + "".join(f"{f'found: {name}':<26}" for name in READOUTS)
        + f"{'energy own, whitened':>22}"
        f"{'ceiling':>9}{'Spearman of the three':>23}"
    )
    rows = []
    for setting in settings:
        truths = [_draw(setting, seed) for seed in seeds]
        ceiling = float(np.median([truth.ceilings() for truth in truths]))
        for n_components in setting.components:
            for method, fit in methods.items():
                row = _row(setting, method, fit, n_components, truths, seeds)
                rows.append({**row, "ceiling": ceiling})
                _print(rows[-1])
    return {"sketch_dim": SKETCH_DIM, "seeds": list(seeds), "rows": rows}


def _draw(setting: Setting, seed: int) -> Truth:
    with tempfile.TemporaryDirectory() as folder:
        return drawn(setting.task(seed), Path(folder), SKETCH_DIM, seed)


def _row(
    setting: Setting,
    method: str,
    fit: Callable[[SketchedData, int, int], Found],
    n_components: int,
    truths: Sequence[Truth],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Means over seeds. The intervals are those of the mean when the held-out examples of each seed are resampled."""
    began = time.process_time()
    scores = [
        scored(truth, fit(truth.data, n_components, seed), setting.n_active, seed)
        for truth, seed in zip(truths, seeds, strict=True)
    ]
    found, intervals = {}, {}
    for readout in READOUTS:
        found[readout] = [score.found[readout]["exactly"] for score in scores]
        resampled_S = np.mean([score.resampled[readout] for score in scores], 0)
        intervals[readout] = [float(bound) for bound in np.percentile(resampled_S, [2.5, 97.5])]
    return {
        "active": setting.name,
        "method": method,
        "n_components": n_components,
        "found": found,
        "found_interval": intervals,
        "found_all_held_out": {name: [score.found[name]["all"] for score in scores] for name in READOUTS},
        "aucs": {name: [score.aucs[name] for score in scores] for name in READOUTS},
        "energy": {name: float(np.mean([score.energy[name] for score in scores])) for name in READOUTS},
        "spearman": {name: float(np.nanmean([score.spearman[name] for score in scores])) for name in READOUTS},
        "cpu_s": time.process_time() - began,
    }


def _print(row: dict[str, Any]) -> None:
    cells = []
    for readout in READOUTS:
        low, high = row["found_interval"][readout]
        mean = np.mean(row["found"][readout])
        cells.append(f"{f'{mean:.2f} ({low:.2f} to {high:.2f})':<26}")
    energy = f"{row['energy']['evidence']:.2f}, {row['energy']['whitened']:.2f}"
    spearman = ", ".join(f"{row['spearman'][readout]:.2f}" for readout in READOUTS)
    print(
        f"{row['active']:<20}{row['method']:<18}{row['n_components']:>3}  {''.join(cells)}{energy:>22}"
        f"{row['ceiling']:>9.2f}{spearman:>23}",
        flush=True,
    )
