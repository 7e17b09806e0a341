"""Directions in the logits, and rows of models, of every kind of labels against their definitions.

Legend: B examples, T positions, C classes, R rows, S = diag(p) - p pᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from gradients import dense_definition
from gradients import fisher_models as models
from npeff.fisher import FisherBatch, PerExampleFishers
from npeff.gradients import (
    IGNORED,
    UNKNOWN,
    LabelRows,
    LabelSpec,
    UnsupportedModelError,
    check_coverage,
    label_rows,
    select_parameters,
)
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

EXACT, EMPIRICAL = LabelSpec("exact"), LabelSpec("empirical")


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(logits: Tensor) -> Tensor:
    p = torch.softmax(logits.double(), dim=-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def unscaled(rows: LabelRows) -> Tensor:
    """The directions as they are meant, (R, B, …), in float64."""
    stacked = torch.stack([rows.directions[row] for row in range(len(rows.directions))]).double()
    return stacked * rows.scales_B.view(-1, *[1] * (stacked.dim() - 2))


def outer(rows: LabelRows) -> Tensor:
    """Σ_r of the directions' outer products, (B, C, C); directions of positions are summed first."""
    values = unscaled(rows)
    values_RBC = values.sum(2) if values.dim() == 4 else values
    return torch.einsum("rbc,rbd->bcd", values_RBC, values_RBC)


# ---- exact and truncated


@pytest.mark.parametrize("n_classes", [2, 3, 40])
def test_exact_directions_make_up_the_covariance(n_classes: int) -> None:
    logits = random_logits(6, n_classes)
    rows = label_rows(EXACT, logits)
    assert len(rows.directions) == n_classes - 1
    torch.testing.assert_close(outer(rows), covariance(logits), rtol=1e-12, atol=1e-15)
    assert rows.ranks_B.tolist() == [n_classes - 1] * 6
    assert rows.ranks_B.dtype == torch.int32
    assert rows.kept_trace_B.tolist() == [1] * 6
    assert rows.losses_B.isnan().all()


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 9])
def test_truncated_directions_keep_the_largest_eigenpairs(rank: int) -> None:
    logits = random_logits(20, 6)
    rows = label_rows(LabelSpec("truncated", rank), logits)
    rank = min(rank, 5)
    values, vectors = torch.linalg.eigh(covariance(logits))
    largest, kept = values[:, -rank:], vectors[:, :, -rank:]
    assert len(rows.directions) == rank
    torch.testing.assert_close(outer(rows), (kept * largest[:, None]) @ kept.mT, rtol=0, atol=1e-13)
    torch.testing.assert_close(rows.kept_trace_B, largest.sum(1) / values.sum(1), rtol=1e-12, atol=0)
    assert rows.ranks_B.tolist() == [rank] * 20


def test_truncated_examples_use_as_many_rows_as_their_share_needs() -> None:
    logits = random_logits(40, 6)
    rows = label_rows(LabelSpec("truncated", 4, kept_trace=0.9), logits)
    values = torch.linalg.eigvalsh(covariance(logits)).flip(1)
    shares = (values.cumsum(1) / values.sum(1, keepdim=True))[:, :4]
    assert rows.ranks_B.tolist() == (1 + (shares[:, :3] < 0.9).sum(1)).tolist()
    assert len(set(rows.ranks_B.tolist())) > 2
    kept = shares.gather(1, rows.ranks_B[:, None].long() - 1)[:, 0]
    torch.testing.assert_close(rows.kept_trace_B, kept, rtol=1e-12, atol=0)
    used_RB = torch.arange(4)[:, None] < rows.ranks_B
    assert (unscaled(rows).abs().amax(2).gt(0) == used_RB).all()


@pytest.mark.parametrize("spec", [EXACT, LabelSpec("truncated", 2)], ids=["exact", "truncated"])
def test_a_single_prediction_among_positions_gives_the_rows_it_has_alone(spec: LabelSpec) -> None:
    logits, places = random_logits(4, 5, 3), torch.tensor([0, 4, 2, 2])
    targets = torch.full((4, 5), IGNORED)
    targets[torch.arange(4), places] = torch.tensor([2, UNKNOWN, 0, 1])
    rows = label_rows(spec, logits, targets=targets)
    alone = label_rows(spec, logits[torch.arange(4), places], targets=torch.tensor([2, UNKNOWN, 0, 1]))
    for direction, expected in zip(rows.directions, alone.directions, strict=True):
        assert torch.equal(direction[torch.arange(4), places], expected)
        assert not direction[targets == IGNORED].any()
    for name in ("scales_B", "ranks_B", "kept_trace_B"):
        assert torch.equal(getattr(rows, name), getattr(alone, name))
    torch.testing.assert_close(rows.losses_B, alone.losses_B, equal_nan=True, rtol=0, atol=0)


# ---- sampled and empirical


def drawn_labels(rows: LabelRows) -> Tensor:
    """(R, …): the one class whose entry in a direction is above zero."""
    return torch.stack([direction.argmax(-1) for direction in rows.directions])


def scores(logits: Tensor, labels: Tensor) -> Tensor:
    """e_ŷ - p"""
    return nn.functional.one_hot(labels, logits.shape[-1]).double() - logits.double().softmax(-1)


def test_rows_of_draws_are_scores_of_the_drawn_labels() -> None:
    logits = random_logits(5, 4)
    rows = label_rows(LabelSpec("sampled", 6, seed=1), logits)
    assert len(rows.directions) == 6
    torch.testing.assert_close(
        unscaled(rows), scores(logits.expand(6, 5, 4), drawn_labels(rows)) / 6**0.5, rtol=1e-12, atol=1e-15
    )
    assert rows.ranks_B.tolist() == [6] * 5
    assert rows.kept_trace_B.isnan().all()
    assert len(drawn_labels(rows).unique()) == 4
    with pytest.raises(IndexError):
        rows.directions[6]


def test_rows_of_draws_of_positions() -> None:
    logits = random_logits(3, 7, 4)
    targets = torch.full((3, 7), UNKNOWN)
    targets[0, :3] = targets[2] = IGNORED
    rows = label_rows(LabelSpec("sampled", 5, seed=2), logits, targets=targets)
    expected = scores(logits.expand(5, 3, 7, 4), drawn_labels(rows)) / 5**0.5
    torch.testing.assert_close(
        unscaled(rows), expected.masked_fill((targets == IGNORED)[..., None], 0), rtol=1e-12, atol=1e-15
    )
    assert rows.ranks_B.tolist() == [5, 5, 0]


def test_empirical_rows_are_scores_of_the_given_labels() -> None:
    logits, targets = random_logits(4, 3), torch.tensor([2, 0, 1, 1])
    rows = label_rows(EMPIRICAL, logits, targets=targets)
    torch.testing.assert_close(unscaled(rows)[0], scores(logits, targets), rtol=1e-12, atol=1e-15)
    assert len(rows.directions) == 1
    assert rows.ranks_B.tolist() == [1] * 4
    assert rows.kept_trace_B.isnan().all()


def test_empirical_rows_of_positions() -> None:
    logits, targets = random_logits(2, 3, 4), torch.tensor([[3, IGNORED, 0], [IGNORED, 1, 1]])
    rows = label_rows(EMPIRICAL, logits, targets=targets)
    expected = scores(logits, targets.clamp_min(0)).masked_fill((targets == IGNORED)[..., None], 0)
    torch.testing.assert_close(unscaled(rows)[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("spec", [EXACT, LabelSpec("truncated", 2), LabelSpec("sampled", 2), EMPIRICAL])
def test_losses_of_known_classes(spec: LabelSpec) -> None:
    logits = random_logits(5, 3)
    targets = torch.tensor([2, 0, 1, 1, IGNORED])
    rows = label_rows(spec, logits, targets=targets)
    expected = nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(rows.losses_B[:4], expected[:4], rtol=1e-12, atol=0)
    assert rows.losses_B.isnan().tolist() == [False] * 4 + [True]
    assert rows.ranks_B.tolist() == [len(rows.directions)] * 4 + [0]
    assert not unscaled(rows)[:, 4].any()


def test_losses_of_positions_are_the_mean_over_those_of_known_class() -> None:
    logits = random_logits(3, 4, 5)
    targets = torch.tensor([[1, UNKNOWN, 4, IGNORED], [UNKNOWN] * 4, [IGNORED, 0, IGNORED, UNKNOWN]])
    losses = label_rows(LabelSpec("sampled", 2), logits, targets=targets).losses_B
    log_p = logits.log_softmax(-1)
    expected = [-(log_p[0, 0, 1] + log_p[0, 2, 4]) / 2, torch.tensor(torch.nan), -log_p[2, 1, 0]]
    torch.testing.assert_close(losses, torch.stack(expected).double(), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", [EXACT, LabelSpec("truncated", 2), LabelSpec("sampled", 2), EMPIRICAL])
def test_a_batch_without_predictions(spec: LabelSpec) -> None:
    rows = label_rows(spec, random_logits(2, 3, 4), targets=torch.full((2, 3), IGNORED))
    assert rows.ranks_B.tolist() == [0, 0]
    assert rows.losses_B.isnan().all()
    assert all(not direction.any() and direction.shape == (2, 3, 4) for direction in rows.directions)


# ---- sampled labels are unbiased


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    """Of the mean of independent samples (n, …), in standard errors."""
    standard_error = samples.std(0) / len(samples) ** 0.5
    return (samples.mean(0) - expected) / standard_error


def check_unbiased(samples_nCC: Tensor, expected_CC: Tensor) -> None:
    """Entry by entry, and as a whole: the mean of ⟨sample, S⟩ / ‖S‖², which is 1, has a standard error of at most 0.4%,
    so that a bias of 2% would be off by 5 of them; 1% is allowed."""
    assert z_scores(samples_nCC, expected_CC).abs().max() < 4.5
    along_n = (samples_nCC * expected_CC).sum((1, 2)) / expected_CC.square().sum()
    assert along_n.std() / len(along_n) ** 0.5 < 0.004
    assert abs(float(along_n.mean()) - 1) < 0.01


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [2.0, 0.0, -1.0, 0.5], [0.0, 1.5]], ids=["3", "4", "2"])
def test_draws_are_unbiased_for_the_exact_covariance(logits: list[float]) -> None:
    """Over seeds and examples: 200 examples of equal logits for each of 150 seeds, 8 draws each."""
    logits_BC = torch.tensor(logits, dtype=torch.float64).expand(200, -1)
    samples = [outer(label_rows(LabelSpec("sampled", 8, seed=seed), logits_BC)) for seed in range(150)]
    check_unbiased(torch.cat(samples), covariance(logits_BC[0]))


def test_draws_of_positions_are_unbiased_for_the_sum_over_them() -> None:
    """Draws at different positions, and different draws, are independent: their cross terms vanish in expectation."""
    logits_TC = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, -1.0], [2.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]).double()
    targets_BT = torch.tensor([UNKNOWN, UNKNOWN, IGNORED, UNKNOWN]).expand(300, -1)
    expected_CC = covariance(logits_TC)[[0, 1, 3]].sum(0)
    samples, cross_terms = [], []
    for seed in range(200):
        rows = label_rows(LabelSpec("sampled", 2, seed=seed), logits_TC.expand(300, -1, -1), targets=targets_BT)
        samples.append(outer(rows))
        values_RBTC = unscaled(rows)
        cross_terms.append(torch.einsum("btc,bud->btcud", values_RBTC[0], values_RBTC[1]))
    check_unbiased(torch.cat(samples), expected_CC)
    scores_z = z_scores(torch.cat(cross_terms), torch.zeros(())).nan_to_num(0)  # IGNORED is zero without variance
    assert scores_z.abs().max() < 4.5
    assert scores_z.abs().max() > 0


# ---- what draws depend on


SAMPLED = LabelSpec("sampled", 16, seed=3)


def test_draws_depend_on_the_example_and_not_on_its_batch() -> None:
    logits, numbers = random_logits(6, 5), [10, 3, 2**40, 7, 0, 8]
    whole = unscaled(label_rows(SAMPLED, logits, numbers))
    order = [4, 2, 5]
    part = unscaled(label_rows(SAMPLED, logits[order], [numbers[place] for place in order]))
    assert torch.equal(part, whole[:, order])
    default = unscaled(label_rows(SAMPLED, logits))
    assert torch.equal(default, unscaled(label_rows(SAMPLED, logits, range(6))))


def test_draws_differ_between_seeds_examples_positions_and_rows() -> None:
    logits = torch.zeros(2, 3, 50, dtype=torch.float64)
    targets = torch.full((2, 3), UNKNOWN)
    found = [drawn_labels(label_rows(LabelSpec("sampled", 4, seed=seed), logits, targets=targets)) for seed in (0, 1)]
    streams = torch.stack(found).permute(0, 2, 3, 1).flatten(0, 2)  # 12 positions, 4 draws each
    assert len({tuple(stream) for stream in streams.tolist()}) == 12
    assert len(streams.unique()) > 20


def test_draws_depend_on_nothing_that_is_ignored() -> None:
    """Padding on the right, on the left and in between."""
    logits, lengths = random_logits(3, 4, 5), [4, 2, 3]
    results: list[list[Tensor]] = []
    for places in ([0, 1, 2, 3], [5, 6, 7, 8], [1, 3, 4, 8]):
        wide = random_logits(3, 9, 5, seed=len(results) + 1)
        targets = torch.full((3, 9), IGNORED)
        for example, length in enumerate(lengths):
            wide[example, places[:length]] = logits[example, :length]
            targets[example, places[:length]] = UNKNOWN
        values = unscaled(label_rows(SAMPLED, wide, [5, 6, 7], targets))
        results.append([values[:, example, places[:length]] for example, length in enumerate(lengths)])
        kept = sum(value.abs().sum() for value in results[-1])
        torch.testing.assert_close(values.abs().sum(), kept, rtol=1e-12, atol=0)
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected)


def test_draws_do_not_depend_on_the_precision_of_the_logits() -> None:
    logits = random_logits(30, 5).float()
    drawn = [drawn_labels(label_rows(SAMPLED, logits.to(dtype))) for dtype in (torch.float32, torch.float64)]
    assert torch.equal(*drawn)
    half = label_rows(SAMPLED, logits.bfloat16())
    assert half.directions[0].dtype == torch.bfloat16
    assert torch.equal(drawn_labels(half), drawn_labels(label_rows(SAMPLED, logits.bfloat16().double())))


# ---- numbers at the limits


@pytest.mark.parametrize("gap", [30.0, 100.0, 600.0])
@pytest.mark.parametrize("spec", [EXACT, LabelSpec("truncated", 1), LabelSpec("sampled", 2), EMPIRICAL])
def test_saturated_predictions_keep_their_directions_in_float32(spec: LabelSpec, gap: float) -> None:
    """1 - p = e^-gap of the likely class: directions are near 1 for the model, and exact with their scale."""
    logits = torch.tensor([[0.0, gap], [gap, 0.0], [0.0, 0.0]])
    targets = torch.tensor([1, 0, 0])
    rows = label_rows(spec, logits, targets=targets)
    assert (torch.frexp(rows.scales_B)[0] == 0.5).all()  # powers of two
    largest = torch.stack([direction.abs().amax(1) for direction in rows.directions]).amax(0)
    assert ((largest >= 0.5 / 2**0.5) & (largest <= 1)).all()
    small = torch.tensor(-gap).double().exp()
    size = small if spec.kind in ("sampled", "empirical") else small.sqrt()
    sizes_B1 = torch.stack([size, size, torch.tensor(0.5).double()])[:, None]
    relative = (unscaled(rows) / sizes_B1).square().sum(0)
    torch.testing.assert_close(relative, torch.ones_like(relative), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", [EXACT, LabelSpec("truncated", 2), LabelSpec("sampled", 4), EMPIRICAL])
def test_logits_that_are_not_finite_give_no_rows_and_disturb_no_other(spec: LabelSpec, bad: float) -> None:
    logits, targets = random_logits(4, 3), torch.tensor([2, 0, 1, 1])
    clean = label_rows(spec, logits, targets=targets)
    broken = logits.clone()
    broken[1, 2] = bad
    rows = label_rows(spec, broken, targets=targets)
    others = [0, 2, 3]
    assert torch.equal(unscaled(rows)[:, others], unscaled(clean)[:, others])
    assert not unscaled(rows)[:, 1].any()
    assert rows.ranks_B.tolist() == [len(rows.directions) * (example != 1) for example in range(4)]
    assert torch.equal(rows.losses_B[others], clean.losses_B[others])
    assert rows.losses_B[1].isnan()


def test_one_position_that_is_not_finite_spoils_its_example_and_one_that_is_ignored_does_not() -> None:
    logits, targets = random_logits(3, 4, 5), torch.full((3, 4), UNKNOWN)
    targets[1, 2] = IGNORED
    clean = label_rows(SAMPLED, logits, targets=targets)
    broken = logits.clone()
    broken[1, 2], broken[2, 0] = torch.nan, torch.inf
    rows = label_rows(SAMPLED, broken, targets=targets)
    assert rows.ranks_B.tolist() == [16, 16, 0]
    assert torch.equal(unscaled(rows)[:, :2], unscaled(clean)[:, :2])
    assert not unscaled(rows)[:, 2].any()


class PeakMemory(TorchDispatchMode):
    """Most bytes held at once by tensors made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)}
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result


def test_memory_is_bounded_for_a_large_vocabulary() -> None:
    """256 predictions of 50,000 classes: 51 MB of logits, and 5 GB of directions if all 100 were held at once."""
    logits = torch.randn(32, 8, 50_000, generator=torch.Generator().manual_seed(0))
    targets = torch.full((32, 8), UNKNOWN)
    with PeakMemory() as memory:
        rows = label_rows(LabelSpec("sampled", 100), logits, targets=targets)
        for row in (0, 57, 99):
            direction = rows.directions[row]
    assert memory.peak > 2 * logits.nbytes  # probabilities and a direction, or nothing was measured
    assert memory.peak < 6 * logits.nbytes
    found = direction[3, 5].double() * rows.scales_B[3]
    torch.testing.assert_close(found, scores(logits[3, 5], direction[3, 5].argmax()) / 10, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("spec", [EXACT, LabelSpec("sampled", 3), EMPIRICAL])
def test_predictions_may_be_worked_on_in_blocks(spec: LabelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = random_logits(11, 6), torch.arange(11) % 6
    whole = label_rows(spec, logits, targets=targets)
    monkeypatch.setattr("npeff.gradients.labels._BLOCK", 4 * 6)
    blocks = label_rows(spec, logits, targets=targets)
    torch.testing.assert_close(unscaled(blocks), unscaled(whole), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(blocks.losses_B, whole.losses_B, rtol=1e-12, atol=0)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "all"}, "labels must be one of exact, truncated, sampled, empirical, not 'all'"),
        ({"kind": "exact", "rank": 2}, "labels: exact takes no rank"),
        ({"kind": "empirical", "rank": 1}, "labels: empirical takes no rank"),
        ({"kind": "truncated"}, "labels: truncated needs a rank"),
        ({"kind": "sampled"}, "labels: sampled needs a rank"),
        ({"kind": "sampled", "rank": 0}, "rank must be greater than 0, not 0"),
        ({"kind": "truncated", "rank": 2, "kept_trace": 0.0}, "kept_trace must be greater than 0, not 0.0"),
        ({"kind": "truncated", "rank": 2, "kept_trace": 1.5}, "kept_trace must be less than or equal to 1, not 1.5"),
        ({"kind": "sampled", "rank": 2, "kept_trace": 0.5}, "kept_trace applies only to labels: truncated"),
        ({"kind": "exact", "kept_trace": 0.5}, "kept_trace applies only to labels: truncated"),
    ],
)
def test_specifications_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelSpec(**arguments)


def test_a_specification_says_how_many_rows_there_can_be() -> None:
    assert LabelSpec().max_rank(7) == 6
    assert [LabelSpec("truncated", rank).max_rank(7) for rank in (1, 6, 20)] == [1, 6, 6]
    assert LabelSpec("sampled", 20).max_rank(7) == 20
    assert EMPIRICAL.max_rank(7) == 1
    spec = LabelSpec("truncated", 3, 0.9, 5)
    assert LabelSpec(**spec.to_json()) == spec


@pytest.mark.parametrize(
    ("spec", "shape", "targets", "message"),
    [
        (EXACT, (2, 3), [0], r"targets must have the shape \(2,\) to match the logits, not \(1,\)"),
        (EXACT, (2, 4, 3), [0, 1], r"targets must have the shape \(2, 4\) to match the logits, not \(2,\)"),
        (EXACT, (2, 3), [0, 3], "targets must be classes 0 to 2, -1 or -100"),
        (EMPIRICAL, (2, 3), [0, -2], "targets must be classes 0 to 2, -1 or -100"),
        (EMPIRICAL, (2, 3), [0, UNKNOWN], "need a label for every example: add labels, or use sampled"),
        (EMPIRICAL, (2, 3), None, "need a label for every example: add labels, or use sampled"),
        (EMPIRICAL, (1, 2, 3), [[0, UNKNOWN]], "need a label for every example"),
        (EXACT, (2, 2, 3), [[0, 1], [0, IGNORED]], "exact labels need .* one prediction each.*an example has 2"),
        (LabelSpec("truncated", 2), (1, 3, 3), [[UNKNOWN] * 3], "truncated labels need.*an example has 3.*use sampled"),
        (LabelSpec("truncated", 2), (1, 5000), None, "truncated labels support at most 4096 classes: use sampled"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    spec: LabelSpec, shape: tuple[int, ...], targets: Any, message: str
) -> None:
    given = None if targets is None else torch.tensor(targets)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        label_rows(spec, random_logits(*shape), targets=given)
    assert "\n" not in str(caught.value)


def test_numbers_of_examples_must_be_as_many_as_the_batch() -> None:
    with pytest.raises(ValueError, match="3 example numbers for a batch of 2 examples"):
        label_rows(SAMPLED, random_logits(2, 4), [1, 2, 3])


# ---- rows of models, against plain autograd


class Tagger(nn.Module):
    """A class for every token, from it and all before it; the output layer is the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 5, padding_idx=models.PADDING)
        self.mix = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.mix(self.tokens(ids).cumsum(1))))
        logits: Tensor = self.head(hidden)
        return logits


def tagger() -> tuple[models.Case, Tensor]:
    """Sequences of 2 to 6 tokens padded on the right, and their targets for the first seven in one batch."""
    torch.manual_seed(0)
    case = models.token_case(Tagger().double())
    ids = case.batch(range(7))
    targets = torch.where(ids == models.PADDING, IGNORED, ids.roll(-1, 1))
    targets[targets == models.PADDING] = 1
    return case, targets


def compute(case: models.Case, spec: LabelSpec, targets: Tensor | None = None) -> FisherBatch:
    layout = select_parameters(case.model)
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    fishers = PerExampleFishers(case.model, case.logits_fn, layout, sketch, spec)
    return fishers(case.batch(range(7)), range(20, 27), targets)


def plain_gradient(case: models.Case, score: Tensor) -> Tensor:
    found = torch.autograd.grad(score, list(case.model.parameters()), retain_graph=True, allow_unused=True)
    pairs = zip(case.model.parameters(), found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def check_rows(result: FisherBatch, expected_BRP: Sequence[Tensor]) -> None:
    assert result.valid_B.all()
    for found_RP, gram_RR, expected_RP in zip(result.factors_BRD, result.grams_BRR, expected_BRP, strict=True):
        assert (found_RP - expected_RP).norm() < 1e-9 * expected_RP.norm()
        torch.testing.assert_close(gram_RR, expected_RP @ expected_RP.T, rtol=1e-9, atol=1e-12 * float(gram_RR.norm()))


NAMES = ["mlp", "cnn", "tied encoder", "custom", "recurrent"]


@pytest.mark.parametrize("name", NAMES)
def test_truncated_fishers_of_models(name: str) -> None:
    case = models.make(name)
    result = compute(case, LabelSpec("truncated", 2, kept_trace=0.7))
    layout = select_parameters(case.model)
    for index in range(7):
        logits, jacobian_CP = dense_definition.dense_jacobian(case.model, models.call, layout, case.batch([index]))
        values, vectors = torch.linalg.eigh(covariance(logits))
        shares = values.flip(0).cumsum(0) / values.sum()
        rank = min(2, 1 + int((shares < 0.7).sum()))
        assert int(result.ranks_B[index]) == rank
        torch.testing.assert_close(result.kept_trace_B[index], shares[rank - 1], rtol=1e-9, atol=0)
        rows = values[-rank:].sqrt()[:, None] * vectors[:, -rank:].T @ jacobian_CP
        found = result.factors_BRD[index]
        assert not found[rank:].any()
        expected = rows.T @ rows
        assert (found.T @ found - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_sampled_and_empirical_rows_of_models(name: str, kind: str) -> None:
    case = models.make(name)
    spec = LabelSpec("sampled", 3, seed=2) if kind == "sampled" else EMPIRICAL
    case.model.eval()
    given = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    result = compute(case, spec, given)
    expected = []
    for index in range(7):
        logits = case.logits_fn(case.model, case.batch([index]))
        drawn = drawn_labels(label_rows(spec, logits.detach(), [20 + index], given[[index]]))[:, 0]
        if kind == "empirical":
            assert drawn.tolist() == given[[index]].tolist()
        log_p = logits.log_softmax(-1)[0]
        rows = [plain_gradient(case, log_p[label] / len(drawn) ** 0.5) for label in drawn]
        expected.append(torch.stack(rows))
    check_rows(result, expected)


@pytest.mark.parametrize("spec", [LabelSpec("sampled", 3, seed=2), EMPIRICAL], ids=["sampled", "empirical"])
def test_rows_of_sequences_are_sums_over_positions(spec: LabelSpec) -> None:
    case, targets = tagger()
    result = compute(case, spec, targets)
    expected, losses = [], []
    for index in range(7):
        ids = case.batch([index])
        own = targets[[index], : ids.shape[1]]
        logits = case.model(ids)
        drawn = drawn_labels(label_rows(spec, logits.detach(), [20 + index], own))[:, 0]
        log_p = logits.log_softmax(-1)[0]
        sums = [log_p.gather(1, labels[:, None]).sum() / len(drawn) ** 0.5 for labels in drawn]
        expected.append(torch.stack([plain_gradient(case, value) for value in sums]))
        losses.append(nn.functional.cross_entropy(logits[0].detach(), own[0]))
    check_rows(result, expected)
    torch.testing.assert_close(result.losses_B, torch.stack(losses), rtol=1e-12, atol=0)
    assert result.logits.shape == (7, targets.shape[1], 9)
    check_coverage(
        case.model,
        case.logits_fn,
        case.batch(range(7)),
        select_parameters(case.model),
        labels=spec,
        targets=targets,
    )


def test_exact_rows_of_one_position_of_each_sequence() -> None:
    """The last token of each: its class alone is predicted."""
    case, targets = tagger()
    lengths = (targets != IGNORED).sum(1)
    last = torch.full_like(targets, IGNORED).scatter(1, lengths[:, None] - 1, UNKNOWN)
    result = compute(case, EXACT, last)
    layout = select_parameters(case.model)
    ids = [case.batch([index]) for index in range(7)]
    expected = dense_definition.dense_fishers(case.model, lambda model, batch: model(batch)[:, -1], layout, ids)
    a = result.factors_BRD
    assert float(((a.mT @ a - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max()) < 1e-9
    assert result.losses_B.isnan().all()


def test_an_example_without_predictions_has_no_rows_and_is_marked_by_its_rank() -> None:
    case, targets = tagger()
    targets[3] = IGNORED
    result = compute(case, LabelSpec("sampled", 2), targets)
    assert result.ranks_B.tolist() == [2, 2, 2, 0, 2, 2, 2]
    assert not result.factors_BRD[3].any()
    assert result.frobenius_norms_B[3] == 0
