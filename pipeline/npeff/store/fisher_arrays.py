"""The arrays of a Fisher store: names, shapes of one example's entry, types and fill values.

    factors          (N, R, D)  float16, float32, or bfloat16 as a uint16 view   Â_i = A_i / sqrt(‖F_i‖_F), sketched
    frobenius_norms  (N,)       float64                                         ‖F_i‖_F, exact
    grams            (N, R, R)  float64                                         A_i A_iᵀ, exact
    ranks            (N,)       int32                                           rows of A_i in use
    kept_trace       (N,)       float64                                         fraction of trace(S) they cover, or NaN
    losses           (N,)       float32                                         mean of -log p(label), NaN if unknown
    logits           (N, C)     float32                                         if an example is one prediction
    labels           (N,)       int64
    valid            (N,)       bool                                            False: not finite, left out

and, if requested, these arrays of the diagonals f_i of the F_i, which are exact for every sketch:

    diagonal_norms    (N,)    float64  ‖f_i‖₂
    diagonal_values   (N, k)  float32  the largest entries of f_i / ‖f_i‖₂, descending, then zeros
    diagonal_indices  (N, k)  int64    their positions in the flat parameter vector
    grouped_diagonal  (N, Q)  float32  sums of f_i / ‖f_i‖₂ over groups of entries

Legend: N examples, R rank, C classes, D sketch dimension, k largest entries, Q groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from npeff.storage.bfloat16 import NAN_BITS
from npeff.store.layout import inner_chunk_examples

StoreDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class ArraySpec:
    """Shape, type and fill value of an array."""

    tail: tuple[int, ...]
    """Shape of one example's entry."""
    dtype: str
    fill: float | int | bool

    @property
    def example_bytes(self) -> int:
        return int(np.prod(self.tail, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def array_specs(
    rank: int,
    dim: int,
    n_classes: int,
    store_dtype: StoreDtype,
    with_logits: bool,
    top_entries: int | None = None,
    n_groups: int | None = None,
) -> dict[str, ArraySpec]:
    """Return the arrays of a store with these sizes and options."""
    bits = ArraySpec((rank, dim), "uint16", NAN_BITS)
    specs = {
        "factors": bits if store_dtype == "bfloat16" else ArraySpec((rank, dim), store_dtype, np.nan),
        "frobenius_norms": ArraySpec((), "float64", np.nan),
        "grams": ArraySpec((rank, rank), "float64", np.nan),
        "ranks": ArraySpec((), "int32", -1),
        "kept_trace": ArraySpec((), "float64", np.nan),
        "losses": ArraySpec((), "float32", np.nan),
        "logits": ArraySpec((n_classes,), "float32", np.nan),
        "labels": ArraySpec((), "int64", np.iinfo(np.int64).min),
        "valid": ArraySpec((), "bool", False),
    }
    if not with_logits:
        del specs["logits"]
    if top_entries is not None or n_groups is not None:
        specs["diagonal_norms"] = ArraySpec((), "float64", np.nan)
    if top_entries is not None:
        specs["diagonal_values"] = ArraySpec((top_entries,), "float32", np.nan)
        specs["diagonal_indices"] = ArraySpec((top_entries,), "int64", -1)
    if n_groups is not None:
        specs["grouped_diagonal"] = ArraySpec((n_groups,), "float32", np.nan)
    return specs


def specs_of(attrs: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Return the array specifications of the store with these attributes."""
    return array_specs(
        attrs["rank"],
        attrs["dim"],
        attrs["n_classes"],
        attrs["store_dtype"],
        attrs["with_logits"],
        attrs.get("top_entries"),
        attrs.get("n_groups"),
    )


ARRAY_NAMES = tuple(array_specs(1, 1, 1, "float32", with_logits=True))
"""Arrays of a store with logits and without diagonals. `FisherStore.array_names` are the arrays of a given store."""


def fisher_store_bytes(*, n_examples: int, shard_size: int, **sizes: Any) -> int:
    """Return the size in bytes of a store on disk, without indexes. The sizes are those of `FisherStore.create`."""
    rows = min(shard_size, n_examples)
    full, rest = divmod(n_examples, rows)
    total = 0
    for spec in array_specs(**sizes).values():
        chunk = inner_chunk_examples(rows, spec.example_bytes)
        total += (full * rows + -(-rest // chunk) * chunk) * spec.example_bytes  # the last chunk has full size
    return total
