"""The runs of repair.py, and the examples that each method may see.

A run has two factorizations with the same components: `default` with whitened directions and `own` with own directions.
The components are fitted to the Fishers of all fitted examples, for which no labels are needed. The labels of the
judged examples are used only for the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import npeff
import numpy as np
from npeff.models.loaded import LoadedModel
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.worker_specs import model_spec
from npeff.store.tables import read_table
from numpy.typing import NDArray

JOBS = Path(__file__).parents[3] / "jobs"
DIRECTIONS = {"whitened": "default", "own": "own"}
"""The factorization that has the directions of a kind."""
SMALL = 50
"""Largest number of tuning examples of the small budget."""
_VALIDATION = 1 / 3


@dataclass(frozen=True)
class Problem:
    """A model and its examples: a run file without its directory and seed."""

    name: str
    document: dict[str, Any]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, float, float]
    """Tried by fine-tuning. LoRA tries ten times these rates."""
    trains: bool = True
    """Whether the task trains a model for each seed. Otherwise, the model is the same, and the held-out examples are
    others."""
    few_trials: bool = False
    """Whether each method has three trials instead of six, because a pass over the examples takes long."""


@dataclass(frozen=True)
class Tuning:
    """Numbers of the examples with a label that a method may see."""

    name: str
    train: NDArray[np.int64]
    """Examples on which the model is changed."""
    validation: NDArray[np.int64]
    """Examples on which one of the trials is chosen."""


@dataclass(frozen=True)
class Prepared:
    """The runs of a problem and seed, with their lifted components."""

    runs: dict[str, RunDirectory]
    """One for each kind of direction."""
    loaded: LoadedModel
    wrong_N: NDArray[np.bool_]
    tunings: tuple[Tuning, ...]
    judged: NDArray[np.int64]
    error_rate: float
    """Fraction of wrong predictions among all fitted examples, which is known to all methods."""


def problems() -> dict[str, Problem]:
    """Return the problems by name."""
    rates = (1e-4, 3e-4, 1e-3)
    digits = _document(RunConfig.from_yaml(JOBS / "quickstart.yaml").model_dump())
    planted = _document({"task": {"name": "planted-heuristics", "options": {"n_examples": 2400}}}, 24, 0.5)
    return {
        "heuristics": Problem("heuristics", planted, (0, 1), rates),
        "digits": Problem("digits", digits, (0, 1, 2), rates),
        "sick": Problem("sick", _sick(), (0, 1), (1e-5, 3e-5, 1e-4), trains=False, few_trials=True),
    }


def _sick() -> dict[str, Any]:
    """MiniLM on pairs of SICK, which `NPEFF_SHARED_DATA` must contain."""
    document = _document(RunConfig.from_yaml(JOBS / "minilm-sick.yaml").model_dump())
    document["task"]["options"]["limit"] = 1200
    document["factorization"]["held_out_fraction"] = 0.5
    return document


def _document(
    document: dict[str, Any], n_components: int | None = None, held_out: float | None = None
) -> dict[str, Any]:
    factorization = document.setdefault("factorization", {})
    factorization |= {"stability_examples": 0}
    factorization |= {} if n_components is None else {"n_components": n_components, "held_out_fraction": held_out}
    return document | {"executor": {"kind": "serial"}}


def prepared(problem: Problem, seed: int, folder: Path) -> Prepared:
    """Return the lifted runs of a problem. Only what is missing is computed."""
    runs = {}
    for direction, name in DIRECTIONS.items():
        document = problem.document | {"seed": seed, "run_dir": str(folder / f"{problem.name}-{seed}")}
        document["factorization"] = document["factorization"] | {"name": name}
        document["lift"] = {"direction": direction}
        task = document["task"]
        if problem.trains:
            document["task"] = task | {"options": task["options"] | {"seed": seed}}
        run = runs[direction] = RunDirectory.create(RunConfig.model_validate(document))
        npeff.compute_fishers(run)
        npeff.factorize(run)
        npeff.lift(run)
    table = read_table(run.table("examples"), "examples")
    known_N = table["correct"].is_valid().to_numpy() & table["valid"].to_numpy()
    fit_N = np.asarray(table["split"].to_pylist()) == "fit"
    wrong_N = ~table["correct"].fill_null(True).to_numpy()
    fitted = np.flatnonzero(known_N & fit_N)
    generator = np.random.default_rng([seed, 0])
    tunings = (
        _divided("50", _small(fitted, wrong_N, generator), wrong_N, generator),
        _divided("all", fitted, wrong_N, generator),
    )
    loaded = model_spec(run, fingerprint_of(run)).load()
    judged = np.flatnonzero(known_N & ~fit_N)
    return Prepared(runs, loaded, wrong_N, tunings, judged, float(wrong_N[fitted].mean()))


def _small(fitted: NDArray[np.int64], wrong_N: NDArray[np.bool_], generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw examples, up to half of them with a wrong prediction: a random draw would have hardly any of them."""
    wrong, right = (generator.permutation(fitted[wrong_N[fitted] == value]) for value in (True, False))
    wrong = wrong[: SMALL // 2]
    return np.concatenate([wrong, right[: SMALL - len(wrong)]])


def _divided(
    name: str, examples: NDArray[np.int64], wrong_N: NDArray[np.bool_], generator: np.random.Generator
) -> Tuning:
    """Divide the wrong and the right predictions in the same proportion."""
    train, validation = [], []
    for value in (True, False):
        part = generator.permutation(examples[wrong_N[examples] == value])
        count = round(_VALIDATION * len(part))
        validation.append(part[:count])
        train.append(part[count:])
    return Tuning(name, np.sort(np.concatenate(train)), np.sort(np.concatenate(validation)))
