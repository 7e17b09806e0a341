"""The penalty of elastic weight consolidation from runs: their diagonal Fishers and the parameters of their models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.worker_specs import model_spec
from npeff.storage.errors import damaged_file
from npeff.store.array_files import read_arrays
from npeff.training.ewc import EWC, refuse_empirical


def ewc(
    runs: Sequence[RunDirectory | str | Path],
    *,
    weight: float,
    mode: Literal["separate", "online"] = "separate",
    decay: float | None = None,
    allow_empirical: bool = False,
) -> EWC:
    """Construct the penalty that keeps a model near the models of runs.

    The runs must have the mean diagonal Fisher (``fishers.diagonal.mean: true``). The models are loaded as their tasks
    load them, on the CPU.

    Args:
        runs: The runs, one for each earlier task, in the order of the tasks.
        weight: Factor of the penalty.
        mode: ``separate`` for a term for each run, ``online`` for one term.
        decay: Factor of earlier Fishers at each further run, only for ``online``. The default is 1.
        allow_empirical: Accept Fishers that were computed with the labels of the data.

    Returns:
        The penalty.

    Raises:
        NpeffError: A run has no diagonal Fisher, its model is no longer the one of its Fishers, or an option is out of
            bounds. The message is one line with the cause and the remedy.
    """
    if isinstance(runs, RunDirectory | str | Path):
        raise RunDirectoryError("npeff.ewc takes a list of runs", "give [run]")
    found = [_fisher_and_parameters(_opened(run), allow_empirical) for run in runs]
    fishers, anchors = [fisher for fisher, _ in found], [anchor for _, anchor in found]
    return EWC(fishers, anchors, weight=weight, mode=mode, decay=decay, allow_empirical=allow_empirical)


def _opened(run: RunDirectory | str | Path) -> RunDirectory:
    return run if isinstance(run, RunDirectory) else RunDirectory.open_any(run)


def stored_diagonal(run: RunDirectory) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the mean diagonal Fisher of a run and the texts in the header of its file.

    Raises:
        NpeffError: The run has none, or the file is damaged.
    """
    path = run.diagonal_fisher
    if not path.exists():
        raise RunDirectoryError(
            f"{run.path} has no {path.name}",
            "set fishers.diagonal.mean: true in a run file with another run_dir, and run `npeff fishers` on it",
            path=path,
        )
    arrays, metadata = read_arrays(path)
    if "model_fingerprint" not in metadata:
        raise damaged_file(path)
    return {name: torch.from_numpy(values) for name, values in arrays.items()}, metadata


def _fisher_and_parameters(run: RunDirectory, allow_empirical: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fisher, metadata = stored_diagonal(run)
    refuse_empirical(metadata.get("labels"), str(run.path), allow_empirical)
    loaded = replace(model_spec(run, metadata["model_fingerprint"]), device="cpu").load()
    parameters = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    return fisher, parameters
