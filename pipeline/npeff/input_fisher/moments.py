"""Mean and second moments of the inputs of a data set, as sums that can be merged.

Products are taken around the mean of the examples in hand and moved to the joint mean when two parts are merged (Chan,
Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 37, 1983). Inputs whose mean
is large compared to their deviation therefore lose no digits.

Legend: N examples, P positions, F features, D = P·F entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from npeff.input_fisher.flat_inputs import FlatInputs

CovarianceKind = Literal["full", "kronecker", "diagonal", "isotropic"]


@dataclass(frozen=True)
class Moments:
    """The number of samples, their mean, and the sums of products of their deviations from the mean, float64.

    A sample is an example, or a position if positions are exchangeable (P is then 1).
    """

    n: int
    mean_PF: Tensor
    products: Mapping[str, Tensor]
    """``full``: joint (D, D). ``kronecker``: positions (P, P), summed over the features, and features (F, F), summed
    over the positions. Other kinds: squares (P, F)."""

    @classmethod
    def of(cls, inputs: FlatInputs, kind: CovarianceKind) -> Moments:
        """Return the moments of the examples of a batch. All values must be finite.

        For exchangeable positions, the used positions are the samples. Otherwise, the values of all positions count.
        """
        values = inputs.values_BPF.detach().double()
        if inputs.exchangeable:
            values = values[inputs.used_BP][:, None]
        mean_PF = values.mean(0) if len(values) else values.new_zeros(values.shape[1:])
        return cls(len(values), mean_PF, _products(values - mean_PF, kind))

    def on(self, device: torch.device) -> Moments:
        """Return the moments on a device."""
        products = {name: values.to(device) for name, values in self.products.items()}
        return Moments(self.n, self.mean_PF.to(device), products)

    def merged(self, other: Moments) -> Moments:
        """Return the moments of the samples of both."""
        if not self.n or not other.n:
            return self if self.n else other
        n = self.n + other.n
        step_PF = other.mean_PF - self.mean_PF
        kind = next(kind for kind, names in _NAMES.items() if names == tuple(self.products))
        between = _products(step_PF[None], kind)
        factor = self.n * other.n / n
        products = {
            name: values + other.products[name] + factor * between[name] for name, values in self.products.items()
        }
        return Moments(n, self.mean_PF + step_PF * (other.n / n), products)


_NAMES: dict[CovarianceKind, tuple[str, ...]] = {
    "full": ("joint",),
    "kronecker": ("positions", "features"),
    "diagonal": ("squares",),
}


def _products(deviations_NPF: Tensor, kind: CovarianceKind) -> dict[str, Tensor]:
    """Return the sums over the samples of the products that a kind of covariance needs."""
    match kind:
        case "full":
            rows_ND = deviations_NPF.flatten(1)
            return {"joint": rows_ND.T @ rows_ND}
        case "kronecker":
            by_position = deviations_NPF.transpose(0, 1).flatten(1)
            by_feature = deviations_NPF.flatten(0, 1)
            return {"positions": by_position @ by_position.T, "features": by_feature.T @ by_feature}
        case _:
            return {"squares": deviations_NPF.square().sum(0)}


def merged(parts: Iterable[Moments]) -> Moments:
    """Return the moments of the samples of all parts, merged in this order."""
    first, *others = parts
    for part in others:
        first = first.merged(part)
    return first
