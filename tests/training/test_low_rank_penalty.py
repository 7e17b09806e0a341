"""The low-rank penalty is the dense quadratic form, or that of the sketch, and its gradient is that of differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.gradients import model_fingerprint, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from npeff.training import EWC, LowRankFisher, TrainingError
from safetensors.torch import save_file
from torch import Tensor, nn

N_ROWS = 6


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def rows_of(seed: int) -> dict[str, Tensor]:
    """Rows in all parameters."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in network().named_parameters()}
    return {n: torch.randn(N_ROWS, *shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def flat(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in rows.values()], 1)


def sketched(seed: int, spec: SketchSpec, *, moments: bool = False, **known: Any) -> LowRankFisher:
    layout = select_parameters(network())
    sketch = make_sketch(spec, layout, 0)
    rows_nD = sketch.apply_dense(rows_of(seed))
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    if moments:
        return LowRankFisher(shapes, sketch, moments_DD=rows_nD.T @ rows_nD, **known)
    return LowRankFisher(shapes, sketch, rows_nD=rows_nD, **known)


IDENTITY = SketchSpec("identity")
FISHERS: dict[str, Callable[[int], Any]] = {
    "rows": rows_of,
    "identity": lambda seed: sketched(seed, IDENTITY),
    "moments": lambda seed: sketched(seed, IDENTITY, moments=True),
}
SKETCHES: dict[str, Callable[[int], Any]] = {
    "tensorsketch": lambda seed: sketched(seed, SketchSpec("tensorsketch", dim=16)),
    "kronecker": lambda seed: sketched(seed, SketchSpec("kronecker", size=2)),
}


def dense(seeds: list[int], factors: list[float], anchors: list[dict[str, Tensor]]) -> float:
    """½ Σ factor Δᵀ F Δ with dense matrices F, at the network 0."""
    total = 0.0
    for seed, factor, anchor in zip(seeds, factors, anchors, strict=True):
        rows_nP = flat(rows_of(seed))
        change_P = torch.cat([(value - anchor[name]).flatten() for name, value in values_of(network()).items()])
        total += 0.5 * factor * float(change_P @ (rows_nP.T @ rows_nP) @ change_P)
    return total


@pytest.mark.parametrize("kind", FISHERS)
def test_the_penalty_is_the_dense_quadratic_form(kind: str) -> None:
    seeds, anchors = [1, 2, 3], [values_of(network(seed)) for seed in (1, 2, 3)]
    fishers = [FISHERS[kind](seed) for seed in seeds]
    found = EWC(fishers, anchors, weight=6.0, low_rank=True).penalty(network())
    assert found.item() == pytest.approx(6 * dense(seeds, [1, 1, 1], anchors), rel=1e-10)
    found = EWC(fishers, anchors, weight=6.0, low_rank=True, mode="online", decay=0.5).penalty(network())
    assert found.item() == pytest.approx(6 * dense(seeds, [0.25, 0.5, 1], [anchors[2]] * 3), rel=1e-10)


def test_rows_of_single_entries_are_the_diagonal() -> None:
    diagonal, anchor = {name: value.square() for name, value in values_of(network(1)).items()}, values_of(network(2))
    sizes = [value.numel() for value in diagonal.values()]
    roots_PP = torch.cat([value.flatten() for value in diagonal.values()]).sqrt().diag()
    parts = zip(diagonal.items(), roots_PP.split(sizes, 1), strict=True)
    rows = {name: part.reshape(-1, *value.shape) for (name, value), part in parts}
    expected = EWC([diagonal], [anchor], weight=2).penalty(network())
    torch.testing.assert_close(EWC([rows], [anchor], weight=2, low_rank=True).penalty(network()), expected)


@pytest.mark.parametrize("kind", [*FISHERS, *SKETCHES])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    model, step = network(), 1e-5
    ewc = EWC([{**FISHERS, **SKETCHES}[kind](1)], [values_of(network(1))], weight=0.3, low_rank=True)
    ewc.penalty(model).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        entries = parameter.detach().view(-1)
        for entry in range(len(entries)):
            before, sides = float(entries[entry]), []
            for sign in (1, -1):
                entries[entry] = before + sign * step
                sides.append(ewc.penalty(model).item())
            entries[entry] = before
            found = parameter.grad.view(-1)[entry].item()
            assert found == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", SKETCHES)
def test_the_form_of_a_sketch_is_that_of_the_products_of_sketches(kind: str) -> None:
    fisher, anchor = SKETCHES[kind](1), values_of(network(1))
    change = {name: (value - anchor[name])[None] for name, value in values_of(network()).items()}
    expected = fisher.rows_nD @ fisher.linear_map.apply_dense(change)[0]
    found = EWC([fisher], [anchor], weight=1, low_rank=True).penalty(network())
    torch.testing.assert_close(found, expected.square().sum() / 2)


@pytest.mark.parametrize("moments", [False, True])
def test_leading_directions_are_those_of_the_dense_matrix(moments: bool) -> None:
    rows_nP, anchor = flat(rows_of(1)), values_of(network(1))
    values_P, vectors_PP = torch.linalg.eigh(rows_nP.T @ rows_nP)
    change_P = torch.cat([(value - anchor[name]).flatten() for name, value in values_of(network()).items()])
    for count in (1, 3, 100):
        fisher = sketched(1, IDENTITY, moments=moments).leading(count)
        assert fisher.rows_nD is not None
        kept = min(count, N_ROWS if not moments else len(values_P))
        assert fisher.rows_nD.shape == (kept, len(values_P))
        expected = (values_P * (vectors_PP.T @ change_P).square())[-count:].sum() / 2
        found = EWC([fisher], [anchor], weight=1, low_rank=True).penalty(network())
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_sketch_adds_a_penalty_of_the_trace_over_its_coordinates() -> None:
    """The mean over seeds. A tensor sketch adds a little less, because it avoids some collisions."""
    dim, layout, rows = 16, select_parameters(network()), rows_of(1)
    change = {name: value[None] for name, value in values_of(network(1)).items()}
    change_P = flat(change)[0]
    found = []
    for seed in range(300):
        sketch = make_sketch(SketchSpec("tensorsketch", dim=dim), layout, seed)
        found.append(float((sketch.apply_dense(rows) @ sketch.apply_dense(change)[0]).square().sum()))
    added = sum(found) / len(found) - float((flat(rows) @ change_P).square().sum())
    expected = float(flat(rows).square().sum() * change_P.square().sum()) / dim
    assert 0.6 * expected < added < 1.2 * expected


def test_half_precision_is_penalized_in_float32() -> None:
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    anchor = {"weight": model.weight.detach() + 1}
    penalty = EWC([{"weight": torch.full((1, 1, 2), 1e-15)}], [anchor], weight=1e30, low_rank=True).penalty(model)
    assert penalty.dtype == torch.float32
    assert 1.8 < penalty.item() < 2.2


ONE: dict[str, Tensor] = {"weight": torch.ones(1, 2)}
ROWS: dict[str, Tensor] = {"weight": torch.ones(4, 1, 2)}
OTHER: dict[str, Tensor] = {"w": torch.ones(4, 1)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC([sketched(1, IDENTITY)], [values_of(network())], weight=1), "is low-rank: set low_rank=True"),
        (lambda: EWC([ROWS], [ONE], weight=1), r"task 0: 'weight' has the shape \(4, 1, 2\)"),
        (lambda: EWC([{}], [ONE], weight=1, low_rank=True), r"is empty: give the rows \(n, \*shape\)"),
        (
            lambda: EWC([{**ROWS, "bias": torch.ones(3, 1)}], [ONE], weight=1, low_rank=True),
            "every parameter needs the same number of rows",
        ),
        (lambda: EWC([{"weight": ROWS["weight"] / 0}], [ONE], weight=1, low_rank=True), "'weight' must have finite"),
        (
            lambda: EWC(
                [sketched(1, IDENTITY, labels="empirical")], [values_of(network())], weight=1, low_rank=True
            ),
            "task 0: its Fisher was computed with the labels of the data",
        ),
        (
            lambda: EWC([ROWS, OTHER], [ONE, {"w": torch.ones(1)}], weight=1, low_rank=True, mode="online"),
            "task 0: 'weight' has no Fisher in the last task",
        ),
        (lambda: LowRankFisher({}, sketched(1, IDENTITY).linear_map), "its rows or their moments"),
        (
            lambda: EWC([ROWS], [ONE], weight=1, low_rank=True).penalty(nn.Linear(3, 1)),
            r"'weight' has the shape \(1, 2\), and the parameter has \(1, 3\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_rows_of_another_model_are_refused(tmp_path: Path) -> None:
    model = network()
    metadata = {"labels": "exact", "model_fingerprint": model_fingerprint(model, select_parameters(model))}
    save_file(rows_of(1), tmp_path / "rows.safetensors", metadata)
    path = tmp_path / "rows.safetensors"
    assert EWC([path], [values_of(model)], weight=1, low_rank=True).penalty(model).item() == 0
    with pytest.raises(TrainingError, match="the anchors are not the parameters at which its Fisher was"):
        EWC([path], [values_of(network(1))], weight=1, low_rank=True).penalty(model)
