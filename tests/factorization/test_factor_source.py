"""Factors from memory, in half precision, and streamed: the same blocks, the same bits."""

from __future__ import annotations

import threading

import pytest
import torch
from npeff.factorization import ExampleShard, FactorsInMemory, InvalidProblemError, StreamedFactors, factor_source
from npeff.factorization.half_products import product
from torch import Tensor

SIZES = (7, 0, 12, 5)


def parts(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 10, generator=g) / 5).to(dtype) for n in SIZES]


def streamed(of: list[Tensor], threads: list[str] | None = None) -> StreamedFactors:
    def read(part: int) -> Tensor:
        if threads is not None:
            threads.append(threading.current_thread().name)
        return of[part].clone()

    return StreamedFactors(SIZES, read, rank=3, dim=10, dtype=of[0].dtype, device=torch.device("cpu"))


def components() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(40, 10, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streamed_and_half_precision_factors_give_the_bits_of_float32_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(factor_source.BLOCK_ROWS, "cpu", 15)
    stored, h_KD = parts(dtype), components()
    expected = ExampleShard(FactorsInMemory([part.float() for part in stored]))
    for source in (FactorsInMemory(stored), streamed(stored)):
        shard = ExampleShard(source)
        assert shard.coefficients_NK.dtype == torch.float32
        assert torch.equal(shard.fisher_squares_N, expected.fisher_squares_N)
        for method in ("accumulate", "accumulate", "finish"):
            packed = getattr(ExampleShard(expected.source, shard.coefficients_NK), method)(h_KD).pack()
            assert torch.equal(getattr(shard, method)(h_KD).pack(), packed)
        fresh = ExampleShard(expected.source)
        fresh.finish(h_KD)
        shard.finish(h_KD)
        assert torch.equal(shard.candidates(h_KD).pack(), fresh.candidates(h_KD).pack())


def test_blocks_are_in_order_no_larger_than_asked_for_and_rows_are_found_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(factor_source.BLOCK_ROWS, "cpu", 15)
    stored = parts(torch.float32)
    whole, chosen = torch.cat(stored), torch.tensor([23, 0, 7, 6, 18, 19])
    for source in (FactorsInMemory(stored), streamed(stored), FactorsInMemory([whole])):
        blocks = list(source.blocks())
        assert max(map(len, blocks)) == 5
        assert torch.equal(torch.cat(blocks), whole)
        assert torch.equal(source.rows(chosen), whole[chosen])


def test_a_part_is_read_by_another_thread_and_once_in_a_pass() -> None:
    threads: list[str] = []
    assert sum(map(len, streamed(parts(torch.float32), threads).blocks())) == sum(SIZES)
    assert len(threads) == len(SIZES)
    assert all(name.startswith("reader") for name in threads)


def test_what_reading_raises_comes_through() -> None:
    def read(part: int) -> Tensor:
        if part == 2:
            raise OSError("the disk is gone")
        return torch.zeros(SIZES[part], 3, 10)

    source = StreamedFactors(SIZES, read, rank=3, dim=10, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(OSError, match="the disk is gone"):
        list(source.blocks())


def test_streamed_factors_that_are_not_finite_are_refused() -> None:
    stored = parts(torch.float16)
    stored[2][3, 0, 0] = float("inf")
    with pytest.raises(InvalidProblemError, match="first is example 10"):
        ExampleShard(streamed(stored))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-6), (torch.bfloat16, 3e-5)])
def test_a_product_with_half_precision_loses_little_of_the_other_factor(dtype: torch.dtype, error: float) -> None:
    g = torch.Generator().manual_seed(0)
    left = torch.randn(6, 400, generator=g) / 60
    right = (torch.randn(400, 9, generator=g) / 60).to(dtype)
    exact = left.double() @ right.double()
    assert (product(left, right) - exact).abs().max() < error * exact.abs().max()
    assert (left.to(dtype).double() @ right.double() - exact).abs().max() > 20 * error * exact.abs().max()
