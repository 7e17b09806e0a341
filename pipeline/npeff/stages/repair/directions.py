"""The directions that a repair moves the model along: the stored ones, or the components' own directions.

The own directions span the same space as the whitened directions that a run stores. A repair therefore computes them
without a lift: ĝ_j = Σ_l A_jl d_l, where A_j are the coefficients with which the sketches of the stored directions d_l
come nearest to the component h_j. Steps along own directions are steps of other lengths along the stored directions, so
that joint steps read each stored direction once.

Shapes: K components, D sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.options.kinds import is_diagonal
from npeff.runs.definition import finished
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.earlier_results import lifted_components
from npeff.storage.checksums import read_json
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.verification import Edit

_LEAST_SINGULAR_VALUE = 1e-3
"""Singular value of the sketches of the stored directions, relative to the largest, below which a part of their span
cannot be distinguished from rounding."""

_LEAST_COSINE = 0.8
"""Least cosine of a component and its own direction in the sketch. Components that the directions do not contain, such
as those of the kind ``random``, have smaller ones."""

_KEPT_BYTES = 512 * 2**20
"""Memory limit in bytes for directions that a worker keeps between calls."""

Direction = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OwnDirections:
    """Own directions as combinations of the stored directions."""

    coefficients_KK: NDArray[np.float64]
    """A, for stored directions of unit length. The rows of unused components are zero."""
    cosines_K: NDArray[np.float64]
    """Cosines with the components in the sketch. 1 for unused components."""


def own_directions(run: RunDirectory, say: Callable[[str], None] = lambda line: None) -> OwnDirections | None:
    """Return the own directions of a run; None if a repair takes the directions as they are stored.

    Args:
        run: The run.
        say: Called with a line if `repair.direction` is `auto` and own directions cannot be computed.

    Raises:
        RunDirectoryError: `repair.direction` is `own`, and the stored directions do not determine own directions.
        StoreError: A store is missing or damaged.
    """
    store, wanted = DirectionStore.open(run.directions), run.config.repair.direction
    if wanted == "lifted" or store.attrs.get("direction", "own") == "own":
        return None
    found = _determined(run, store)
    if isinstance(found, OwnDirections):
        return found
    if wanted == "own":
        raise RunDirectoryError(
            f"{run.path} has no own directions for repair.direction: own, because {found}",
            "set repair.direction: auto, or make another factorization with lift: {direction: own}",
        )
    say(f"repair: steps along whitened directions, because {found}")
    return None


def _determined(run: RunDirectory, store: DirectionStore) -> OwnDirections | str:
    """Return the own directions, or the reason why whitened directions do not determine them."""
    if is_diagonal(run.config.factorization.kind):
        return "those of diagonals do not determine own ones"
    if n_missing := store.n_components - len(lifted_components(run)):
        return f"own directions are combinations of the directions of all components, and {n_missing} are not lifted"
    sketches_KD, components_KD = store.read_sketches(), open_factorization(run.factorization).read_components()
    assert sketches_KD is not None  # earlier versions, which did not store them, have own directions
    found = nearest_combinations(sketches_KD.astype(np.float64), components_KD.astype(np.float64))
    if (least := float(found.cosines_K.min())) < _LEAST_COSINE:
        component = int(found.cosines_K.argmin())
        return f"the directions do not contain component {component}: the cosine of the nearest one is {least:.2f}"
    return OwnDirections(found.coefficients_KK * _lengths(run), found.cosines_K)


def _lengths(run: RunDirectory) -> NDArray[np.float64]:
    """Return the lengths (K,) of the vectors in all parameters whose sketches are stored.

    The sketch of a direction is that of the sum that it was made from. This sum has unit length in the sketch, and
    therefore not quite in all parameters. The sketch of a polished direction is that of the unit direction.
    """
    facts = [read_json(path) for _, path in sorted(finished(run.partial_results("lift")).items())]
    return np.array([1.0 if each.get("polished") else each["length"] for each in facts])


def nearest_combinations(sketches_KD: NDArray[np.float64], components_KD: NDArray[np.float64]) -> OwnDirections:
    """Compute the combinations of sketches that are nearest to the components, of unit length.

    Where sketches are linearly dependent, such as those of duplicated components, the coefficients are the smallest.

    Args:
        sketches_KD: Sketches of the stored directions. The row of an unused component is zero.
        components_KD: The components. The row of an unused component is zero.
    """
    coefficients_KK = components_KD @ np.linalg.pinv(sketches_KD, rcond=_LEAST_SINGULAR_VALUE)
    lengths_K = np.linalg.norm(coefficients_KK @ sketches_KD, axis=1)
    of_components_K = np.linalg.norm(components_KD, axis=1)
    cosines_K = np.divide(lengths_K, of_components_K, out=np.ones_like(lengths_K), where=of_components_K > 0)
    inverse_K = np.divide(1.0, lengths_K, out=np.zeros_like(lengths_K), where=lengths_K > 0)
    return OwnDirections(coefficients_KK * inverse_K[:, None], cosines_K)  # the combinations are projections


class RepairDirections:
    """Directions of components, read from the store when they are needed.

    Args:
        store: The stored directions.
        coefficients_KK: Coefficients of own directions, see `OwnDirections`; None for the stored directions.
    """

    def __init__(self, store: DirectionStore, coefficients_KK: NDArray[np.float64] | None) -> None:
        self._store, self._coefficients_KK = store, coefficients_KK
        self._kept: dict[int, Direction] = {}

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters."""
        return list(self._store.arrays)

    def of(self, component: int) -> Direction:
        """Return the direction of a component."""
        return self.sum([Edit(component, 1.0)])

    def sum(self, edits: Sequence[Edit]) -> Direction:
        """Return the sum of steps along directions. It is empty without edits."""
        total: Direction = {}
        for component, step in self._stored_steps(edits).items():
            for name, tensor in self._read(component).items():
                total[name] = step * tensor if name not in total else total[name].add_(tensor, alpha=step)
        return total

    def products(self, gradients: Mapping[str, torch.Tensor], components: Sequence[int]) -> list[float]:
        """Return the inner products of a gradient and the directions of components, float64."""
        if self._coefficients_KK is None:
            return self._stored_products(gradients, components)
        stored_K = np.array(self._stored_products(gradients, range(self._store.n_components)))
        found: list[float] = (self._coefficients_KK[list(components)] @ stored_K).tolist()
        return found

    def _stored_steps(self, edits: Sequence[Edit]) -> dict[int, float]:
        """Return the steps along stored directions, by component, that have the effect of the edits together."""
        steps: dict[int, float] = {}
        for edit in edits:
            if self._coefficients_KK is None:
                steps[edit.component] = steps.get(edit.component, 0.0) + edit.step
                continue
            for component, coefficient in enumerate(self._coefficients_KK[edit.component].tolist()):
                if coefficient:
                    steps[component] = steps.get(component, 0.0) + edit.step * coefficient
        return steps

    def _stored_products(self, gradients: Mapping[str, torch.Tensor], components: Iterable[int]) -> list[float]:
        return [
            sum(float((gradients[name].double() * tensor.to(gradients[name])).sum()) for name, tensor in each.items())
            for each in map(self._read, components)
        ]

    def _read(self, component: int) -> Direction:
        if component in self._kept:
            return self._kept[component]
        direction = {name: torch.from_numpy(array) for name, array in self._store.read(component).items()}
        size = sum(tensor.nbytes for tensor in direction.values())
        if (len(self._kept) + 1) * size <= _KEPT_BYTES:
            self._kept[component] = direction
        return direction
