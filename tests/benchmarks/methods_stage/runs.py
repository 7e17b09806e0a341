"""The runs of methods.py: one for each model and split, whose Fishers all methods share.

A method is a factorization of the run with its own name, and goes through the stages `factorize`, `lift` and `verify`.
Everything is kept in the run directories. A run that was interrupted resumes.

Legend: N examples, K components.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import npeff
import numpy as np
import pyarrow as pa
from fisher_stage import minilm
from npeff.runs.config import RunConfig
from npeff.runs.definition import finished
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of, lifted_components, prediction_batch_size
from npeff.stages.verify.options import VerificationOptions, VerificationPaths
from npeff.stages.verify.worker import VerificationWorker
from npeff.stages.worker_specs import model_spec
from npeff.statistics import ratio_intervals
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.splits import Splits
from npeff.store.tables import read_table, table_lineage, write_table
from numpy.typing import NDArray

from methods_stage import topics
from methods_stage.scores import Row

QUICKSTART = Path(__file__).parents[3] / "jobs" / "quickstart.yaml"
SKETCH = {"kind": "tensorsketch", "dim": 4096}
"""Sketch of the digits."""
SQUARED_NORM = "squared_fisher_norm"
"""Column of the table of examples that `with_squared_norms` adds."""


@dataclass(frozen=True)
class Problem:
    """A model and its examples: a run file without its directory and seed."""

    name: str
    document: Mapping[str, Any]
    folder: Path

    def config(self, split: int, permutation: int | None = None, **sections: Mapping[str, Any]) -> RunConfig:
        """Return the configuration of a run.

        Args:
            split: Seed of the run, which draws the split, the sketch and the starts.
            permutation: Seed with which the weights are permuted; not permuted if None.
            sections: Values of sections that replace those of the run file.
        """
        document, suffix = dict(self.document), ""
        if permutation is not None:
            task, parameters = document["task"], document["parameters"]
            selected = {name: list(parameters[name]) for name in ("include", "exclude")}
            options = {"task": task["name"], "options": task["options"], **selected, "seed": permutation}
            document["task"] = {"name": "methods_stage.permuted:PermutedTask", "options": options}
            suffix = f"-permuted-{permutation}"
        for section, changed in sections.items():
            document[section] = {**document[section], **changed}
        directory = self.folder / f"{self.name}-split-{split}{suffix}"
        return RunConfig.model_validate(document | {"run_dir": str(directory), "seed": split})


def digits(folder: Path, components: int | None) -> Problem:
    """The task of the quickstart, with the sketch of `README.md`'s table, which does not depend on the run file."""
    found = _problem(folder, "digits", RunConfig.from_yaml(QUICKSTART), components)
    return replace(found, document={**found.document, "fishers": {**found.document["fishers"], "sketch": SKETCH}})


def minilm_pairs(folder: Path, components: int | None, pairs: int) -> Problem:
    """MiniLM on pairs drawn from the test set of SICK."""
    data = folder / f"sick-{pairs}.txt"
    if not data.exists():
        minilm.drawn_pairs(pairs, data)
    return _problem(folder, f"minilm-{pairs}", minilm.config(folder, data.absolute()), components)


def pydoc(folder: Path, components: int | None) -> Problem:
    """A character-level language model on the topic help of Python: see `topics`. Trained at the first call."""
    facts = topics.prepared(folder / "pydoc")
    losses = ", ".join(f"{value:.3f} ({name})" for name, value in facts["loss"].items())
    print(f"pydoc: held-out loss in nats per character: {losses}", flush=True)
    return _problem(folder, "pydoc", topics.config(folder / "pydoc"), components)


def _problem(folder: Path, name: str, config: RunConfig, components: int | None) -> Problem:
    document = config.model_dump()
    n_components = components or config.factorization.n_components
    document["factorization"] |= {"n_components": n_components, "stability_examples": 0}
    document["executor"] = {"kind": "serial"}
    return Problem(f"{name}-{n_components}", document, folder)


def lifted(config: RunConfig) -> RunDirectory:
    """Return the run with the factorization of this configuration, lifted. Only what is missing is computed."""
    began, run = time.monotonic(), RunDirectory.create(config)
    npeff.compute_fishers(run)
    with_squared_norms(run)
    npeff.factorize(run)
    record = npeff.lift(run)
    seconds = f"{time.monotonic() - began:.0f} s"
    print(f"{run.path.name}, {run.name}: lifted, median cosine {record['median_cosine']:.3f} ({seconds})", flush=True)
    return run


def verified(run: RunDirectory) -> list[Row]:
    """Return the rows of the table `verification`."""
    began = time.monotonic()
    npeff.verify(run)
    print(f"{run.path.name}, {run.name}: verified ({time.monotonic() - began:.0f} s)", flush=True)
    return read_table(run.table("verification"), "verification").to_pylist()


def verified_otherwise(
    run: RunDirectory, results: str, factorization: Path | None = None, level: float = ratio_intervals.LEVEL
) -> list[Row]:
    """Return rows of the table `verification` with another choice of the examples or another level of confidence.

    Args:
        run: The run, lifted.
        results: Name of the folder of the results.
        factorization: Coefficients that choose the top examples; those of the run if None.
        level: Level of `above_controls` and of the intervals.
    """
    components, folder = lifted_components(run), run.partial_results(results)
    paths = VerificationPaths.of(run, folder, **({} if factorization is None else {"factorization": factorization}))
    options = steps_only(run)
    if missing := [component for component in components if component not in finished(folder)]:
        worker = VerificationWorker(model_spec(run, fingerprint_of(run)), paths, options)
        with patch.object(ratio_intervals, "LEVEL", level):
            for component in missing:
                worker.verify(component)
    done = finished(folder)
    return [row for each in components for row in read_table(done[each], "verification").to_pylist()]


def steps_only(run: RunDirectory) -> VerificationOptions:
    """Return the run's options of a verification, without selectivity and correlation."""
    wanted = run.config.verification
    return VerificationOptions(
        n_top=wanted.top_examples,
        n_baseline=wanted.baseline_examples,
        target_kl=wanted.target_kl,
        epsilon=wanted.epsilon,
        n_selectivity=0,
        n_correlation=0,
        seed=run.config.seed,
        batch_size=prediction_batch_size(run),
        lifted=lifted_components(run),
    )


def with_squared_norms(run: RunDirectory) -> None:
    """Add the squared norms of the Fishers to the table of examples, as weights of the loss.

    With v_i = ‖F_i‖², the loss Σ_i v_i ‖F̂_i − Σ_j W_ij h_j h_jᵀ‖² is that of Fishers without normalization,
    Σ_i ‖F_i − Σ_j (‖F_i‖ W_ij) h_j h_jᵀ‖².
    """
    path = run.shared_table("examples")
    table = read_table(path, "examples")
    if SQUARED_NORM not in table.column_names:
        squares_N = np.nan_to_num(np.square(table["fisher_norm"].to_numpy()))
        write_table(path, "examples", table.append_column(SQUARED_NORM, [squares_N]), table_lineage(path))


def unnormalized(run: RunDirectory) -> Path:
    """Return a factorization with the coefficients ‖F_i‖ W_ij of Fishers without normalization."""

    def scaled(coefficients_NK: NDArray[np.float32], examples: pa.Table) -> NDArray[np.float32]:
        return coefficients_NK * examples["fisher_norm"].to_numpy().astype(np.float32)[:, None]

    return _with_coefficients(run, "not-normalized", scaled)


def shuffled(run: RunDirectory) -> Path:
    """Return a factorization whose rows of coefficients are shuffled within the fitted and the held-out examples."""

    def permuted(coefficients_NK: NDArray[np.float32], examples: pa.Table) -> NDArray[np.float32]:
        generator, found_NK = np.random.default_rng(run.config.seed), coefficients_NK.copy()
        splits = Splits.of(examples)
        for split_N in (splits.fit_N, splits.held_out_N):
            found_NK[split_N] = generator.permutation(coefficients_NK[split_N])
        return found_NK

    return _with_coefficients(run, "shuffled", permuted)


def _with_coefficients(
    run: RunDirectory, name: str, change: Callable[[NDArray[np.float32], pa.Table], NDArray[np.float32]]
) -> Path:
    """Return a factorization with the run's components and other coefficients. It is written once."""
    path = run.home / f"{name}.zarr"
    if not path.exists():
        stored, examples = open_factorization(run.factorization), read_table(run.table("examples"), "examples")
        write_factorization(path, stored.read_components(), change(stored.read_coefficients(), examples), {})
    return path
