"""Results of repair.py on judged examples, with bootstrap intervals over the examples.

Legend: n judged examples of a seed, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DRAWS = 10_000
_AT_ONCE = 1000
QUANTITIES = ("mended", "broken", "net", "kl")


@dataclass(frozen=True)
class Outcome:
    """What a method does to the judged examples of one seed."""

    wrong_n: NDArray[np.bool_]
    """Wrong before."""
    right_after_n: NDArray[np.bool_]
    kl_n: NDArray[np.float64]

    def net(self) -> float:
        """Return the change of the accuracy."""
        return float(self.right_after_n.mean() - (~self.wrong_n).mean())

    def terms(self) -> NDArray[np.float64]:
        """Return, for each example (n, 6): mended, broken, KL where right before, wrong before, right before, 1."""
        wrong_n, after_n = self.wrong_n, self.right_after_n
        kl_n = np.where(wrong_n, 0.0, self.kl_n)
        columns = (wrong_n & after_n, ~wrong_n & ~after_n, kl_n, wrong_n, ~wrong_n, np.ones(len(wrong_n)))
        return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def text(self, factor: float = 100.0, digits: int = 1, *, sign: bool = False) -> str:
        form = f"{'+' if sign else ''}.{digits}f"
        value, low, high = (format(number * factor, form) for number in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


def estimates(outcomes: dict[str, Sequence[Outcome]]) -> dict[str, dict[str, Estimate]]:
    """Return the quantities of each method, over all seeds, and the differences of `net` from the first method.

    The examples are resampled within each seed. All methods of a draw have the same examples.

    Args:
        outcomes: For each method, one outcome per seed.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    first = next(iter(outcomes))
    for seed in range(len(outcomes[first])):
        terms = {name: each[seed].terms() for name, each in outcomes.items()}
        drawn = _resampled(seed, terms)
        sums = {name: sums[name] + drawn[name] if sums else drawn[name] for name in drawn}
    quantities = {name: _quantities(each) for name, each in sums.items()}
    reference = quantities[first]["net"]
    return {
        name: {key: _estimate(values) for key, values in each.items()}
        | {"net - reference": _estimate(each["net"] - reference)}
        for name, each in quantities.items()
    }


def _resampled(seed: int, terms: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return the sums of the terms (1 + R, 6). The first row is that of the examples themselves."""
    generator, n = np.random.default_rng([seed, 1]), len(next(iter(terms.values())))
    rows = {name: [each.sum(0, keepdims=True)] for name, each in terms.items()}
    for _ in range(_DRAWS // _AT_ONCE):
        counts_Rn = generator.multinomial(n, np.full(n, 1 / n), size=_AT_ONCE).astype(np.float64)
        for name, each in terms.items():
            rows[name].append(counts_Rn @ each)
    return {name: np.concatenate(each) for name, each in rows.items()}


def _quantities(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    mended, broken, kl, wrong, right, n = sums.T
    values = (mended / wrong, broken / right, (mended - broken) / n, kl / right)
    return dict(zip(QUANTITIES, values, strict=True))


def _estimate(values: NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))
