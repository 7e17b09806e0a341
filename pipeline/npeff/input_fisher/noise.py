"""The measure on inputs: Gaussian noise N(0, spread·Σ) around an example, with Σ the covariance of the inputs.

Legend: B examples, P positions, F features, D = P·F entries. For exchangeable positions, the positions of an example
are independent and have the same covariance (F, F).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from npeff.errors import NpeffError
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import CovarianceKind, Moments
from npeff.input_fisher.seeded import SeededNumbers

_SINGULAR = 1e-6
"""A pivot of the Cholesky factor of correlations below this number is rounding."""


class InputCovarianceError(NpeffError, ValueError):
    """A covariance of the inputs that cannot be used. The message contains the fix."""


class _Root(Protocol):
    """A matrix A with A Aᵀ = Σ."""

    def times(self, values_BPF: Tensor) -> Tensor:
        """Return A v."""

    def transposed_times(self, values_BPF: Tensor) -> Tensor:
        """Return Aᵀ v."""

    def conditional_times(self, values_BPF: Tensor) -> Tensor:
        """Return, for each position, Var(x_p | all other positions) v_p."""


@dataclass(frozen=True)
class InputNoise:
    """Noise N(0, spread·Σ) of the inputs of an example.

    Args:
        mean_PF: Mean of the inputs; (1, F) for exchangeable positions.
        factors: What `factor_covariance` returns.
        spread: Factor of the covariance.
        seed: Seed of the draws.
    """

    mean_PF: Tensor
    factors: Mapping[str, Tensor]
    spread: float
    seed: int = 0

    _root: _Root = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_root", _root_of(self.factors))

    def draw(self, inputs: FlatInputs, examples: Sequence[int], draw: int | Sequence[int]) -> Tensor:
        """Return one draw (B, P, F) for each example, zero at unused positions.

        The draw of an example depends only on the seed, the number of the example and the number of the draw.

        Args:
            inputs: The inputs of the examples.
            examples: The numbers of the examples in the data set.
            draw: The number of the draw, or one for each example.
        """
        draws = [draw] * len(examples) if isinstance(draw, int) else draw
        shape = inputs.values_BPF.shape
        normal_BPF = np.zeros(shape)
        used_BP, numbers = inputs.used_BP.cpu().numpy(), SeededNumbers(self.seed, "noise")
        for row, (example, number) in enumerate(zip(examples, draws, strict=True)):
            generator = numbers.at(example, number)
            if inputs.exchangeable:
                normal_BPF[row, used_BP[row]] = generator.standard_normal((int(used_BP[row].sum()), shape[2]))
            else:
                generator.standard_normal(out=normal_BPF[row])
        drawn_BPF = torch.from_numpy(normal_BPF).to(self.mean_PF)
        noise_BPF: Tensor = self.spread**0.5 * self._root.times(drawn_BPF) * inputs.used_BP[..., None]
        return noise_BPF.to(inputs.values_BPF.device, inputs.values_BPF.dtype)

    def times(self, gradients_BPF: Tensor, used_BP: Tensor) -> Tensor:
        """Return spread·Σ g of gradients (B, P, F), with Σ restricted to the used positions, float64."""
        used_BP1 = used_BP[..., None]
        values_BPF = self._root.transposed_times(gradients_BPF.to(self.mean_PF) * used_BP1)
        moved_BPF: Tensor = self.spread * self._root.times(values_BPF) * used_BP1
        return moved_BPF

    def conditional_times(self, gradients_BPF: Tensor, used_BP: Tensor) -> Tensor:
        """Return spread·Var(x_p | all other positions) g_p of every used position p, float64."""
        used_BP1 = used_BP[..., None]
        values_BPF = self._root.conditional_times(gradients_BPF.to(self.mean_PF) * used_BP1)
        return self.spread * values_BPF * used_BP1


def independent(noise: InputNoise) -> InputNoise:
    """Return noise with the same mean, variances, spread and seed, and without covariances."""
    factors = {name: factor.square().sum(1) for name, factor in noise.factors.items()}
    if "deviations" in factors:
        return noise
    if "joint" in factors:
        variances_PF = factors["joint"].view_as(noise.mean_PF)
    else:
        variances_PF = factors["positions"][:, None] * factors["features"]
    return replace(noise, factors={"deviations": variances_PF.sqrt()})


def factor_covariance(moments: Moments, kind: CovarianceKind, ridge: float) -> dict[str, Tensor]:
    """Return a factor of the covariance of the inputs: Cholesky factors, or standard deviations.

    Args:
        moments: Moments that were computed for the same kind.
        kind: The kind of covariance. ``kronecker`` is Σ = A ⊗ B / tr, with the second moments A of the positions and B
            of the features; it has the trace of the full covariance, and is exact if the covariance is a Kronecker
            product.
        ridge: Fraction of each variance that is added to it, for every Cholesky factor. The result does not depend on
            the units of the inputs.

    Returns:
        ``full``: joint (D, D). ``kronecker``: positions (P, P) and features (F, F). ``diagonal``: deviations (P, F).
        ``isotropic``: deviations (1, 1). The rows of constant inputs are zero.

    Raises:
        InputCovarianceError: There are fewer than two samples, all inputs are constant, or the covariance is not
            positive definite.
    """
    if moments.n < 2:
        raise InputCovarianceError(
            f"the covariance of the inputs needs at least 2 samples, not {moments.n}: fit more examples, or set "
            "inputs.scope: all"
        )
    products = {name: values / (moments.n - 1) for name, values in moments.products.items()}
    trace = float(products["squares"].sum() if "squares" in products else next(iter(products.values())).trace())
    if not trace > 0:
        raise InputCovarianceError("all inputs of the fitted examples are constant: their covariance is zero")
    match kind:
        case "full":
            return {"joint": _cholesky(products["joint"], ridge)}
        case "kronecker":
            positions_PP, features_FF = products["positions"], products["features"]
            return {"positions": _cholesky(positions_PP, ridge), "features": _cholesky(features_FF / trace, ridge)}
        case "diagonal":
            return {"deviations": ((1 + ridge) * products["squares"]).sqrt()}
        case "isotropic":
            return {"deviations": products["squares"].mean().sqrt().view(1, 1)}


def _cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of a covariance with a ridge, by way of the correlations."""
    deviations = covariance.diagonal().sqrt()
    inverse = torch.where(deviations > 0, 1 / deviations, 0.0)
    correlations = inverse[:, None] * covariance * inverse
    correlations.diagonal().fill_(1 + ridge)  # and those of constant inputs, which the deviations take out again
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(correlations)
    if int(failed) or float(factor.diagonal().min()) < _SINGULAR:  # a singular matrix may pass by rounding
        raise InputCovarianceError(
            f"the covariance of the inputs is singular with inputs.ridge: {ridge:g}: raise inputs.ridge, such as 1e-4"
        )
    return deviations[:, None] * factor


def _precision(factor: Tensor) -> Tensor:
    """Return the inverse of the covariance of a factor: the identity for constant inputs."""
    constant = (factor.diagonal() == 0).to(factor)
    return torch.cholesky_inverse(factor + constant.diag())


def _root_of(factors: Mapping[str, Tensor]) -> _Root:
    if "joint" in factors:
        return _Joint(factors["joint"])
    if "features" in factors:
        return _Separate(factors["positions"], factors["features"])
    return _Elementwise(factors["deviations"])


@dataclass(frozen=True)
class _Joint:
    """The Cholesky factor (D, D) of the covariance of all entries of an example, or of one position."""

    factor: Tensor

    def times(self, values_BPF: Tensor) -> Tensor:
        return self._rows(values_BPF, self.factor.T)

    def transposed_times(self, values_BPF: Tensor) -> Tensor:
        return self._rows(values_BPF, self.factor)

    def conditional_times(self, values_BPF: Tensor) -> Tensor:
        n_features = values_BPF.shape[2]
        if self._of_one_position(values_BPF):
            return self.times(self.transposed_times(values_BPF))  # positions are independent
        n_positions = values_BPF.shape[1]
        inverse = _precision(self.factor).view(n_positions, n_features, n_positions, n_features)
        blocks_PFF = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        solved_PFB: Tensor = torch.linalg.solve(blocks_PFF, values_BPF.permute(1, 2, 0))
        varying_PF = (self.factor.diagonal() > 0).view(n_positions, n_features)
        return solved_PFB.permute(2, 0, 1) * varying_PF

    def _rows(self, values_BPF: Tensor, matrix: Tensor) -> Tensor:
        if self._of_one_position(values_BPF):
            return values_BPF @ matrix
        return (values_BPF.flatten(1) @ matrix).view(values_BPF.shape)

    def _of_one_position(self, values_BPF: Tensor) -> bool:
        return len(self.factor) == values_BPF.shape[2]


@dataclass(frozen=True)
class _Separate:
    """Cholesky factors of the covariances of the positions (P, P) and of the features (F, F)."""

    positions: Tensor
    features: Tensor

    def times(self, values_BPF: Tensor) -> Tensor:
        return self.positions @ values_BPF @ self.features.T

    def transposed_times(self, values_BPF: Tensor) -> Tensor:
        return self.positions.T @ values_BPF @ self.features

    def conditional_times(self, values_BPF: Tensor) -> Tensor:
        precisions_P: Tensor = _precision(self.positions).diagonal()
        varying_P = self.positions.diagonal() > 0
        return values_BPF @ self.features @ self.features.T * (varying_P / precisions_P)[:, None]


@dataclass(frozen=True)
class _Elementwise:
    """Standard deviations of the entries, of a shape that broadcasts to (P, F)."""

    deviations: Tensor

    def times(self, values_BPF: Tensor) -> Tensor:
        return values_BPF * self.deviations

    transposed_times = times

    def conditional_times(self, values_BPF: Tensor) -> Tensor:
        return values_BPF * self.deviations.square()
