"""Elastic weight consolidation: a penalty that keeps parameters near those of earlier tasks (Kirkpatrick et al. 2017).

    penalty(θ) = (weight / 2) Σ_t Σ_k F_tk (θ_k − θ*_tk)²

F_t is the diagonal Fisher of task t, a mean over its examples, at the parameters θ*_t after that task. With the mode
``online`` (Schwarz et al. 2018), there is one term: the parameters of the last task, and the sum of the Fishers, in
which each further task multiplies the earlier ones by ``decay``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from npeff.gradients.parameters import fingerprint_of
from npeff.training.checks import is_number
from npeff.training.diagonals import Tensors, check_diagonal, check_shape, named_tensors
from npeff.training.errors import TrainingError


class EWC:
    """The penalty of elastic weight consolidation.

    Args:
        fishers: The diagonal Fisher of each task, in the order of the tasks: mappings from parameter names to tensors,
            or safetensors files, such as ``diagonal_fisher.safetensors`` of runs.
        anchors: The parameters after each task, as mappings or safetensors files. Names without a Fisher are ignored.
        weight: Factor of the penalty. For a mean loss over N examples and a Fisher of M examples, M / N is the factor
            of the Laplace approximation.
        mode: ``separate`` for a term for each task, ``online`` for one term.
        decay: Factor of earlier Fishers at each further task, only for ``online``. The default is 1.
        allow_empirical: Accept files of Fishers that were computed with the labels of the data (``empirical``).

    Raises:
        TrainingError: An option is out of bounds, or the tensors of a task do not fit together.
    """

    def __init__(
        self,
        fishers: Sequence[Tensors],
        anchors: Sequence[Tensors],
        *,
        weight: float,
        mode: Literal["separate", "online"] = "separate",
        decay: float | None = None,
        allow_empirical: bool = False,
    ) -> None:
        _check_options(weight, mode, decay)
        if isinstance(fishers, Mapping | str) or isinstance(anchors, Mapping | str):
            raise TrainingError("fishers and anchors must be lists with one item for each task")
        if not fishers or len(fishers) != len(anchors):
            raise TrainingError(
                f"there must be as many anchors as fishers, and at least one: {len(fishers)} fishers, {len(anchors)} "
                "anchors"
            )
        pairs = enumerate(zip(fishers, anchors, strict=True))
        tasks = [_task(number, fisher, anchor, allow_empirical) for number, (fisher, anchor) in pairs]
        self.weight = float(weight)
        self._unchecked = [task for task in tasks if task.fingerprint is not None]
        self._tasks = tasks if mode == "separate" else [_merged(tasks, 1.0 if decay is None else decay)]

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
        for name, fisher, anchor in self._terms(parameters):
            values = parameters[name].to(torch.promote_types(parameters[name].dtype, torch.float32))
            term = (fisher.to(values) * (values - anchor.to(values)).square()).sum()
            total = term if total is None else total + term.to(total.device)
        assert total is not None, "a task has at least one Fisher"
        return self.weight / 2 * total

    def _terms(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for task in self._tasks:
            for name in task.fisher:
                device = parameters[name].device
                if task.fisher[name].device != device:  # moved once, not in every step
                    task.fisher[name], task.anchor[name] = task.fisher[name].to(device), task.anchor[name].to(device)
                yield name, task.fisher[name], task.anchor[name]

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        for task in self._tasks:
            for name, values in task.fisher.items():
                if name not in parameters:
                    known = ", ".join(list(parameters)[:4]) + (", …" if len(parameters) > 4 else "")
                    raise TrainingError(
                        f"{task.what}: the model has no parameter {name!r} (it has {known})",
                        "use the unwrapped model with the parameter names of the Fisher",
                    )
                check_shape(name, values, parameters[name], task.what)
        for task in self._unchecked:
            # the fingerprint depends on the order of the parameters, which a file does not keep
            names = [name for name in parameters if name in task.fisher]
            if fingerprint_of(task.anchor, names) != task.fingerprint:
                raise TrainingError(
                    f"{task.what}: the anchors are not the parameters at which its Fisher was computed (another "
                    "fingerprint)",
                    "use the parameters of that run's model, or compute the Fisher again",
                )
        self._unchecked = []


@dataclass(frozen=True)
class _Task:
    """One task: its Fisher, its parameters, and their fingerprint if the file of the Fisher has one."""

    what: str
    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]
    fingerprint: str | None


def _task(number: int, fisher: Tensors, anchor: Tensors, allow_empirical: bool) -> _Task:
    """Read the tensors of a task and check that they fit together."""
    what = f"task {number}"
    found, parameters = named_tensors(fisher, f"fishers, {what}"), named_tensors(anchor, f"anchors, {what}")
    refuse_empirical(found.metadata.get("labels"), what, allow_empirical)
    check_diagonal(found.values, f"fishers, {what}")
    for name, values in found.values.items():
        if name not in parameters.values:
            raise TrainingError(
                f"anchors, {what}: there is no {name!r}", "give every parameter that has a Fisher, with its name"
            )
        check_shape(name, values, parameters.values[name], what)
        if not bool(torch.isfinite(parameters.values[name]).all()):
            raise TrainingError(f"anchors, {what}: {name!r} has entries that are not finite: use another checkpoint")
    own = {name: values.detach().clone() for name, values in found.values.items()}
    anchors = {name: parameters.values[name].detach().clone() for name in own}
    return _Task(what, own, anchors, found.metadata.get("model_fingerprint"))


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


def _merged(tasks: list[_Task], decay: float) -> _Task:
    """Return the sum of the Fishers, of which those of earlier tasks are decayed, at the last parameters."""
    *earlier, last = tasks
    total = {name: values.to(torch.promote_types(values.dtype, torch.float32)) for name, values in last.fisher.items()}
    for age, task in enumerate(reversed(earlier), start=1):
        for name, values in task.fisher.items():
            if name not in total:
                raise TrainingError(
                    f"{task.what}: {name!r} has no Fisher in the last task",
                    "use mode='separate', or the same parameters",
                )
            check_shape(name, values, total[name], task.what)
            total[name] = total[name] + decay**age * values.to(total[name])
    return _Task(last.what, total, dict(last.anchor), None)


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
