"""Low-rank mean Fishers of a penalty: F̄ = AᵀA, whose quadratic form is ‖A Δ‖² for a change Δ of the parameters.

A has few rows. It is given by tensors of all parameters, or by its rows in the coordinates of a linear map Q (a
*sketch*), A Qᵀ. In the second form, A Qᵀ Q Δ takes the place of A Δ. Both are equal for the identity, and on average
over the seeds of other sketches. The square has the mean ‖A Δ‖² + c ‖Δ‖² with c of about tr(F̄) / D for D coordinates:
the sketch adds an L2 penalty.

Legend: n rows, D coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from npeff.training.errors import TrainingError


class LinearMap(Protocol):
    """A linear map Q from the parameters to D coordinates, such as a sketch of `npeff.sketches`."""

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Map m vectors, (m, *shape) for each parameter: (m, D)."""
        ...


@dataclass
class LowRankFisher:
    """The mean Fisher of a data set in the coordinates of a linear map.

    Args:
        shapes: The shape of each parameter.
        linear_map: The map Q.
        rows_nD: The rows A Qᵀ (n, D) with F̄ = AᵀA; None if `moments_DD` is given.
        moments_DD: Q F̄ Qᵀ (D, D), which is smaller if there are more than D rows.
        labels: Kind of the labels of the Fisher; None if it is not known.
        fingerprint: Fingerprint of the model; None if it is not known.
    """

    shapes: Mapping[str, tuple[int, ...]]
    linear_map: LinearMap
    rows_nD: Tensor | None = None
    moments_DD: Tensor | None = None
    labels: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if (self.rows_nD is None) == (self.moments_DD is None):
            raise TrainingError("a low-rank Fisher needs either its rows or their moments")

    def leading(self, count: int) -> LowRankFisher:
        """Return the part of the Fisher in its leading eigenvectors, in the coordinates of the map.

        Args:
            count: Number k of eigenvectors; fewer if the Fisher has fewer.

        Returns:
            A Fisher with k rows, √λ vᵀ for each eigenvalue λ and eigenvector v.
        """
        if self.rows_nD is not None:
            _, vectors_nn = torch.linalg.eigh((self.rows_nD @ self.rows_nD.T).double())
            rows_kD = vectors_nn[:, -count:].T.to(self.rows_nD) @ self.rows_nD
        else:
            assert self.moments_DD is not None
            values_D, vectors_DD = torch.linalg.eigh(self.moments_DD.double())
            roots_k = values_D[-count:].clamp_min(0).sqrt()
            rows_kD = (vectors_DD[:, -count:] * roots_k).T.to(self.moments_DD).contiguous()
        return replace(self, rows_nD=rows_kD, moments_DD=None)

    def quadratic(self, change: Mapping[str, Tensor]) -> Tensor:
        """Return Δᵀ F̄ Δ for a change Δ of the parameters, a scalar with a gradient."""
        # the map adds parameters up, which must be on one device for this
        device = next(iter(change.values())).device
        sketch_D = self.linear_map.apply_dense({name: value[None].to(device) for name, value in change.items()})[0]
        if self.rows_nD is not None:
            self.rows_nD = self.rows_nD.to(sketch_D)  # moved once, not in every step
            return (self.rows_nD @ sketch_D).square().sum()
        assert self.moments_DD is not None
        self.moments_DD = self.moments_DD.to(sketch_D)
        return (sketch_D @ (self.moments_DD @ sketch_D)).clamp_min(0)


@dataclass
class RowsOfParameters:
    """The mean Fisher of a data set by its rows in all parameters: (n, *shape) for each."""

    rows: dict[str, Tensor]
    labels: str | None = None
    fingerprint: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape[1:]) for name, value in self.rows.items()}

    def quadratic(self, change: Mapping[str, Tensor]) -> Tensor:
        """Return Δᵀ F̄ Δ for a change Δ of the parameters, a scalar with a gradient."""
        total: Tensor | None = None
        for name, value in change.items():
            self.rows[name] = self.rows[name].to(value)
            product_n = self.rows[name].flatten(1) @ value.flatten()
            total = product_n if total is None else total + product_n.to(total.device)
        assert total is not None, "a Fisher has at least one parameter"
        return total.square().sum()


def rows_of_parameters(values: Mapping[str, Tensor], metadata: Mapping[str, str], what: str) -> RowsOfParameters:
    """Return the Fisher with these rows.

    Raises:
        TrainingError: There is no tensor, the numbers of rows differ, or an entry is not finite.
    """
    if not values:
        raise TrainingError(f"{what} is empty: give the rows (n, *shape) of each parameter")
    counts = {len(value) if value.dim() else 0 for value in values.values()}
    if len(counts) > 1 or 0 in counts:
        raise TrainingError(
            f"{what}: with low_rank=True, every parameter needs the same number of rows (n, *shape)",
            "give the rows of the factor, or remove low_rank=True for a diagonal",
        )
    for name, value in values.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise TrainingError(f"{what}: {name!r} must have finite floating-point entries")
    own = {name: value.detach().clone() for name, value in values.items()}
    return RowsOfParameters(own, metadata.get("labels"), metadata.get("model_fingerprint"))
