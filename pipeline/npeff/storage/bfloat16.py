"""Conversion between float32 and bfloat16 stored as uint16, since neither numpy nor Zarr has a bfloat16 type."""

from __future__ import annotations

import numpy as np

NAN_BITS = 0x7FC0


def encode_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest bfloat16, ties to even, and return the 16 bits as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    # rounding the bits of a NaN may turn it into infinity or zero
    return np.where(np.isnan(values), np.uint16(NAN_BITS), rounded)


def decode_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the exact float32 values of bfloat16 numbers stored as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
