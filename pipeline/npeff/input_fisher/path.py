"""Length of a path of inputs in the Fisher metric: how far apart the inputs on it are for the model.

On a curve s ↦ x(s), 0 ≤ s ≤ 1, the information about s is I(s) = ẋᵀ J_xᵀ S J_x ẋ = Var_p(ż), with ż = J_x ẋ. Only ż is
needed, which is one forward-mode derivative. The length ℓ = ∫ √I ds does not depend on the parametrization, and the
scale ψ(s), the length up to s divided by ℓ, has equally distinguishable steps.

The length has a bracket without derivatives. In the Fisher metric, the categorical distributions are a sphere of radius
2, so that the shortest path between p and q has the length 2 arccos Σ_y √(p_y q_y). Chords between the points of a
subdivision therefore add up to less than ℓ, and to more if the subdivision is refined. The chord of the ends is the
distance d ≤ π. With T predictions per example, p is a point of a product of T spheres: I is the sum over the
predictions, and a chord is the square root of the sum of the squares.

The quadrature is Simpson's rule on panels of two steps. Panels in which it differs most from the chords are halved
until the sums agree. In a panel where it is below the chords, the chords are used, because they are a lower bound.

Legend: n points, T predictions of an example, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.input_fisher.velocity import Derivative

LARGEST = 4096
"""Largest number of points on a path."""
_AT_ONCE = 64
"""Points per forward pass."""

Points = Callable[[NDArray[np.float64]], tuple[Tensor, Tensor]]
"""Function of positions (n,) that returns the inputs (n, ...) there and their derivatives (n, ...)."""
Logits = Callable[[Tensor], Tensor]
"""Function of inputs (n, ...) that returns logits (n, C), or (n, T, C) for examples with T predictions."""
Change = Callable[[Tensor], Tensor]
"""Function of inputs (n, ...) that returns the derivative of the logits in a direction of the parameters, of the shape
of the logits."""


@dataclass(frozen=True)
class Curve:
    """A curve of inputs, and the model as a function of inputs."""

    points: Points
    logits: Logits
    made_T: Tensor | None = None
    """Bool: which of the T predictions of an example count. None: all."""
    change: Change | None = None
    """A direction of the parameters whose share of the path is computed."""


@dataclass(frozen=True)
class FisherPath:
    """The length and the scale of a path. The values are NaN if the information is not finite somewhere."""

    s_n: NDArray[np.float64]
    """Positions from 0 to 1, denser where the predictions change faster."""
    fisher_n: NDArray[np.float64]
    """The information I at the positions."""
    psi_n: NDArray[np.float64]
    """The scale at the positions, from 0 to 1; NaN for a path of length 0."""
    length: float
    """ℓ. It is at least `chord_sum`."""
    chord_sum: float
    """Sum of the distances between adjacent positions, a lower bound of the length."""
    distance: float
    """Distance d of the ends: the length of the shortest path between their predictions."""
    tolerance_met: bool
    """Whether the length is at most `chord_sum` times 1 + tolerance."""
    changed_length: float | None = None
    """With `Curve.change`: ∫ |⟨v, u⟩| / ‖u‖ ds ≤ ℓ, for the velocity v of the predictions and their change u."""

    @property
    def efficiency(self) -> float | None:
        """d / ℓ, which is 1 for a shortest path; None for a path of length 0."""
        return min(self.distance / self.length, 1.0) if self.length > 0 else None

    @property
    def half_at(self) -> float | None:
        """The position where ψ = ½; None for a path of length 0."""
        return float(self.position_of(0.5)) if self.length > 0 else None

    def position_of(self, psi: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the positions s where the scale has the values ``psi``."""
        return np.asarray(np.interp(psi, self.psi_n, self.s_n))


def straight(start: Tensor, end: Tensor) -> Points:
    """Return the straight line between two inputs (...), with constant derivative.

    Args:
        start: The input at s = 0.
        end: The input at s = 1, of the same shape.
    """

    def points(s_n: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(s_n, dtype=start.dtype, device=start.device).view(-1, *[1] * start.dim())
        return (1 - at) * start + at * end, (end - start).expand(len(s_n), *start.shape)

    return points


def fisher_path(
    curve: Curve, *, points: int = 32, tolerance: float = 0.01, largest: int = LARGEST, at_once: int = _AT_ONCE
) -> FisherPath:
    """Compute the length and the scale of a path.

    Args:
        curve: The curve and the model.
        points: Number of equal steps at the start. An odd number is increased by 1.
        tolerance: Steps are halved until the quadrature and the chord sum differ by at most this fraction.
        largest: Largest number of points.
        at_once: Largest number of points of a forward pass.

    Returns:
        The path. `tolerance_met` is false if the largest number of points, or the precision of the logits, did not
        suffice.
    """
    found = _Points(curve, at_once)
    ends = np.linspace(0.0, 1.0, math.ceil(points / 2) + 1)
    panels = _panels(found, list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)))
    while found.finite:
        chord_sum = math.fsum(panel.chord for panel in panels)
        if math.fsum(panel.error for panel in panels) <= tolerance * chord_sum:
            break
        least = tolerance * chord_sum / (2 * len(panels))
        coarse = {panel.start: panel for panel in panels if panel.error > max(least, panel.rounding)}
        if not coarse or len(found) + 2 * len(coarse) > largest:
            break
        halves = [half for each in coarse.values() for half in ((each.start, each.middle), (each.middle, each.end))]
        kept = [panel for panel in panels if panel.start not in coarse]
        panels = sorted([*kept, *_panels(found, halves)], key=lambda panel: panel.start)
    return _path(found, panels, tolerance)


def chord(first: Tensor, second: Tensor) -> Tensor:
    """Compute the distance 2 arccos Σ_y √(p_y q_y) of the predictions of logits (..., T, C), accurately near 0.

    Returns:
        The distances (...), float64: of T predictions, the square root of the sum of the squares.
    """
    log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    larger = torch.maximum(log_p, log_q)
    gap = torch.where(larger > -math.inf, (log_p - log_q).abs(), 0.0)
    difference = (larger / 2).exp() * -torch.expm1(-gap / 2)  # |√p − √q|, whose norm is 2 sin(angle / 2)
    half = torch.linalg.vector_norm(difference, dim=-1) / 2
    distance: Tensor = torch.linalg.vector_norm(4 * torch.asin(half.clamp(max=1.0)), dim=-1)
    return distance


class _Points:
    """The points of a path at which the model was evaluated."""

    def __init__(self, curve: Curve, at_once: int) -> None:
        self._curve, self._at_once, self._derivative = curve, at_once, Derivative(curve.logits)
        self.logits: dict[float, Tensor] = {}
        self.fisher: dict[float, float] = {}
        self.changed: dict[float, float] = {}
        self.precision = 0.0
        self.finite = True

    def __len__(self) -> int:
        return len(self.logits)

    def evaluate(self, positions: Sequence[float]) -> None:
        """Evaluate the model at new positions."""
        for start in range(0, len(positions), self._at_once):
            chosen = list(positions[start : start + self._at_once])
            values, derivatives = self._curve.points(np.array(chosen))
            logits, velocity = (self._flat(each) for each in self._derivative([values], [derivatives]))
            change = None if self._curve.change is None else self._flat(self._curve.change(values))
            self.precision = torch.finfo(logits.dtype).eps
            fisher_n, changed_n = _information(logits.double(), velocity.double(), change)
            self.finite &= bool(torch.isfinite(fisher_n).all())
            self.logits |= zip(chosen, logits, strict=True)
            self.fisher |= zip(chosen, fisher_n.tolist(), strict=True)
            if changed_n is not None:
                self.changed |= zip(chosen, changed_n.tolist(), strict=True)

    def _flat(self, values: Tensor) -> Tensor:
        """Logits of the predictions that count, (n, T, C)."""
        values_nTC = values.detach()
        values_nTC = values_nTC[:, None] if values.dim() == 2 else values_nTC
        return values_nTC if self._curve.made_T is None else values_nTC[:, self._curve.made_T]


def _information(logits_nTC: Tensor, velocity_nTC: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return I = Var_p(ż), and |⟨v, u⟩|/‖u‖ = |Cov_p(ż, w)|/√Var_p(w) for a change w of the logits, both (n,)."""
    p_nTC = logits_nTC.softmax(-1)

    def centred(values_nTC: Tensor) -> Tensor:
        values_nTC = torch.where(p_nTC > 0, values_nTC, 0.0)
        return values_nTC - (p_nTC * values_nTC).sum(-1, keepdim=True)

    v_nTC = centred(velocity_nTC)
    fisher_n = (p_nTC * v_nTC.square()).sum((-1, -2))
    if change is None:
        return fisher_n, None
    u_nTC = centred(change.double())
    norm_n = (p_nTC * u_nTC.square()).sum((-1, -2)).sqrt()
    along_n = (p_nTC * v_nTC * u_nTC).sum((-1, -2)).abs()
    return fisher_n, torch.where(norm_n > 0, along_n / norm_n, 0.0)


@dataclass(frozen=True)
class _Panel:
    """Two adjacent steps of equal size."""

    start: float
    middle: float
    end: float
    chords: tuple[float, float]
    simpson: float
    """Simpson's rule for the length."""
    first: float
    """The part of `simpson` that belongs to the first step."""
    rounding: float
    """Error of the chords from the precision of the logits."""

    @property
    def chord(self) -> float:
        return self.chords[0] + self.chords[1]

    @property
    def error(self) -> float:
        return abs(self.simpson - self.chord)

    @property
    def lengths(self) -> tuple[float, float]:
        """The lengths of both steps, each at least its chord."""
        total = max(self.simpson, self.chord)
        first = min(max(self.first, self.chords[0]), total - self.chords[1])
        return first, total - first


def _panels(found: _Points, ends: Sequence[tuple[float, float]]) -> list[_Panel]:
    """Return panels with these ends. Points that are missing are evaluated."""
    triples = [(start, (start + end) / 2, end) for start, end in ends]
    found.evaluate(sorted({s for triple in triples for s in triple} - found.logits.keys()))
    if not found.finite:
        return []
    panels = []
    for triple in triples:
        logits_3TC = torch.stack([found.logits[s] for s in triple])
        left, right = chord(logits_3TC[:-1], logits_3TC[1:]).tolist()
        largest = float(torch.where(logits_3TC.isfinite(), logits_3TC, 0.0).abs().max())
        length, first = _simpson([math.sqrt(found.fisher[s]) for s in triple], triple[2] - triple[0])
        panels.append(_Panel(*triple, (left, right), length, first, 4 * found.precision * largest))
    return panels


def _simpson(values: Sequence[float], width: float) -> tuple[float, float]:
    """Return the integral of the parabola through three equidistant values, and its part in the first half."""
    first, middle, last = values
    return width * (first + 4 * middle + last) / 6, width * (5 * first + 8 * middle - last) / 24


def _path(found: _Points, panels: Sequence[_Panel], tolerance: float) -> FisherPath:
    s_n = np.array(sorted(found.logits))
    fisher_n = np.array([found.fisher[s] for s in s_n.tolist()])
    first, last = (found.logits[s] for s in (0.0, 1.0))
    distance = float(chord(first, last))
    if not found.finite:
        return FisherPath(s_n, fisher_n, np.full(len(s_n), math.nan), math.nan, math.nan, distance, False)
    chord_sum = math.fsum(panel.chord for panel in panels)
    sums_n = np.concatenate([[0.0], np.cumsum([each for panel in panels for each in panel.lengths])])
    length = max(float(sums_n[-1]), chord_sum)
    psi_n = sums_n / sums_n[-1] if length > 0 else np.full(len(s_n), math.nan)
    met = math.fsum(panel.error for panel in panels) <= tolerance * chord_sum
    changed = None
    if found.changed:
        parts = [_simpson([found.changed[s] for s in (p.start, p.middle, p.end)], p.end - p.start) for p in panels]
        changed = min(math.fsum(part for part, _ in parts), length)
    return FisherPath(s_n, fisher_n, psi_n, length, chord_sum, distance, met, changed)
