from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from npeff.storage.bfloat16 import decode_bfloat16, encode_bfloat16


def test_every_bfloat16_survives_a_round_trip() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = decode_bfloat16(bits)
    nan = np.isnan(values)
    np.testing.assert_array_equal(encode_bfloat16(values)[~nan], bits[~nan])
    assert np.isnan(decode_bfloat16(encode_bfloat16(values[nan]))).all()


@given(st.floats(width=32, allow_nan=False, min_value=-(2.0**126), max_value=2.0**126))
def test_encoding_rounds_to_the_nearest_and_ties_to_even(value: float) -> None:
    encoded = encode_bfloat16(np.array([value], dtype=np.float32))
    below = np.array([value], dtype=np.float32).view(np.uint32) >> 16
    candidates = np.concatenate([below, below + 1]).astype(np.uint16)
    errors = np.abs(decode_bfloat16(candidates).astype(np.float64) - value)
    nearest = candidates[errors == errors.min()]
    expected = nearest[nearest % 2 == 0] if len(nearest) == 2 else nearest
    np.testing.assert_array_equal(encoded, expected)


def test_every_nan_stays_nan() -> None:
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF80FFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(decode_bfloat16(encode_bfloat16(nans))).all()


def test_numbers_beyond_the_range_become_infinite() -> None:
    largest = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max], dtype=np.float32)
    np.testing.assert_array_equal(decode_bfloat16(encode_bfloat16(largest)), [np.inf, -np.inf])


def test_strided_arrays_are_encoded_by_value() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(decode_bfloat16(encode_bfloat16(values)), values)
