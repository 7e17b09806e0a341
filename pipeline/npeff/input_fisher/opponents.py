"""Published attributions of a prediction to the positions of its input, to compare with functional Fisher information.

All of them explain the same function as the functional Fisher information does: p, the probability of a class. This is
the choice of Sundararajan et al. (2017) for integrated gradients. The other publications explain "the score" of a
class. An attribution is a number for each position, summed over the features of the position.

Legend: B examples, P positions, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.predictions import probabilities, probability_gradients
from npeff.input_fisher.seeded import SeededNumbers


class Noise(Protocol):
    """What the methods need of `npeff.input_fisher.noise.InputNoise`."""

    @property
    def mean_PF(self) -> Tensor: ...

    def draw(self, inputs: FlatInputs, examples: Sequence[int], draw: int) -> Tensor:
        """Return one draw (B, P, F) for each example, zero at unused positions."""


@dataclass(frozen=True)
class Explained:
    """The predictions that are explained, and the options of the methods."""

    examples: Sequence[int]
    """Numbers of the examples of the batch in the data set."""
    classes_B: Tensor
    """The class of each example whose probability is explained."""
    noise: Noise
    """Noise of the methods that average over draws. Its mean is the baseline of the methods that need one."""
    samples: int = 32
    """Draws of noise of each example."""
    steps: int = 32
    """Points of the path of integrated gradients."""
    seed: int = 0
    """Seed of the random attribution."""


class Passes(NamedTuple):
    """The cost of an attribution of one example."""

    forward: int
    backward: int
    """Backward passes to the inputs. A gradient costs one forward pass and one backward pass."""


@dataclass(frozen=True)
class Opponent:
    """A published attribution."""

    attribution: Callable[[FlatInputs, Explained], Tensor]
    """Returns (B, P), float64, 0 at unused positions."""
    passes: Callable[[Explained, int], Passes]
    """The cost of one example with this number of used positions."""
    signed: bool
    """Whether a negative value is evidence against the class."""
    replacement: str | None = None
    """The value that the method puts in place of inputs, ``mean`` or ``zero``. A curve with the same replacement tests
    the method on what it was made from."""


def random(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return uniform random numbers of the used positions."""
    drawn_BP = torch.zeros(inputs.used_BP.shape, dtype=torch.float64)
    numbers = SeededNumbers(explained.seed, "random attribution")
    for row, example in enumerate(explained.examples):
        drawn_BP[row] = torch.from_numpy(numbers.at(example).random(drawn_BP.shape[1]))
    return drawn_BP.to(inputs.used_BP.device) * inputs.used_BP


def gradient(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return the Euclidean norm of the gradient of each position (Simonyan et al., arXiv 1312.6034, took the maximum).

    With one feature, it is the absolute value.
    """
    gradients_BPF = probability_gradients(inputs, inputs.values_BPF, explained.classes_B)
    return gradients_BPF.square().sum(-1).sqrt()


def gradient_times_input(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return ⟨gradient, input⟩ of each position (Shrikumar et al., arXiv 1605.01713)."""
    gradients_BPF = probability_gradients(inputs, inputs.values_BPF, explained.classes_B)
    return (gradients_BPF * inputs.values_BPF.detach()).sum(-1)


def integrated_gradients(inputs: FlatInputs, explained: Explained, baseline_BPF: Tensor) -> Tensor:
    """Return ⟨x − baseline, mean gradient on the segment from the baseline to x⟩ (Sundararajan et al., ICML 2017).

    The integral is a Gauss-Legendre sum, as in captum. The attributions of an example sum to p(x) − p(baseline), up to
    the error of this sum.

    Args:
        inputs: The inputs of a batch.
        explained: The predictions.
        baseline_BPF: The baseline, of a shape that broadcasts to (B, P, F). Unused positions keep their values.
    """
    values_BPF = inputs.values_BPF.detach()
    change_BPF = (values_BPF - baseline_BPF.to(values_BPF)) * inputs.used_BP[..., None]
    nodes, weights = np.polynomial.legendre.leggauss(explained.steps)  # on [-1, 1]
    sum_BPF = torch.zeros_like(values_BPF, dtype=torch.float64)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        point_BPF = values_BPF - (1 - node) / 2 * change_BPF
        sum_BPF += weight / 2 * probability_gradients(inputs, point_BPF, explained.classes_B)
    return (change_BPF * sum_BPF).sum(-1)


def integrated_gradients_from_zero(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return integrated gradients with the baseline 0."""
    return integrated_gradients(inputs, explained, torch.zeros(()))


def integrated_gradients_from_mean(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return integrated gradients with the mean input as the baseline."""
    return integrated_gradients(inputs, explained, explained.noise.mean_PF)


def smooth_grad(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return the sum over the features of the mean gradient E[g], signed (Smilkov et al., arXiv 1706.03825)."""
    return _mean(_noisy_gradients(inputs, explained)).sum(-1)


def smooth_grad_times_input(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return ⟨E[g], input⟩ of each position, the other form of SmoothGrad in its publication."""
    return (_mean(_noisy_gradients(inputs, explained)) * inputs.values_BPF.detach()).sum(-1)


def smooth_grad_squared(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return the sum over the features of E[g²] (Hooker et al., NeurIPS 2019, arXiv 1806.10758)."""
    return _mean(gradients_BPF.square() for gradients_BPF in _noisy_gradients(inputs, explained)).sum(-1)


def var_grad(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return the sum over the features of Var(g), with divisor S (Adebayo et al., arXiv 1810.03292, as in captum)."""
    mean_BPF = torch.zeros_like(inputs.values_BPF, dtype=torch.float64)
    squares_BPF = torch.zeros_like(mean_BPF)
    for done, gradients_BPF in enumerate(_noisy_gradients(inputs, explained)):
        change_BPF = gradients_BPF - mean_BPF
        mean_BPF += change_BPF / (done + 1)
        squares_BPF += change_BPF * (gradients_BPF - mean_BPF)
    return (squares_BPF / explained.samples).sum(-1)


@torch.no_grad()
def occlusion(inputs: FlatInputs, explained: Explained) -> Tensor:
    """Return p(x) − p(x with the position replaced by the mean input) (Zeiler & Fergus, ECCV 2014), signed."""
    values_BPF, used_BP = inputs.values_BPF, inputs.used_BP
    mean_PF = explained.noise.mean_PF.to(values_BPF)
    place_BP = used_BP.cumsum(1).where(used_BP, 0)  # from 1 on
    rows_B = torch.arange(len(values_BPF), device=values_BPF.device)

    def chosen(replaced_BP: Tensor) -> Tensor:
        p_BC = probabilities(inputs, torch.where(replaced_BP[..., None], mean_PF, values_BPF))
        return p_BC[rows_B, explained.classes_B]

    before_B = chosen(torch.zeros_like(used_BP))
    found_BP = torch.zeros(used_BP.shape, dtype=torch.float64, device=values_BPF.device)
    # each pass replaces one position of every example: the function of the logits may be bound to the batch
    for place in range(1, int(place_BP.max()) + 1 if place_BP.numel() else 1):
        replaced_BP = place_BP == place
        found_BP += replaced_BP * (before_B - chosen(replaced_BP))[:, None]
    return found_BP


def _noisy_gradients(inputs: FlatInputs, explained: Explained) -> Iterator[Tensor]:
    """Return the gradients (B, P, F) of each draw."""
    values_BPF = inputs.values_BPF.detach()
    for draw in range(explained.samples):
        noisy_BPF = values_BPF + explained.noise.draw(inputs, explained.examples, draw)
        yield probability_gradients(inputs, noisy_BPF, explained.classes_B)


def _mean(terms: Iterator[Tensor]) -> Tensor:
    total, count = next(terms), 1
    for term in terms:
        total, count = total + term, count + 1
    return total / count


def _none(explained: Explained, n_positions: int) -> Passes:
    return Passes(0, 0)


def _one(explained: Explained, n_positions: int) -> Passes:
    return Passes(1, 1)


def _path(explained: Explained, n_positions: int) -> Passes:
    return Passes(explained.steps, explained.steps)


def _draws(explained: Explained, n_positions: int) -> Passes:
    return Passes(explained.samples, explained.samples)


def _positions(explained: Explained, n_positions: int) -> Passes:
    return Passes(n_positions + 1, 0)


OPPONENTS: dict[str, Opponent] = {
    "random": Opponent(random, _none, signed=False),
    "gradient": Opponent(gradient, _one, signed=False),
    "gradient_times_input": Opponent(gradient_times_input, _one, signed=True, replacement="zero"),
    "integrated_gradients_zero": Opponent(integrated_gradients_from_zero, _path, signed=True, replacement="zero"),
    "integrated_gradients_mean": Opponent(integrated_gradients_from_mean, _path, signed=True, replacement="mean"),
    "smooth_grad": Opponent(smooth_grad, _draws, signed=True),
    "smooth_grad_times_input": Opponent(smooth_grad_times_input, _draws, signed=True, replacement="zero"),
    "smooth_grad_squared": Opponent(smooth_grad_squared, _draws, signed=False),
    "var_grad": Opponent(var_grad, _draws, signed=False),
    "occlusion": Opponent(occlusion, _positions, signed=True, replacement="mean"),
}
"""The opponents, by name."""
