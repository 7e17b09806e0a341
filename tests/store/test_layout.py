from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from npeff.store.layout import MIN_CHUNK_BYTES, ShardPlan, inner_chunk_examples

sizes = st.integers(1, 5000)


@settings(deadline=None)
@given(sizes, sizes)
def test_shards_partition_the_examples_in_order(n_examples: int, shard_size: int) -> None:
    plan = ShardPlan(n_examples, shard_size)
    assert [example for start, stop in plan for example in range(start, stop)] == list(range(n_examples))
    assert len(plan) == plan.n_shards == len(list(plan))


@settings(deadline=None)
@given(sizes, sizes)
def test_all_shards_are_full_but_perhaps_the_last(n_examples: int, shard_size: int) -> None:
    lengths = [stop - start for start, stop in ShardPlan(n_examples, shard_size)]
    assert all(length == shard_size for length in lengths[:-1])
    assert 1 <= lengths[-1] <= shard_size


@settings(deadline=None)
@given(sizes, sizes)
def test_a_shard_outside_the_plan_is_refused(n_examples: int, shard_size: int) -> None:
    plan = ShardPlan(n_examples, shard_size)
    for shard in (-1, plan.n_shards):
        with pytest.raises(IndexError, match=f"shard {shard} "):
            plan.bounds(shard)


@pytest.mark.parametrize(("n_examples", "shard_size"), [(0, 1), (1, 0), (-3, 2)])
def test_empty_plans_are_refused(n_examples: int, shard_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ShardPlan(n_examples, shard_size)


@settings(deadline=None)
@given(sizes, st.integers(1, 4 * MIN_CHUNK_BYTES))
def test_inner_chunks_divide_the_shard(shard_size: int, bytes_per_example: int) -> None:
    assert shard_size % inner_chunk_examples(shard_size, bytes_per_example) == 0


@settings(deadline=None)
@given(sizes, st.integers(1, 4 * MIN_CHUNK_BYTES))
def test_inner_chunks_are_the_smallest_that_are_large_enough(shard_size: int, bytes_per_example: int) -> None:
    chunk = inner_chunk_examples(shard_size, bytes_per_example)
    assert chunk * bytes_per_example >= MIN_CHUNK_BYTES or chunk == shard_size
    smaller = [divisor for divisor in range(1, chunk) if shard_size % divisor == 0]
    assert all(divisor * bytes_per_example < MIN_CHUNK_BYTES for divisor in smaller)


@pytest.mark.parametrize(("shard_size", "bytes_per_example"), [(0, 1), (1, 0)])
def test_chunks_of_nothing_are_refused(shard_size: int, bytes_per_example: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        inner_chunk_examples(shard_size, bytes_per_example)
