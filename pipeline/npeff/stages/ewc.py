"""The penalty of elastic weight consolidation from runs: their Fishers and the parameters of their models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from npeff.fisher.second_moments import MomentSum
from npeff.gradients import ParameterLayout
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.stages.earlier_results import checksums_of, sketch_of, verified_diagonal
from npeff.stages.scaled_rows import scaled_rows
from npeff.stages.worker_specs import model_spec
from npeff.storage.errors import damaged_file
from npeff.store.array_files import read_arrays
from npeff.store.fisher_store import FisherStore
from npeff.training.checks import is_count
from npeff.training.diagonals import Tensors
from npeff.training.ewc import EWC, refuse_empirical
from npeff.training.low_rank_penalty import LowRankFisher


def ewc(
    runs: Sequence[AnyRun],
    *,
    weight: float,
    low_rank: bool = False,
    directions: int | None = None,
    mode: Literal["separate", "online"] = "separate",
    decay: float | None = None,
    allow_empirical: bool = False,
) -> EWC:
    """Construct the penalty that keeps a model near the models of runs.

    The models are loaded as their tasks load them, on the CPU.

    Args:
        runs: The runs, one for each earlier task, in the order of the tasks.
        weight: Factor of the penalty.
        low_rank: Use the stored low-rank Fishers, in the coordinates of the run's sketch. By default, the mean diagonal
            Fishers, which the runs must have (``fishers.diagonal.mean: true``).
        directions: With ``low_rank``, keep only this number of leading eigenvectors of each mean Fisher, which makes a
            step cheaper. By default, all rows are kept.
        mode: ``separate`` for a term for each run at its own parameters, ``online`` for the parameters of the last.
        decay: Factor of earlier Fishers at each further run, only for ``online``. The default is 1.
        allow_empirical: Accept Fishers that were computed with the labels of the data.

    Returns:
        The penalty.

    Raises:
        NpeffError: A run has no such Fisher, its files are damaged, its model is no longer the one of its Fishers, or
            an option is out of bounds. The message is one line with the cause and the remedy.
    """
    if isinstance(runs, AnyRun):
        raise RunDirectoryError("npeff.ewc takes a list of runs", "give [run]")
    if directions is not None and (not low_rank or not is_count(directions)):
        raise RunDirectoryError(
            f"directions must be a whole number of at least 1, and needs low_rank=True, not {directions!r}",
            "set low_rank=True, or leave directions out",
        )
    fishers: list[Tensors | LowRankFisher] = []
    anchors = []
    for run in (as_run(each, of_all=True) for each in runs):
        fisher, labels, fingerprint = mean_low_rank(run) if low_rank else _diagonal(run)
        refuse_empirical(labels, str(run.path), allow_empirical)  # before the model is loaded
        if directions is not None and isinstance(fisher, LowRankFisher):
            fisher = fisher.leading(directions)
        loaded = replace(model_spec(run, fingerprint), device="cpu").load()
        fishers.append(fisher)
        anchors.append({name: parameter.detach() for name, parameter in loaded.model.named_parameters()})
    return EWC(
        fishers,
        anchors,
        weight=weight,
        low_rank=low_rank,
        mode=mode,
        decay=decay,
        allow_empirical=allow_empirical,
    )


def stored_diagonal(run: RunDirectory) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the mean diagonal Fisher of a run and the texts in the header of its file, after verification.

    Raises:
        NpeffError: The run has none, its Fishers are not complete, or the file is damaged.
    """
    path = verified_diagonal(run)
    arrays, metadata = read_arrays(path)
    if "model_fingerprint" not in metadata:
        raise damaged_file(path)
    return {name: torch.from_numpy(values) for name, values in arrays.items()}, metadata


def _diagonal(run: RunDirectory) -> tuple[dict[str, Tensor], str | None, str]:
    """Return the mean diagonal Fisher of a run, the kind of its labels, and the fingerprint of its model."""
    fisher, metadata = stored_diagonal(run)
    return fisher, metadata.get("labels"), metadata["model_fingerprint"]


def mean_low_rank(run: RunDirectory) -> tuple[LowRankFisher, str, str]:
    """Read the mean of the stored Fishers of a run, and verify the shards.

    In memory are the rows of all examples, or a matrix of D×D in float64 if there are more than D rows.

    Args:
        run: The run.

    Returns:
        The Fisher, the kind of its labels, and the fingerprint of its model.

    Raises:
        NpeffError: The Fishers are not complete, a shard is damaged, or the sketch is not linear.
    """
    checksums, store = checksums_of(run), FisherStore.open(run.fishers)
    if store.attrs["sketch"]["kind"] == "topk":
        raise RunDirectoryError(
            f"{run.path} has the sketch topk, which is not linear",
            "use the mean diagonal (low_rank=False), or a run with another fishers.sketch",
        )
    layout = ParameterLayout.from_json(store.attrs["parameter_layout"])
    names = ["valid", "ranks", "frobenius_norms"]
    counts = [store.read_shard(shard, each, names) for shard, each in sorted(checksums.items())]
    n_rows = sum(int(each["ranks"][each["valid"]].sum()) for each in counts)
    n_examples = sum(int(each["valid"].sum()) for each in counts)
    moments = MomentSum(store.dim) if n_rows > store.dim else None
    kept = []
    for shard, each in sorted(checksums.items()):
        arrays = store.read_shard(shard, each, [*names, "factors"])
        rows_nD = torch.from_numpy(scaled_rows(arrays, arrays["valid"])) / max(n_examples, 1) ** 0.5
        if moments is None:
            kept.append(rows_nD)
        else:
            moments.add(rows_nD)
    labels, fingerprint = str(store.attrs["labels"]["kind"]), str(store.attrs["model_fingerprint"])
    fisher = LowRankFisher(
        shapes=dict(zip(layout.names, layout.shapes, strict=True)),
        linear_map=sketch_of(store.attrs, layout),
        rows_nD=torch.cat(kept) if moments is None else None,
        moments_DD=None if moments is None else moments.matrix().float(),
        labels=labels,
    )
    return fisher, labels, fingerprint
