"""The table `joint_ablation`: the effect of a component after subsets of the other components are removed.

Legend: L other components, K lifted components, B directions in memory, D sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from npeff.directions import displacement, gram, inner_product, zero_directions
from npeff.gradients import ParameterLayout
from npeff.stages.verify.examples import Groups, distinct
from npeff.stages.verify.steps import Direction, Probe, Steps, Tested
from npeff.stages.verify.stored_sketches import StoredSketches
from npeff.statistics.joint_ablation import still_there
from npeff.verification.joint_ablation import PredictedRemovals, Span, adversarial_subset, random_subsets

_BLOCK_BYTES = 2**28
"""Size in bytes of the directions, or of the removed parts of the parameters, that are in memory at once."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Removal:
    """A subset of the other components, and the coefficients with which its directions are removed."""

    draw: int | None
    """Number of the random draw; None for the adversarial subset."""
    removed_L: NDArray[np.bool_]
    coefficients_L: NDArray[np.float64]


class JointRemovals:
    """Removes subsets of the lifted components, and measures the effect of another component before and after.

    Args:
        module: The model. It must not be moved when a method is called.
        steps: The steps of the verification.
        sketches: The stored Fishers, which predict the effects of removals.
        layout: The parameters of the directions.
        lifted: The lifted components.
        direction: Function that reads the direction of a component.
        origin: The parameters θ₀ that displacements are measured from; zero if None.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: Steps,
        sketches: StoredSketches,
        layout: ParameterLayout,
        lifted: Sequence[int],
        direction: Callable[[int], Direction],
        origin: Direction | None,
    ) -> None:
        self._module, self._steps, self._sketches, self._layout = module, steps, sketches, layout
        self._lifted, self._direction, self._origin = list(lifted), direction, origin

    def rows(
        self,
        component: int,
        own: Probe,
        step: float,
        tested: Tested,
        groups: Mapping[str, Groups],
        split: str,
        n_draws: int,
        seed: int,
    ) -> list[Row]:
        """Return the rows of a component; no rows if there are no other components.

        Args:
            component: The component.
            own: Its direction.
            step: The step of the verification for the informative sign, with the sign.
            tested: The result of this step.
            groups: The examples of the component by split.
            split: The split on which effects are measured.
            n_draws: Number of random subsets.
            seed: Seed of the draws.
        """
        others = [place for place, other in enumerate(self._lifted) if other != component]
        if not others:
            return []
        span = Span(self._gram_KK[np.ix_(others, others)], self._displacements_K[others])
        draws = random_subsets(len(others), n_draws, seed)
        removals = [Removal(draw, drawn_L, span.coefficients(drawn_L)) for draw, drawn_L in enumerate(draws)]
        predicted = self._predicted(own, step, groups["fit"], others, span)
        if predicted is not None:
            starts = [np.zeros(len(others), bool), *draws]
            worst_L = adversarial_subset(predicted.kl_ratio, starts, seed)
            removals.append(Removal(None, worst_L, span.coefficients(worst_L)))
        products_L = np.array([inner_product(self._direction(self._lifted[place]), own.direction) for place in others])
        rows = []
        for removal, removed in self._removed_parts(removals, others):
            rows.append(
                {
                    "component": component,
                    "examples": split,
                    "draw": removal.draw,
                    "adversarial": removal.draw is None,
                    "n_removed": int(removal.removed_L.sum()),
                    "removed": [self._lifted[others[place]] for place in np.flatnonzero(removal.removed_L)],
                    "displacement": span.length(removal.coefficients_L),
                    "overlap": span.overlap(removal.removed_L, products_L),
                    "kl_ratio_predicted": None if predicted is None else _known(predicted.kl_ratio(removal.removed_L)),
                    **self._measured(removed, own, step, tested, groups[split]),
                }
            )
        return rows

    def _measured(self, removed: Direction, own: Probe, step: float, tested: Tested, groups: Groups) -> Row:
        """Measure the KL divergences of a removal, and those of the step after it."""
        reached = tested.step.reached_target
        removal, after = self._steps.after_removal(removed, own, step if reached else None, groups, tested.before)
        of_removal = removal.compared(groups.top, groups.matched)
        kl_top = kl_matched = ratio = None
        # without finite logits after the removal, there is no effect of a step to speak of
        if after is not None and not np.isinf(removal.values_u).any():
            found = after.compared(groups.top, groups.matched)
            kl_top, kl_matched, ratio = (_known(each) for each in (found.top_mean, found.baseline_mean, found.ratio))
        unablated = _known(tested.kl.compared(groups.top, groups.matched).ratio) if reached else None
        return {
            "kl_removed_top": _known(of_removal.top_mean),
            "kl_removed_matched": _known(of_removal.baseline_mean),
            "kl_top": kl_top,
            "kl_matched": kl_matched,
            "kl_ratio_matched": ratio,
            "kl_ratio_unablated": unablated,
            "still_there": still_there(kl_top, ratio, unablated),
            "examples_passed": len(groups.compared) * (2 if reached else 1),
        }

    def _predicted(
        self, own: Probe, step: float, fitted: Groups, others: Sequence[int], span: Span
    ) -> PredictedRemovals | None:
        """Return the predicted effects on the fitted examples; None if the sketches do not predict logits."""
        if own.predicted is None or not len(fitted.top) or not len(fitted.matched.examples_m):
            return None
        examples = np.concatenate([fitted.top, fitted.matched.examples_m])
        of_own = own.predicted.of(examples)
        if of_own.changes_nC is None:
            return None
        sorted_u = distinct(examples)
        effects = self._sketches.effects(sorted_u, [self._sketches_KD[place] for place in others])
        places = np.searchsorted(sorted_u, examples)
        changes_LnC = np.stack([effect.changes_nC[places] for effect in effects if effect.changes_nC is not None])
        return PredictedRemovals(span, changes_LnC, of_own, step, len(fitted.top), fitted.matched.counts_m)

    def _removed_parts(self, removals: Sequence[Removal], others: Sequence[int]) -> Iterator[tuple[Removal, Direction]]:
        """Yield the removed part of the parameters of each removal. Several are computed in one pass over the
        directions."""
        n_at_once = max(1, _BLOCK_BYTES // (8 * self._layout.size))
        for start in range(0, len(removals), n_at_once):
            block = removals[start : start + n_at_once]
            sums = zero_directions(self._layout, len(block), dtype=torch.float64)
            for number, place in enumerate(others):
                coefficients_k = torch.tensor([removal.coefficients_L[number] for removal in block])
                if coefficients_k.any():
                    for name, tensor in self._direction(self._lifted[place]).items():
                        sums[name] += coefficients_k.view(-1, *[1] * tensor.dim()) * tensor.double()
            for place, removal in enumerate(block):
                yield removal, {name: tensor[place] for name, tensor in sums.items()}

    @cached_property
    def _gram_KK(self) -> NDArray[np.float64]:
        """The inner products of the lifted directions, read in blocks that fit into memory."""
        size = max(1, _BLOCK_BYTES // (4 * self._layout.size))
        blocks = [range(start, min(start + size, len(self._lifted))) for start in range(0, len(self._lifted), size)]
        gram_KK = np.zeros((len(self._lifted), len(self._lifted)))
        for number, rows in enumerate(blocks):
            first = [self._direction(self._lifted[place]) for place in rows]
            for columns in blocks[number:]:
                second = first if columns == rows else [self._direction(self._lifted[place]) for place in columns]
                found = gram(first, second)
                gram_KK[rows.start : rows.stop, columns.start : columns.stop] = found
                gram_KK[columns.start : columns.stop, rows.start : rows.stop] = found.T
        return gram_KK

    @cached_property
    def _displacements_K(self) -> NDArray[np.float64]:
        directions = (self._direction(component) for component in self._lifted)
        return np.array([displacement(self._module, each, self._origin) for each in directions])

    @cached_property
    def _sketches_KD(self) -> NDArray[np.float64]:
        return np.stack([self._sketches.sketch(self._direction(component)) for component in self._lifted])


def _known(value: float) -> float | None:
    """Return None for a value that does not exist or is not finite."""
    return value if math.isfinite(value) else None
