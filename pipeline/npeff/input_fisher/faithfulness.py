"""Whether attributions name the inputs on which a prediction depends: one test for all methods.

*Deletion* replaces the positions in the order of their attributions, the highest first. Its score is the area under the
curve of p, the probability of the explained class, against the fraction of replaced positions: low is good. *Insertion*
starts from the input with all positions replaced and restores the original values in the same order: high is good.
Both test a method on the replacement as much as on the ranking, so there are several replacements (Petsiuk et al.,
BMVC 2018; Hooker et al., NeurIPS 2019).

*Information* draws the positions with the largest |attribution| anew and keeps the others. Its score is the mutual
information, in nats, between the prediction and these positions: high is good. It is the mean over several numbers of
positions. The estimate from few draws is corrected for its bias, to first order (see `functional_entropy`).

Legend: B examples, P positions, F features, C classes, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from npeff.input_fisher.attribution import functional_entropy
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.predictions import FaithfulnessError, probabilities
from npeff.input_fisher.replacements import Curve, Replacement
from npeff.input_fisher.seeded import SeededNumbers


@dataclass(frozen=True)
class FaithfulnessTest:
    """Options of the test."""

    steps: int = 16
    """Steps of the deletion and insertion curves. An example with fewer positions has one step per position."""
    fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Fractions of the positions that are drawn anew for the information, in ascending order; at least one position."""
    draws: int = 16
    """Draws of each example for the information."""
    curve_draws: int = 4
    """Draws of each example for deletion and insertion."""
    seed: int = 0
    """Seed of the order of positions with equal attributions."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.curve_draws < 1:
            raise FaithfulnessError("faithfulness: steps and curve_draws must be at least 1")
        if self.draws < 2:
            raise FaithfulnessError(f"faithfulness: draws must be at least 2, not {self.draws}")
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise FaithfulnessError("faithfulness: fractions must be above 0 and at most 1, at least one of them")


class Score(NamedTuple):
    """What a score measures."""

    method: str
    replacement: str
    metric: Curve


@torch.no_grad()
def faithfulness(
    inputs: FlatInputs,
    examples: Sequence[int],
    classes_B: Tensor,
    attributions: Mapping[str, Tensor],
    replacements: Mapping[str, Replacement],
    test: FaithfulnessTest,
) -> dict[Score, Tensor]:
    """Compute the scores of the attributions of each example.

    Every pass has one row per example, because the function of the logits may be bound to the batch. All methods are
    tested on the same draws.

    Args:
        inputs: The inputs of a batch.
        examples: The numbers of the examples in the data set, which seed the draws.
        classes_B: The explained classes: those predicted from the unchanged inputs.
        attributions: By method, the attribution (B, P) of each position.
        replacements: By name.
        test: The options of the test.

    Returns:
        Scores (B,), float64. NaN for an example without used positions, or with attributions or logits that are not
        finite.

    Raises:
        FaithfulnessError: The examples have several predictions.
    """
    rankings = {
        method: _Ranking.of(values_BP, inputs.used_BP, examples, test.seed)
        for method, values_BP in attributions.items()
    }
    before_BC = probabilities(inputs, inputs.values_BPF)
    found: dict[Score, Tensor] = {}
    for name, replacement in replacements.items():
        n_draws = max(test.draws if "information" in replacement.curves else 1, test.curve_draws)
        tested = _Tested(inputs, classes_B, replacement, replacement.draws(inputs, examples, n_draws), before_BC)
        for method, ranking in rankings.items():
            scores: dict[Curve, Tensor] = {}
            if "deletion" in replacement.curves:
                scores["deletion"], scores["insertion"] = tested.areas(ranking.descending_BP, test)
            if "information" in replacement.curves:
                scores["information"] = tested.information(ranking.by_size_BP, test)
            for metric, values_B in scores.items():
                found[Score(method, name, metric)] = values_B.where(ranking.known_B, torch.nan)
    return found


class _Ranking(NamedTuple):
    """The ranks of the used positions of each example, from 0 on. Unused positions have rank P."""

    descending_BP: Tensor
    by_size_BP: Tensor
    known_B: Tensor
    """Whether the example has used positions, and all their attributions are finite."""

    @classmethod
    def of(cls, values_BP: Tensor, used_BP: Tensor, examples: Sequence[int], seed: int) -> _Ranking:
        # attributions that are zero in many positions must not profit from the order of the positions
        numbers, n_positions = SeededNumbers(seed, "ties"), used_BP.shape[1]
        keys = [torch.from_numpy(numbers.at(example).random(n_positions)) for example in examples]
        keys_BP = torch.stack(keys).to(used_BP.device)
        values_BP = values_BP.double().where(used_BP, 0)
        known_B = used_BP.any(1) & values_BP.isfinite().all(1)
        return cls(_ranks(values_BP, keys_BP, used_BP), _ranks(values_BP.abs(), keys_BP, used_BP), known_B)


def _ranks(values_BP: Tensor, keys_BP: Tensor, used_BP: Tensor) -> Tensor:
    """Return the ranks of descending values. Equal values are in the order of the keys."""
    by_key_BP = keys_BP.argsort(1)
    sorted_BP = values_BP.where(used_BP, -torch.inf).gather(1, by_key_BP)
    order_BP = by_key_BP.gather(1, sorted_BP.argsort(stable=True, dim=1, descending=True))
    return order_BP.argsort(1).where(used_BP, used_BP.shape[1])


@dataclass(frozen=True)
class _Tested:
    """A batch with the draws of a replacement."""

    inputs: FlatInputs
    classes_B: Tensor
    replacement: Replacement
    draws_DBPF: Tensor
    before_BC: Tensor

    def areas(self, ranks_BP: Tensor, test: FaithfulnessTest) -> tuple[Tensor, Tensor]:
        """Return the areas (B,) under the curves of deletion and insertion."""
        n_B = self.inputs.used_BP.sum(1)
        steps_B = n_B.clamp(1, test.steps)
        draws_DBPF = self.draws_DBPF[: test.curve_draws]
        before_B, without_B = self._chosen(self.before_BC), self._mean(draws_DBPF, self.inputs.used_BP)
        previous_B, deleted_B, inserted_B = torch.zeros_like(n_B), before_B, without_B
        deletion_B, insertion_B = torch.zeros_like(before_B), torch.zeros_like(before_B)
        for step in range(1, int(steps_B.max()) + 1 if len(steps_B) else 1):
            counts_B = ((2 * step * n_B + steps_B) // (2 * steps_B)).minimum(n_B)  # rounded
            if torch.equal(counts_B, n_B):
                after_B, restored_B = without_B, before_B
            else:
                first_BP = ranks_BP < counts_B[:, None]
                after_B = self._mean(draws_DBPF, first_BP)
                restored_B = self._mean(draws_DBPF, self.inputs.used_BP & ~first_BP)
            width_B = (counts_B - previous_B).double() / n_B
            deletion_B = deletion_B + width_B * (deleted_B + after_B) / 2
            insertion_B = insertion_B + width_B * (inserted_B + restored_B) / 2
            previous_B, deleted_B, inserted_B = counts_B, after_B, restored_B
        return deletion_B, insertion_B

    def information(self, ranks_BP: Tensor, test: FaithfulnessTest) -> Tensor:
        """Return the mean mutual information (B,) over the numbers of positions."""
        n_B = self.inputs.used_BP.sum(1)
        total_B = self.before_BC.new_zeros(len(n_B))
        previous_B, information_B = torch.zeros_like(n_B), total_B
        for fraction in test.fractions:
            counts_B = (fraction * n_B.double() + 0.5).long().clamp_min(1)
            if not torch.equal(counts_B, previous_B):
                replaced_BP = ranks_BP < counts_B[:, None]
                values = self.replacement.values(self.inputs, self.draws_DBPF[: test.draws], replaced_BP)
                p_DBC = torch.stack([probabilities(self.inputs, each_BPF) for each_BPF in values])
                information_B, _ = functional_entropy(p_DBC)  # summed over the classes, it is the mutual information
            total_B, previous_B = total_B + information_B, counts_B
        return total_B / len(test.fractions)

    def _mean(self, draws_DBPF: Tensor, replaced_BP: Tensor) -> Tensor:
        values = self.replacement.values(self.inputs, draws_DBPF, replaced_BP)
        found = [self._chosen(probabilities(self.inputs, each_BPF)) for each_BPF in values]
        return torch.stack(found).mean(0)

    def _chosen(self, p_BC: Tensor) -> Tensor:
        return p_BC.gather(1, self.classes_B[:, None])[:, 0]
