"""Elastic weight consolidation: a penalty that keeps parameters near those of earlier tasks (Kirkpatrick et al. 2017).

    penalty(θ) = (weight / 2) Σ_t (θ − θ*_t)ᵀ F_t (θ − θ*_t)

F_t is the Fisher of task t, a mean over its examples, at the parameters θ*_t after that task: its diagonal, or a
low-rank form (`low_rank_penalty.py`), which has the entries besides the diagonal, too. With the mode ``online``
(Schwarz et al. 2018), the Fishers are added up, each further task multiplies the earlier ones by ``decay``, and all are
at the parameters of the last task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from npeff.gradients.parameters import fingerprint_of
from npeff.training.checks import is_number
from npeff.training.diagonals import Diagonal, Tensors, check_shape, diagonal_of, named_tensors
from npeff.training.errors import TrainingError
from npeff.training.low_rank_penalty import LowRankFisher, rows_of_parameters


class Fisher(Protocol):
    """A Fisher of some parameters as a quadratic form."""

    labels: str | None
    fingerprint: str | None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter."""

    def quadratic(self, change: Mapping[str, Tensor]) -> Tensor:
        """Return Δᵀ F Δ for a change Δ of the parameters."""


class EWC:
    """The penalty of elastic weight consolidation.

    Args:
        fishers: The Fisher of each task, in the order of the tasks. Diagonals: mappings from parameter names to
            tensors, or safetensors files, such as ``diagonal_fisher.safetensors`` of runs. With ``low_rank``: rows A
            (n, *shape) of each parameter with F = AᵀA, as mappings or files, or instances of `LowRankFisher`.
        anchors: The parameters after each task, as mappings or safetensors files. Names without a Fisher are ignored.
        weight: Factor of the penalty. For a mean loss over N examples and a Fisher of M examples, M / N is the factor
            of the Laplace approximation.
        low_rank: Whether the Fishers are low-rank instead of diagonal.
        mode: ``separate`` for a term for each task at its own parameters, ``online`` for the parameters of the last.
        decay: Factor of earlier Fishers at each further task, only for ``online``. The default is 1.
        allow_empirical: Accept Fishers that are known to be computed with the labels of the data (``empirical``).

    Raises:
        TrainingError: An option is out of bounds, or the tensors of a task do not fit together.
    """

    def __init__(
        self,
        fishers: Sequence[Tensors | LowRankFisher],
        anchors: Sequence[Tensors],
        *,
        weight: float,
        low_rank: bool = False,
        mode: Literal["separate", "online"] = "separate",
        decay: float | None = None,
        allow_empirical: bool = False,
    ) -> None:
        _check_options(weight, mode, decay)
        if isinstance(fishers, Mapping | str | LowRankFisher) or isinstance(anchors, Mapping | str):
            raise TrainingError("fishers and anchors must be lists with one item for each task")
        if not fishers or len(fishers) != len(anchors):
            raise TrainingError(
                f"there must be as many anchors as fishers, and at least one: {len(fishers)} fishers, {len(anchors)} "
                "anchors"
            )
        tasks = []
        for number, (source, anchor) in enumerate(zip(fishers, anchors, strict=True)):
            what = f"task {number}"
            fisher = _fisher(source, f"fishers, {what}", low_rank)
            refuse_empirical(fisher.labels, what, allow_empirical)
            tasks.append(_task(what, fisher, anchor))
        self.weight = float(weight)
        self._unchecked = [task for task in tasks if task.fisher.fingerprint is not None]
        self._tasks = tasks if mode == "separate" else _online(tasks, 1.0 if decay is None else decay)

    def penalty(self, model: nn.Module) -> Tensor:
        """Compute the penalty of a model, a number to add to its loss.

        Args:
            model: A model with the parameters of the Fishers. Its other parameters are not penalized.

        Returns:
            A scalar with a gradient, in float32, or in float64 if the parameters are.

        Raises:
            TrainingError: The model lacks a parameter or has it in another shape, or the anchors are not the parameters
                at which a Fisher was computed.
        """
        parameters = dict(model.named_parameters())
        self._check(parameters)
        total: Tensor | None = None
        for task in self._tasks:
            term = task.factor * task.fisher.quadratic(task.change(parameters))
            total = term if total is None else total + term.to(total.device)
        assert total is not None, "there is at least one task"
        return self.weight / 2 * total

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        for task in self._tasks:
            for name, shape in task.fisher.shapes.items():
                if name not in parameters:
                    known = ", ".join(list(parameters)[:4]) + (", …" if len(parameters) > 4 else "")
                    raise TrainingError(
                        f"{task.what}: the model has no parameter {name!r} (it has {known})",
                        "use the unwrapped model with the parameter names of the Fisher",
                    )
                check_shape(name, shape, parameters[name], task.what)
        for task in self._unchecked:
            # the fingerprint depends on the order of the parameters, which a file does not keep
            names = [name for name in parameters if name in task.anchor]
            if fingerprint_of(task.anchor, names) != task.fisher.fingerprint:
                raise TrainingError(
                    f"{task.what}: the anchors are not the parameters at which its Fisher was computed (another "
                    "fingerprint)",
                    "use the parameters of that run's model, or compute the Fisher again",
                )
        self._unchecked = []


@dataclass(frozen=True)
class _Task:
    """One task: its Fisher, the parameters with a Fisher after it, and a factor of the Fisher."""

    what: str
    fisher: Fisher
    anchor: dict[str, Tensor]
    factor: float = 1.0

    def change(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return θ − θ* of the parameters with a Fisher, at least in float32."""
        found = {}
        for name, anchor in self.anchor.items():
            values = parameters[name].to(torch.promote_types(parameters[name].dtype, torch.float32))
            if anchor.device != values.device:  # moved once, not in every step
                self.anchor[name] = anchor = anchor.to(values.device)
            found[name] = values - anchor.to(values)
        return found


def _fisher(source: Tensors | LowRankFisher, what: str, low_rank: bool) -> Fisher:
    """Read the Fisher of a task."""
    if isinstance(source, LowRankFisher):
        if not low_rank:
            raise TrainingError(f"{what} is low-rank", "set low_rank=True")
        return source
    found = named_tensors(source, what)
    if low_rank:
        return rows_of_parameters(found.values, found.metadata, what)
    return diagonal_of(found, what)


def _task(what: str, fisher: Fisher, anchor: Tensors) -> _Task:
    """Read the parameters of a task and check that they fit the Fisher."""
    parameters = named_tensors(anchor, f"anchors, {what}").values
    for name, shape in fisher.shapes.items():
        if name not in parameters:
            raise TrainingError(
                f"anchors, {what}: there is no {name!r}", "give every parameter that has a Fisher, with its name"
            )
        check_shape(name, shape, parameters[name], what)
        if not bool(torch.isfinite(parameters[name]).all()):
            raise TrainingError(f"anchors, {what}: {name!r} has entries that are not finite: use another checkpoint")
    return _Task(what, fisher, {name: parameters[name].detach().clone() for name in fisher.shapes})


def refuse_empirical(labels: str | None, what: str, allow_empirical: bool) -> None:
    """Check the kind of labels of a Fisher.

    Args:
        labels: The kind; None if it is not known.
        what: The beginning of the message.
        allow_empirical: Whether the kind ``empirical`` is accepted.

    Raises:
        TrainingError: The Fisher is empirical, and this is not allowed.
    """
    if labels == "empirical" and not allow_empirical:
        raise TrainingError(
            f"{what}: its Fisher was computed with the labels of the data (empirical), which is not the Fisher of the "
            "model",
            "compute it with labels: exact, or set allow_empirical=True",
        )


def _online(tasks: list[_Task], decay: float) -> list[_Task]:
    """Return the tasks at the parameters of the last one, with the factors of their Fishers. Diagonals are added up."""
    last = tasks[-1]
    for task in tasks[:-1]:
        for name, shape in task.fisher.shapes.items():
            if name not in last.anchor:
                raise TrainingError(
                    f"{task.what}: {name!r} has no Fisher in the last task",
                    "use mode='separate', or the same parameters",
                )
            check_shape(name, shape, last.anchor[name], task.what)
    moved = [
        replace(task, anchor={name: last.anchor[name] for name in task.fisher.shapes}, factor=decay**age)
        for age, task in zip(range(len(tasks) - 1, -1, -1), tasks, strict=True)
    ]
    diagonals = [(task.fisher, task.factor) for task in moved if isinstance(task.fisher, Diagonal)]
    return [replace(last, fisher=Diagonal.sum_of(diagonals))] if diagonals else moved


def _check_options(weight: float, mode: str, decay: float | None) -> None:
    if not is_number(weight) or weight < 0:
        raise TrainingError(f"weight must be a number that is not negative, not {weight!r}")
    if mode not in ("separate", "online"):
        raise TrainingError(f"mode must be 'separate' or 'online', not {mode!r}")
    if decay is None:
        return
    if mode == "separate":
        raise TrainingError("decay applies to mode='online': remove it, or choose that mode")
    if not is_number(decay) or not 0 <= decay <= 1:
        raise TrainingError(f"decay must be a number from 0 to 1, not {decay!r}")
