"""Results of earlier stages that a stage reads: checksums, components and lifted directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npeff.factorization import InvalidProblemError, validate_size
from npeff.gradients import ParameterLayout
from npeff.options.kinds import rows_per_example
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.stage import record_of
from npeff.sketches import Sketch, SketchSpec, make_sketch
from npeff.stages.factorize import FACTORIZE
from npeff.stages.fishers import FISHERS
from npeff.stages.lift import LIFT
from npeff.stages.worker_specs import fitted_examples
from npeff.storage.checksums import file_checksum, json_checksum
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.store.array_files import is_intact
from npeff.store.component_store import open_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.same_space import differences_in_space
from npeff.store.shard_records import CompletionRecord, ShardChecksums, ShardRecords
from npeff.store.splits import Splits


def lifted_components(run: RunDirectory) -> list[int]:
    """Return the components that have a direction."""
    record = record_of(run, LIFT)
    return list(record.get("components", range(record["n_components"])))


def fingerprint_of(run: RunDirectory) -> str:
    """Return the fingerprint of the model that the stored Fishers were computed for."""
    return str(FisherStore.read_attributes(run.fishers)["model_fingerprint"])


def check_matrices(attributes: Mapping[str, Any], layout: ParameterLayout) -> None:
    """Check that the sketch of a Fisher store reshapes parameters as the layout says.

    Raises:
        RunDirectoryError: the store is of a version that reshaped the weights of experts in another way.
    """
    stored = attributes["parameter_layout"].get("stacked", [])
    if attributes["sketch"]["kind"] == "tensorsketch" and stored != list(layout.stacked):
        name = sorted({*stored, *layout.stacked})[0]
        raise RunDirectoryError(
            f"the Fishers of this run are of another version of npeff, whose sketch of {name!r} differs: compute them "
            "again, in another run_dir"
        )


def sketch_of(attributes: Mapping[str, Any], layout: ParameterLayout) -> Sketch:
    """Return the sketch of a Fisher store with these attributes, for the parameters of a layout.

    Raises:
        RunDirectoryError: see `check_matrices`.
    """
    check_matrices(attributes, layout)
    spec = dict(attributes["sketch"])
    seed = spec.pop("seed")
    # the store records the width of every sketch, but only a tensor sketch takes it
    if spec["kind"] != "tensorsketch":
        spec["dim"] = None
    return make_sketch(SketchSpec(**spec), layout, seed)


def prediction_batch_size(run: RunDirectory) -> int:
    """Return the number of examples per batch for predictions.

    A batch of the stage `fishers` stores, for each of the rank's rows, the gradients at the outputs of all layers. A
    forward pass of rank times as many examples needs less memory.
    """
    attributes = FisherStore.read_attributes(run.fishers)
    return int(attributes["batch_size"] * attributes["rank"])


def components_of(run: RunDirectory, other: str | Path | RunDirectory) -> np.ndarray:
    """Return the components (K, D) of another run with the same model, parameters, sketch and seed.

    Raises:
        RunDirectoryError: the model, parameters, sketch or seed of the runs differ, or the other run has no components
            of kind ``fishers``.
    """
    source = other if isinstance(other, RunDirectory) else RunDirectory.open(other)
    record_of(source, FACTORIZE)
    if (kind := source.config.factorization.kind) != "fishers":
        raise RunDirectoryError(
            f"the components of {source.path} are of kind {kind}: give a run with factorization.kind: fishers"
        )
    mine, theirs = (FisherStore.read_attributes(each.fishers) for each in (run, source))
    if different := differences_in_space(mine, theirs):
        raise RunDirectoryError(
            f"the components of {source.path} are not valid in {run.path}: the runs differ in {', '.join(different)}; "
            "create both with the same model, parameters, fishers.sketch and seed"
        )
    return open_factorization(source.factorization).read_components()


def checksums_of(run: RunDirectory) -> dict[int, ShardChecksums]:
    """Return the checksums of every stored shard.

    Raises:
        StoreError: a shard of the complete stage has no record, because it was deleted to be recomputed.
    """
    fishers = record_of(run, FISHERS)
    records = ShardRecords(run.shard_records, fishers["signature"]).complete()
    missing = [shard for shard in range(fishers["n_shards"]) if shard not in records]
    if missing:
        problem = f"shard {missing[0]} of {run.fishers} has no record"
        raise StoreError(problem, f"run `npeff fishers {run.fishers_home}` first", path=run.fishers)
    if fishers.get("shards") not in (None, shards_checksum(records)):
        raise StoreError(
            f"the shards in {run.shard_records} are not those of the stage's record: they belong to another run, or "
            "were computed again with other results",
            f"restore them, or delete {run.record_file('fishers')} and run `npeff fishers {run.path}`",
            path=run.shard_records,
        )
    return {shard: record.checksums for shard, record in records.items()}


def verified_diagonal(run: RunDirectory) -> Path:
    """Return the file of the mean diagonal Fisher, which is compared with the record of the stage ``fishers`` first.

    The records of earlier versions have no checksum of it. The checksum of the arrays in the file is verified instead.

    Raises:
        RunDirectoryError: The run has no mean diagonal Fisher, or its Fishers are not complete.
        StoreError: The file does not match its checksum.
    """
    path, home = run.diagonal_fisher, RunDirectory.open_any(run.fishers_home)
    if not home.config.fishers.diagonal.mean:
        remedy = "set fishers.diagonal.mean: true in a run file with another run_dir, and run `npeff fishers` on it"
        raise RunDirectoryError(f"{home.path} has no {path.name}", remedy, path=path)
    expected = record_of(home, FISHERS).get("diagonal_fisher")
    with os_errors_explained("read", path):
        intact = is_intact(path) if expected is None else file_checksum(path) == expected
    if not intact:
        remedy = f"run `npeff check --recompute {home.path}`, which computes it again"
        raise StoreError(f"{path} does not match its checksum", remedy, path=path)
    return path


def shards_checksum(records: Mapping[int, CompletionRecord]) -> str:
    """Return a checksum of all shards, for the record of the stage ``fishers``."""
    return json_checksum({f"{shard:05d}": record.checksum for shard, record in records.items()})


def direction_checksums(run: RunDirectory) -> dict[int, str]:
    """Return the checksums of the lifted directions; none for runs of an earlier version."""
    return {int(component): checksum for component, checksum in record_of(run, LIFT).get("units", {}).items()}


def validate_problem(config: RunConfig, n_fit: int, rank: int) -> None:
    """Check that a factorization of ``n_fit`` examples of this rank can start.

    Raises:
        InvalidProblemError: there are more components than factor rows in the fitted examples or in the subsample.
    """
    wanted = config.factorization
    rank = rows_per_example(wanted.kind, rank)
    if wanted.examples == "uncertain" and n_fit * rank < wanted.n_components:
        raise InvalidProblemError(
            f"only {n_fit} fitted examples have a largest class probability below factorization.max_probability: "
            f"{wanted.max_probability}, too few for {wanted.n_components} components: raise max_probability, or lower "
            "n_components"
        )
    validate_size(n_fit, rank, wanted.n_components)
    if wanted.subsample * rank < wanted.n_components:
        raise InvalidProblemError(
            f"factorization.subsample={wanted.subsample} examples of rank {rank} cannot start n_components="
            f"{wanted.n_components} components: set subsample to {math.ceil(wanted.n_components / rank)} or more"
        )


def count_fit_examples(run: RunDirectory) -> int:
    """Return the number of examples that the components are fitted on.

    Raises:
        InvalidProblemError: no example can be fitted, or all weights or all Fishers are zero.
    """
    fitted = fitted_examples(run)
    examples = fitted.read_examples("fisher_norm")
    splits, weights_N = fitted.of(examples)
    fit_N = splits.fit_N
    n_fit = int((fit_N & (weights_N > 0)).sum())
    if n_fit == 0 and bool(fit_N.any()):
        raise InvalidProblemError(
            f"all fitted examples have weight zero: check column {fitted.weight_column!r}, which is set by "
            "factorization.example_weights"
        )
    some_can = n_fit == 0 and bool(Splits.of(examples).fit_N.any())
    if some_can and fitted.chosen == "uncertain":
        raise InvalidProblemError(
            "no fitted example has a largest class probability below factorization.max_probability: "
            f"{fitted.max_probability}: raise max_probability"
        )
    if some_can and fitted.chosen == "mispredicted":
        raise InvalidProblemError(
            "no fitted example is known to be mispredicted: set factorization.examples: all, or add labels to the "
            "examples"
        )
    if n_fit == 0:
        raise InvalidProblemError(
            "no example in the fit split has finite logits and gradients: check the examples for NaN, or add more "
            "examples"
        )
    if not bool(examples.filter(examples["valid"])["fisher_norm"].to_numpy().any()):
        raise InvalidProblemError(
            "the Fishers of all examples are zero: the selected parameters do not change the logits, or all predicted "
            "probabilities are 0 or 1; select other parameters or check the model"
        )
    return n_fit
