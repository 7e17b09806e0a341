from __future__ import annotations

from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from gradients import fisher_models as models
from gradients.routed_rows import routed
from npeff.execution.serial import SerialExecutor
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, ParameterLayout, select_parameters
from npeff.gradients.outer import Outer
from npeff.options.bounds import OptionError
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import one_line
from npeff.runs.directory import RunDirectory
from npeff.sketches import SketchSpec, make_sketch
from npeff.sketches.tensorsketch import Hashes, fourier_is_cheaper, window_width
from npeff.store.fisher_store import FisherStore
from pydantic import ValidationError
from torch import Tensor


def collected(name: str, dtype: torch.dtype = torch.float64) -> tuple[ParameterLayout, Any]:
    case = models.make(name, dtype)
    layout = select_parameters(case.model)
    collector = GradientCollector(case.model, case.logits_fn, layout)
    return layout, collector.collect(case.batch(range(6))).contributions


def explicit_matrix(layout: ParameterLayout, dim: int, seed: int) -> Tensor:
    """Q (D, P), entry by entry from the definition."""
    matrix = torch.zeros(dim, layout.size, dtype=torch.float64)
    for name, size, offset in zip(layout.names, layout.matrices, layout.offsets, strict=True):
        hashes = Hashes.draw(seed, name, size, dim, window_width(dim, layout.names))
        n_in = len(hashes.columns.buckets)
        for o in range(len(hashes.rows.buckets)):
            for i in range(n_in):
                bucket = hashes.start + int(hashes.rows.buckets[o] + hashes.columns.buckets[i]) % hashes.width
                matrix[bucket, offset + o * n_in + i] = float(hashes.rows.signs[o] * hashes.columns.signs[i])
    return matrix


@pytest.mark.parametrize("dim", [1, 31, 64, 1024])
@pytest.mark.parametrize("name", models.NAMES)
def test_fourier_and_scatter_are_the_explicit_matrix(name: str, dim: int) -> None:
    layout, contributions = collected(name)
    rows = make_sketch(SketchSpec("identity"), layout, 0).apply(contributions)
    expected = rows @ explicit_matrix(layout, dim, seed=5).T
    sketch = make_sketch(SketchSpec("tensorsketch", dim), layout, 5)
    assert sketch.dim == dim
    scale = float(expected.abs().max())
    for method in ("fft", "scatter", "auto"):
        torch.testing.assert_close(sketch.apply(contributions, method), expected, rtol=0, atol=1e-14 * scale)
    vectors = {
        layout_name: rows[0, :, offset : offset + size].unflatten(1, shape) if shape else rows[0, :, offset]
        for layout_name, shape, offset, size in zip(
            layout.names, layout.shapes, layout.offsets, layout.sizes, strict=True
        )
    }
    torch.testing.assert_close(sketch.apply_dense(vectors), expected[0], rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("dim", [1, 31, 1024])
def test_the_sketch_of_a_stack_of_matrices_is_that_of_one_matrix_with_all_rows(dim: int, inputs_first: bool) -> None:
    torch.manual_seed(0)
    part = routed(inputs_first=inputs_first)
    layout = ParameterLayout(("mlp.experts.up",), (part.shape,), ("mlp.experts.up",))
    expected = part.dense().flatten(2) @ explicit_matrix(layout, dim, seed=5).T
    sketch = make_sketch(SketchSpec("tensorsketch", dim), layout, 5)
    for method in ("fft", "scatter", "auto"):
        torch.testing.assert_close(sketch.apply({"mlp.experts.up": part}, method), expected, rtol=0, atol=1e-12)


def test_fourier_and_scatter_agree_in_float32() -> None:
    layout, contributions = collected("tied encoder", torch.float32)
    sketch = make_sketch(SketchSpec("tensorsketch", 1024), layout, 0)
    scattered, transformed = sketch.apply(contributions, "scatter"), sketch.apply(contributions, "fft")
    assert scattered.dtype == torch.float32
    assert float((scattered - transformed).norm() / scattered.norm()) < 5e-7


@pytest.mark.slow
def test_inner_products_are_unbiased_over_seeds_and_as_accurate_as_their_dimension_allows() -> None:
    layout, contributions = collected("tied encoder")
    rows = make_sketch(SketchSpec("identity"), layout, 0).apply(contributions).flatten(0, 1)
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows / norms
    exact = rows @ rows.T
    dim, n_seeds = 64, 1500
    errors = []
    for seed in range(n_seeds):
        sketched = make_sketch(SketchSpec("tensorsketch", dim), layout, seed).apply(contributions, "scatter")
        sketched = sketched.flatten(0, 1) / norms
        errors.append(sketched @ sketched.T - exact)
    stacked = torch.stack(errors)
    # a bias of 2% would be more than three standard errors of the mean of the squared norms
    assert float(stacked.diagonal(dim1=1, dim2=2).mean().abs()) < 0.01
    standard_error = stacked.std(0) / n_seeds**0.5
    assert float((stacked.mean(0) / standard_error).abs().max()) < 5.0
    assert float(stacked.square().mean().sqrt()) < 2.5 / dim**0.5


def test_hashes_depend_on_seed_and_names_only() -> None:
    one = Hashes.draw(3, "block.layer.weight", (5, 7), 4096, 1024)
    # pinned: a stored sketch must mean the same with every later version
    assert (one.start, one.width) == (1024, 1024)
    assert one.rows.buckets.tolist() == [393, 521, 57, 795, 718]
    assert one.rows.signs.tolist() == [1, -1, 1, 1, -1]
    assert one.columns.buckets.tolist() == list(range(474, 481))
    assert one.columns.signs.tolist() == [1, 1, 1, 1, 1, -1, 1]
    for seed, name in ((4, "block.layer.weight"), (3, "block.other.weight")):
        assert not torch.equal(one.rows.buckets, Hashes.draw(seed, name, (5, 7), 4096, 1024).rows.buckets)
    assert torch.equal(one.rows.buckets, Hashes.draw(3, "block.layer.weight", (5, 70), 4096, 1024).rows.buckets)
    tall = Hashes.draw(3, "block.layer.weight", (7, 5), 4096, 1024)
    assert tall.rows.buckets.tolist() == list(range(136, 143))
    assert tall.columns.stretches is None


def test_rows_collide_only_where_there_are_more_than_buckets() -> None:
    for n_rows, most in ((64, 1), (65, 2), (300, 5)):
        assert int(Hashes.draw(0, "a.b.weight", (n_rows, 3), 64, 64).rows.buckets.bincount().max()) == most


@pytest.mark.parametrize(
    "other",
    [(0, 3), (3, 0), (70, 6), *(pytest.param(far, marks=pytest.mark.slow) for far in ((1, 1), (70, 0), (70, 64)))],
)
def test_two_entries_meet_as_often_as_by_chance(other: tuple[int, int]) -> None:
    """Not those of one row, or of one column fewer than w rows apart, which never meet."""
    width, seeds = 16, 4000
    met = 0
    for seed in range(seeds):
        buckets = Hashes.draw(seed, "a.b.weight", (71, 65), width, width).matrix()[0].view(71, 65)
        met += int(buckets[other] == buckets[0, 0])
    if other[0] == 0 or other == (3, 0):
        assert met == 0
    else:
        assert met / seeds == pytest.approx(1 / width, abs=4 * (1 / width / seeds) ** 0.5)


def test_windows_are_for_large_sketches_of_many_groups() -> None:
    flat, deep = [f"{i}.weight" for i in range(11)], [f"layer.{i}.query.weight" for i in range(12)]
    assert [window_width(dim, deep) for dim in (512, 1023, 1024, 4096)] == [512, 1023, 256, 1024]
    assert window_width(4096, flat) == window_width(4096, [f"layer.query.{i}" for i in range(50)]) == 4096


def test_windows_of_a_large_sketch_are_all_used() -> None:
    starts = {Hashes.draw(0, f"layer.{i}.linear.weight", (2, 2), 1024, 256).start for i in range(50)}
    assert starts == {0, 256, 512, 768}


def test_layers_of_one_module_share_the_hashes_of_their_inputs() -> None:
    query, key, other = (
        Hashes.draw(0, name, (5, 7), 4096, 1024) for name in ("a.q.weight", "a.k.weight", "b.q.weight")
    )
    assert torch.equal(query.columns.buckets, key.columns.buckets)
    assert torch.equal(query.columns.signs, key.columns.signs)
    assert query.start == key.start
    assert not torch.equal(query.rows.buckets, key.rows.buckets)
    assert not torch.equal(query.columns.buckets, other.columns.buckets)


def test_cost_rule_prefers_the_fourier_way_for_few_positions_of_a_large_layer() -> None:
    def use(positions: int, width: int) -> Outer:
        deltas = (torch.ones(1, 1, positions, width),) * 2
        return Outer(deltas, torch.ones(1, 1, positions, width), (width, width))

    assert fourier_is_cheaper(use(4, 384), 1024)
    assert not fourier_is_cheaper(use(400, 384), 4096)
    assert not fourier_is_cheaper(use(4, 8), 1024)


def test_positions_without_gradient_do_not_change_the_sketch() -> None:
    torch.manual_seed(0)
    deltas, inputs = (torch.randn(3, 1, 6, 4), torch.randn(3, 1, 6, 4)), torch.randn(3, 1, 6, 5)
    for row in deltas:
        row[0, :, 2:] = 0
        row[1] = 0
    layout = ParameterLayout(("w",), ((4, 5),))
    sketch = make_sketch(SketchSpec("tensorsketch", 16), layout, 0)
    garbage = inputs.clone()
    garbage[0, :, 2:] = torch.nan
    expected = sketch.apply({"w": Outer(deltas, inputs, (4, 5))}, "scatter")
    torch.testing.assert_close(sketch.apply({"w": Outer(deltas, garbage, (4, 5))}, "fft"), expected)


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        ({"kind": "kronecker"}, "the kronecker sketch needs a size: set, for example, size: 16"),
        ({"kind": "topk"}, "the topk sketch needs a size: set, for example, size: 16384"),
        ({"kind": "kronecker", "size": 16, "dim": 3}, "the kronecker sketch takes a size and no dim: remove dim"),
        ({"kind": "topk", "size": 16, "dim": 3}, "the topk sketch takes a size and no dim: remove dim"),
        ({"kind": "identity", "dim": 8}, "the identity sketch keeps every coordinate and takes no dim: remove dim"),
        (
            {"kind": "identity", "size": 16},
            "the identity sketch takes no size: remove size, or set kind to kronecker or topk",
        ),
        ({"size": 16}, "the tensorsketch sketch takes no size: remove size, or set kind to kronecker or topk"),
    ],
)
def test_a_sketch_that_makes_no_sense_is_refused_alike_by_the_library_and_the_run_file(
    sketch: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        SketchSpec(**sketch)
    assert str(caught.value) == message
    assert refused(sketch) == f"fishers.sketch: {message}"


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        ({"dim": 0}, "dim must be greater than 0, not 0"),
        ({"kind": "kronecker", "size": 0}, "size must be greater than 0, not 0"),
        ({"kind": "topk", "size": -3}, "size must be greater than 0, not -3"),
    ],
)
def test_a_size_that_is_not_positive_is_refused_with_its_key(sketch: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        SketchSpec(**sketch)
    assert str(caught.value) == message
    assert refused(sketch) == f"fishers.sketch.{message}"


def refused(sketch: dict[str, Any]) -> str:
    """The line that a run file with this sketch ends in."""
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(
            {
                "run_dir": "x",
                "task": {"name": "digits"},
                "factorization": {"n_components": 1},
                "fishers": {"sketch": sketch},
            }
        )
    return one_line(caught.value, RunConfig)


def test_an_unknown_kind_of_sketch_is_refused() -> None:
    with pytest.raises(OptionError, match="the sketch kind must be one of identity, tensorsketch, kronecker, topk"):
        SketchSpec("fourier")  # type: ignore[arg-type]


def test_a_tensorsketch_has_4096_coordinates_unless_told_otherwise() -> None:
    assert SketchSpec() == SketchSpec("tensorsketch", 4096)
    assert SketchSpec("identity").dim is None


@pytest.mark.parametrize("spec", [SketchSpec("tensorsketch", 64), SketchSpec("kronecker", size=16)])
def test_spec_survives_json(spec: SketchSpec) -> None:
    stored = spec.to_json(seed=7)
    assert stored.pop("seed") == 7
    assert SketchSpec(**stored) == spec


def test_sketched_fishers_have_the_exact_norms() -> None:
    case = models.make("cnn")
    layout = select_parameters(case.model)
    exact, *sketched = (
        PerExampleFishers(case.model, case.logits_fn, layout, make_sketch(spec, layout, 0))(case.batch(range(4)))
        for spec in (
            SketchSpec("identity"),
            SketchSpec("tensorsketch", 16),
            SketchSpec("kronecker", size=3),
            SketchSpec("topk", size=20),
        )
    )
    for found in sketched:
        assert torch.equal(found.grams_BRR, exact.grams_BRR)
    assert [found.factors_BRD.shape[2] < layout.size for found in sketched] == [True, True, False]
    assert sketched[0].factors_BRD.shape == (4, 2, 16)


@pytest.mark.parametrize("name", models.NAMES)
def test_topk_keeps_the_largest_entries_of_each_example_and_zeros_elsewhere(name: str) -> None:
    layout, contributions = collected(name)
    rows = make_sketch(SketchSpec("identity"), layout, 0).apply(contributions)
    sketch = make_sketch(SketchSpec("topk", size=25), layout, 0)
    found = sketch.apply(contributions)
    assert sketch.dim == layout.size
    for mine, all_rows in zip(found, rows, strict=True):
        kept = mine != 0
        assert int(kept.sum()) == 25
        assert torch.equal(mine[kept], all_rows[kept])
        assert float(all_rows[kept].abs().min()) >= float(all_rows[~kept].abs().max())
    everything = make_sketch(SketchSpec("topk", size=10**9), layout, 0)
    assert torch.equal(everything.apply(contributions), rows)


def test_topk_leaves_directions_as_they_are() -> None:
    layout = ParameterLayout(("a", "b", "c"), ((2, 3), (), (4,)))
    a, c = torch.randn(5, 2, 3), torch.randn(5, 4)
    found = make_sketch(SketchSpec("topk", size=1), layout, 0).apply_dense({"c": c, "a": a})
    assert torch.equal(found, torch.cat([a.flatten(1), torch.zeros(5, 1), c], dim=1))


def test_topk_rows_are_not_recombined_and_an_example_that_is_not_finite_disturbs_no_other() -> None:
    case = models.make("cnn")
    layout = select_parameters(case.model)
    whole, largest = (
        PerExampleFishers(case.model, case.logits_fn, layout, make_sketch(spec, layout, 0))
        for spec in (SketchSpec("identity"), SketchSpec("topk", size=30))
    )
    batch = case.batch(range(5))
    rows = whole(batch).factors_BRD
    clean = largest(batch).factors_BRD
    assert clean.ne(0).sum((1, 2)).tolist() == [30] * 5
    assert torch.equal(clean, rows.where(clean != 0, 0))
    batch[2] = torch.nan
    found = largest(batch)
    others = [0, 1, 3, 4]
    assert found.valid_B.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(found.factors_BRD[others], clean[others], rtol=0, atol=1e-12 * float(clean.abs().max()))


@pytest.mark.parametrize(("kind", "size", "cosine"), [("kronecker", 16, 0.995), ("topk", 1000, 0.95)])
def test_a_run_with_a_sketch_for_comparison(tmp_path: Path, kind: str, size: int, cosine: float) -> None:
    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "task": {"name": "digits", "options": {"limit": 30, "epochs": 1}},
            "parameters": {"include": ["2.*", "7.*"]},
            "fishers": {"sketch": {"kind": kind, "size": size}, "shard_size": 15, "store_dtype": "float32"},
            "factorization": {"n_components": 2, "max_iterations": 8},
            "executor": {"kind": "serial"},
        }
    )
    run, executor = RunDirectory.create(config), SerialExecutor()
    fishers = npeff.compute_fishers(run, executor=executor)
    store = FisherStore.open(run.fishers)
    assert store.attrs["sketch"] == {"kind": kind, "dim": None, "seed": 0, "size": size}
    # a convolution (16, 8, 3, 3) and a linear layer (10, 32), with biases
    dims = {"kronecker": 16 * 16 + 16 + 10 * 16 + 10, "topk": 16 * 72 + 16 + 10 * 32 + 10}
    assert fishers["sketch_dim"] == store.dim == dims[kind]
    factors = np.concatenate([store.read_shard(shard)["factors"] for shard in range(2)])
    grams = np.concatenate([store.read_shard(shard)["grams"] for shard in range(2)])
    norms = np.linalg.norm(grams, axis=(1, 2))[:, None, None]
    stored = factors @ factors.transpose(0, 2, 1)
    if kind == "kronecker":
        np.testing.assert_allclose(stored, grams / norms, atol=1e-4)
    else:
        assert (np.count_nonzero(factors, axis=(1, 2)) == size).all()
        assert (np.linalg.norm(stored, axis=(1, 2)) < 1).all()
    assert 0 < npeff.factorize(run, executor=executor)["explained"] < 1
    assert npeff.lift(run, executor=executor)["median_cosine"] > cosine
