"""The covariance of inputs, its factors, and draws from it, against dense definitions in float64."""

import numpy as np
import pytest
import torch
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import Moments, merged
from npeff.input_fisher.noise import InputCovarianceError, InputNoise, factor_covariance

KINDS = ("full", "kronecker", "diagonal", "isotropic")


def flat(values, used=None, exchangeable=False):
    used = torch.ones(values.shape[:2], dtype=torch.bool) if used is None else used
    return FlatInputs(values, lambda v: v.flatten(1), used, exchangeable)


def values(n=40, positions=3, features=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(positions * features, positions * features, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, positions * features, generator=generator, dtype=torch.float64) @ mixing + 100
    return rows.view(n, positions, features)


def dense(kind, x):
    """The covariance (D, D) of values (N, P, F) by its definition, without a ridge."""
    rows = x.flatten(1).numpy()
    covariance = np.cov(rows, rowvar=False)
    positions, features = x.shape[1:]
    if kind == "kronecker":
        blocks = covariance.reshape(positions, features, positions, features)
        return np.kron(np.einsum("afbf->ab", blocks), np.einsum("paqa->pq", blocks.transpose(1, 0, 3, 2))) / np.trace(
            covariance
        )
    if kind == "diagonal":
        return np.diag(np.diag(covariance))
    if kind == "isotropic":
        return np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
    return covariance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 7])
def test_moments_merge_to_the_covariance_and_the_noise_applies_it(kind, parts):
    x = values()
    moments = merged(Moments.of(flat(part), kind) for part in x.tensor_split(parts))
    assert moments.n == len(x)
    torch.testing.assert_close(moments.mean_PF, x.mean(0), rtol=1e-12, atol=0)
    noise = InputNoise(moments.mean_PF, factor_covariance(moments, kind, 0.0), spread=0.3)
    g = values(5, seed=1)
    used = torch.ones(5, 3, dtype=torch.bool)
    expected = 0.3 * g.flatten(1) @ torch.from_numpy(dense(kind, x))
    torch.testing.assert_close(noise.times(g, used).flatten(1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_conditional_variance_is_that_of_the_dense_gaussian(kind):
    x = values()
    moments = Moments.of(flat(x), kind)
    noise = InputNoise(moments.mean_PF, factor_covariance(moments, kind, 0.0), spread=0.3)
    covariance = dense(kind, x)
    g = values(5, seed=1)
    found = noise.conditional_times(g, torch.ones(5, 3, dtype=torch.bool))
    for position in range(3):
        mine = np.arange(2) + 2 * position
        rest = np.setdiff1d(np.arange(6), mine)
        across = covariance[np.ix_(mine, rest)]
        block = covariance[np.ix_(mine, mine)] - across @ np.linalg.solve(covariance[np.ix_(rest, rest)], across.T)
        expected = 0.3 * g[:, position] @ torch.from_numpy(block)
        torch.testing.assert_close(found[:, position], expected, rtol=1e-8, atol=1e-8)


def test_draws_have_the_covariance_and_depend_only_on_seed_example_and_draw():
    x = values()
    moments = Moments.of(flat(x), "full")
    noise = InputNoise(moments.mean_PF, factor_covariance(moments, "full", 0.0), spread=0.5, seed=3)
    some = flat(values(4))
    rows = torch.cat([noise.draw(some, [5, 6, 7, 8], draw) for draw in range(1500)]).flatten(1)
    covariance = 0.5 * dense("full", x)
    error = np.cov(rows.numpy(), rowvar=False) - covariance
    scales = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) * 2 / len(rows))
    assert np.abs(error / scales).max() < 5
    again = noise.draw(flat(values(2)), [8, 5], 2)
    torch.testing.assert_close(again, noise.draw(some, [5, 6, 7, 8], 2)[[3, 0]], rtol=1e-12, atol=0)
    other = InputNoise(moments.mean_PF, noise.factors, spread=0.5, seed=4)
    assert not torch.equal(other.draw(some, [5, 6, 7, 8], 0), noise.draw(some, [5, 6, 7, 8], 0))


def test_exchangeable_positions_have_one_covariance_and_padding_changes_nothing():
    x = values(30, positions=4)
    used = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    moments = Moments.of(flat(x, used, True), "full")
    expected = torch.from_numpy(np.cov(x[used].numpy(), rowvar=False))
    factors = factor_covariance(moments, "full", 0.0)
    torch.testing.assert_close(factors["joint"] @ factors["joint"].T, expected, rtol=1e-9, atol=1e-9)
    noise = InputNoise(moments.mean_PF, factors, spread=1.0)
    short = flat(x[:2, :3], torch.tensor([[False, True, True], [True, True, False]]), True)
    long = torch.nn.functional.pad(short.used_BP, (0, 2))
    padded = flat(torch.nn.functional.pad(short.values_BPF, (0, 0, 0, 2)), long, True)
    drawn = noise.draw(padded, [3, 9], 1)
    assert torch.equal(drawn[:, :3], noise.draw(short, [3, 9], 1))
    assert not drawn[~long].any()
    assert not noise.times(torch.ones_like(padded.values_BPF), long)[~long].any()


def test_the_ridge_is_a_fraction_of_each_variance():
    x = values(4)  # fewer samples than entries
    moments = Moments.of(flat(x), "full")
    with pytest.raises(InputCovarianceError, match="raise inputs"):
        factor_covariance(moments, "full", 0.0)
    factor = factor_covariance(moments, "full", 1e-3)["joint"]
    covariance = dense("full", x)
    expected = covariance + 1e-3 * np.diag(np.diag(covariance))
    np.testing.assert_allclose((factor @ factor.T).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_other_units_and_constant_inputs_change_nothing_else(kind):
    x, g = values(), values(5, seed=1)
    used = torch.ones(5, 3, dtype=torch.bool)
    units = torch.tensor([1e-5, 1e4], dtype=torch.float64)  # of the two features

    def noise_of(rows):
        moments = Moments.of(flat(rows), kind)
        return InputNoise(moments.mean_PF, factor_covariance(moments, kind, 1e-4), spread=0.3)

    plain, other = noise_of(x), noise_of(x * units)
    drawn = plain.draw(flat(g), range(5), 0)
    torch.testing.assert_close(other.draw(flat(g), range(5), 0), drawn * units, rtol=1e-9, atol=0)
    for method in ("times", "conditional_times"):
        mine, theirs = (getattr(each, method)(gradient, used) for each, gradient in ((plain, g), (other, g / units)))
        torch.testing.assert_close(theirs, mine * units, rtol=1e-8, atol=0)
    x[:, 1, 0] = 3.0
    constant = noise_of(x)
    for found in (constant.draw(flat(g), range(5), 0), *(constant.conditional_times(g, used), constant.times(g, used))):
        assert not found[:, 1, 0].any()
    rest = [0, 1, 3, 4, 5]
    block = torch.from_numpy(dense(kind, x)[np.ix_(rest, rest)])
    block = block + 1e-4 * block.diagonal().diag()
    torch.testing.assert_close(
        constant.times(g, used).flatten(1)[:, rest], 0.3 * g.flatten(1)[:, rest] @ block, rtol=1e-9, atol=1e-9
    )


def test_constant_inputs_and_single_samples_are_refused():
    with pytest.raises(InputCovarianceError, match="constant"):
        factor_covariance(Moments.of(flat(torch.ones(4, 2, 1)), "diagonal"), "diagonal", 1e-4)
    with pytest.raises(InputCovarianceError, match="at least 2"):
        factor_covariance(Moments.of(flat(torch.ones(1, 2, 1)), "diagonal"), "diagonal", 1e-4)
