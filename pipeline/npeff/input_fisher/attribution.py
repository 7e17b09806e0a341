"""Functional Fisher information of a prediction, split over the positions of its example, and the entropy it bounds.

For a probability f = p(y | ·) and inputs z ~ N(x, Σ), the log-Sobolev inequality bounds the functional entropy of f by
the functional Fisher information (Gat, Calderon, Reichart & Hazan, ICML 2022, arXiv 2206.05700, Theorem 4.1):

    Ent(f) = E[f log f] - E[f] log E[f]  ≤  ½ E[⟨Σ∇f, ∇f⟩ / f].

Summed over all classes, this is a bound of the mutual information between the prediction and the inputs:

    I(Y; Z) = H(E[p]) - E[H(p)]  ≤  ½ E[tr(Σ F_z)],    F_z = J_zᵀ S J_z,   S = diag(p) - p pᵀ.

All values are in nats. Here Σ is the covariance of the noise, spread·Σ of `InputNoise`.

Legend: B examples, P positions, F features, C classes, S draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npeff.gradients import IGNORED, LabelSpec, UnsupportedModelError, label_rows
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.noise import InputNoise

_BITS = 40
"""The number of a draw is added to that of an example, above so many bits, to seed the draws of labels."""


@dataclass(frozen=True)
class InputInformation:
    """The information in the inputs about the predictions on some examples, in nats, float64.

    Values are NaN for an example with logits or gradients that are not finite.
    """

    information_B: Tensor
    """½ E[⟨Σ∇f, ∇f⟩ / f], or ½ E[tr(Σ F_z)]: the mean over the draws."""
    information_se_B: Tensor
    """Its standard error; NaN for a single draw."""
    positions_BP: Tensor
    """The information, split over the positions. Zero at unused positions."""
    entropy_B: Tensor
    """Estimate of the functional entropy, or of the mutual information; NaN for a single draw, and for examples with
    several predictions."""
    entropy_se_B: Tensor
    """Its standard error."""
    stable_B: Tensor
    """Fraction of the draws for which all predicted classes are those without noise."""


def input_information(
    inputs: FlatInputs,
    noise: InputNoise,
    examples: Sequence[int],
    *,
    samples: int,
    repeats: int = 1,
    before: Tensor | None = None,
    classes_B: Tensor | None = None,
    labels: LabelSpec | None = None,
    targets: Tensor | None = None,
    conditional: bool = False,
) -> InputInformation:
    """Estimate the functional Fisher information of each example, and the entropy that it bounds, from draws of noise.

    Args:
        inputs: The inputs of a batch. It holds all examples, in order, `repeats` times: one pass then computes as many
            draws, which takes less time for small models.
        noise: The noise.
        examples: The numbers of the B examples in the data set, which seed the draws.
        samples: Number S of draws of noise for each example, a multiple of `repeats`.
        repeats: Number r of times that the batch holds each example.
        before: The predicted classes (B,) or (B, T) without noise. By default they are computed.
        classes_B: The class y of each example whose probability is explained. The examples must have one prediction.
            None: all classes, by label rows.
        labels: The label rows, if `classes_B` is None.
        targets: Targets of the batch, as for `label_rows`.
        conditional: Whether to split the information by the conditional variance of each position given all others.
            The parts are then not negative, and their sum differs from the information.

    Returns:
        The information of each example.
    """
    numbers, n_examples = list(examples) * repeats, len(examples)
    sums = _Sums(inputs, noise, n_examples, conditional)
    if before is None:
        with torch.no_grad():
            before = inputs.logits(inputs.values_BPF).argmax(-1)[:n_examples]
    before = torch.cat([before] * repeats)
    classes = None if classes_B is None else classes_B.repeat(repeats)
    ignored = torch.zeros_like(before, dtype=torch.bool)
    if targets is not None and targets.shape == before.shape:
        ignored = targets == IGNORED
    for start in range(0, samples, repeats):
        draws = [start + repeat for repeat in range(repeats) for _ in examples]
        values_BPF = (inputs.values_BPF.detach() + noise.draw(inputs, numbers, draws)).requires_grad_()
        logits = inputs.logits(values_BPF)
        p_BX = logits.detach().double().softmax(-1) if logits.dim() == 2 else None
        if classes is not None:
            assert p_BX is not None
            rows, p_BX = _of_class(logits, values_BPF, classes), p_BX.gather(-1, classes[:, None])
        else:
            assert labels is not None
            # each draw of noise has its own draws of labels
            seeds = [number + (draw << _BITS) for number, draw in zip(numbers, draws, strict=True)]
            rows = _of_all_classes(logits, values_BPF, labels, seeds, targets)
        stable = (logits.argmax(-1) == before) | ignored
        finite = logits.isfinite().all(-1) | ignored
        sums.add(rows, p_BX, stable.view(len(stable), -1).all(1), finite.view(len(finite), -1).all(1))
    return sums.result()


def _of_class(logits: Tensor, values_BPF: Tensor, classes_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the gradient of log p(y | z) with its weight p(y | z)."""
    log_p_B = logits.double().log_softmax(-1).gather(-1, classes_B[:, None])[:, 0]
    yield _gradient(log_p_B, values_BPF), log_p_B.detach().exp()


def _of_all_classes(
    logits: Tensor, values_BPF: Tensor, labels: LabelSpec, examples: Sequence[int], targets: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the gradients of the label rows, each with its weight."""
    rows = label_rows(labels, logits.detach(), examples, targets)
    for row, direction in enumerate(rows.directions):
        product_B = (logits * direction).flatten(1).sum(1)
        yield _gradient(product_B, values_BPF, keep_graph=row + 1 < len(rows.directions)), rows.scales_B.square()


def _gradient(outputs_B: Tensor, values_BPF: Tensor, *, keep_graph: bool = False) -> Tensor:
    """Return the gradients (B, P, F) of the outputs, each with respect to the inputs of its example.

    Raises:
        UnsupportedModelError: The outputs are not a differentiable function of the inputs.
    """
    gradient = None
    if outputs_B.requires_grad:
        gradient = torch.autograd.grad(outputs_B.sum(), values_BPF, retain_graph=keep_graph, allow_unused=True)[0]
    if gradient is None:
        raise UnsupportedModelError(
            "the logits are no differentiable function of the inputs: the method `inputs` of the task must compute "
            "them from the values that it is given, with gradients"
        )
    return gradient


class _Sums:
    """What the draws add up to. A batch holds the examples one or more times."""

    def __init__(self, inputs: FlatInputs, noise: InputNoise, n_examples: int, conditional: bool) -> None:
        self._used_BP, self._noise, self._conditional = inputs.used_BP, noise, conditional
        self._n_examples = n_examples
        shape = (n_examples, inputs.used_BP.shape[1])
        self._positions_BP = torch.zeros(shape, dtype=torch.float64, device=inputs.used_BP.device)
        self._information: list[Tensor] = []
        self._p: list[Tensor] = []
        self._stable: list[Tensor] = []

    def add(
        self, rows: Iterable[tuple[Tensor, Tensor]], p_BX: Tensor | None, stable_B: Tensor, finite_B: Tensor
    ) -> None:
        """Add the draws of one pass.

        Args:
            rows: Gradients, each with its weight.
            p_BX: The explained probabilities.
            stable_B: Whether the predicted classes are those without noise.
            finite_B: Whether the logits are finite.
        """
        information_B = torch.zeros(len(finite_B), dtype=torch.float64, device=finite_B.device)
        for gradients_BPF, weights_B in rows:
            gradients = gradients_BPF.double()
            parts_BP = (self._noise.times(gradients, self._used_BP) * gradients).sum(2) * weights_B[:, None] / 2
            information_B += parts_BP.sum(1)
            if self._conditional:
                moved_BPF = self._noise.conditional_times(gradients, self._used_BP)
                parts_BP = (moved_BPF * gradients).sum(2) * weights_B[:, None] / 2
            self._positions_BP += parts_BP.view(-1, *self._positions_BP.shape).sum(0)
        self._information.append(information_B.where(finite_B, torch.nan).view(-1, self._n_examples))
        self._stable.append(stable_B.double().view(-1, self._n_examples))
        if p_BX is not None:
            self._p.append(p_BX.view(-1, self._n_examples, p_BX.shape[1]))

    def result(self) -> InputInformation:
        information_SB = torch.cat(self._information)
        n, information_B = len(information_SB), information_SB.mean(0)
        nothing_B = torch.full_like(information_B, torch.nan)
        entropy_B, entropy_se_B = nothing_B, nothing_B
        if self._p and n > 1:
            entropy_B, entropy_se_B = functional_entropy(torch.cat(self._p))
        finite_B = information_B.isfinite()
        return InputInformation(
            information_B=information_B.where(finite_B, torch.nan),
            information_se_B=nothing_B if n == 1 else information_SB.std(0) / n**0.5,
            positions_BP=(self._positions_BP / n).where(finite_B[:, None], torch.nan),
            entropy_B=entropy_B.where(finite_B, torch.nan),
            entropy_se_B=entropy_se_B.where(finite_B, torch.nan),
            stable_B=torch.cat(self._stable).mean(0),
        )


def functional_entropy(p_SBX: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate functional entropies from draws, summed over functions.

    The estimate with the means of the draws is too small by about Var(f) / (2 S E[f]), which is added.

    Args:
        p_SBX: Values of X functions, such as class probabilities, for S ≥ 2 draws and B examples. For all classes, the
            sum is the mutual information H(E[p]) - E[H(p)].

    Returns:
        The entropies (B,) in nats, and their standard errors (B,).
    """
    n, p_SBX = len(p_SBX), p_SBX.double()
    mean_BX = p_SBX.mean(0)
    entropy_BX = torch.xlogy(p_SBX, p_SBX).mean(0) - torch.xlogy(mean_BX, mean_BX)
    bias_BX = torch.where(mean_BX > 0, p_SBX.var(0) / (2 * n * mean_BX), 0.0)
    influence_SBX = torch.xlogy(p_SBX, p_SBX) - torch.xlogy(p_SBX, mean_BX) - p_SBX
    return (entropy_BX + bias_BX).sum(-1), influence_SBX.sum(-1).std(0) / n**0.5
