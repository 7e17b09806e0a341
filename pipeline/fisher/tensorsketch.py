"""The hash functions of a tensor sketch, and the same sketch of an outer product computed two ways.

Entry (o, i) of a parameter, seen as a matrix, is added to bucket (h_out[o] + h_in[i]) mod D with sign s_out[o] s_in[i].
The sketch of u ⊗ v is then the circular convolution of the count sketches of u and v: the product of their Fourier
transforms. (N. Pham & R. Pagh, Fast and scalable polynomial kernels via explicit feature maps, KDD 2013.)

Legend: B batch, R rank, T positions, G groups, o outputs and i inputs of a group, D sketch, F = D // 2 + 1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.fisher.contributions import Contribution, Outer, Rows, blocks, cached_elements, flat_blocks

# measured on one CPU core, in nanoseconds: a multiply-add within a matrix product, a number scattered into its bucket,
# a number of a real Fourier transform per doubling of its length, a complex product accumulated
_MULTIPLY_NS, _SCATTER_NS, _FFT_NS, _PRODUCT_NS = 0.025, 1.2, 0.13, 0.5


@dataclass(frozen=True)
class Hashes:
    """Buckets and signs of the rows and columns of one parameter."""

    out_buckets: Tensor
    out_signs: Tensor
    in_buckets: Tensor
    in_signs: Tensor
    dim: int

    @classmethod
    def draw(cls, seed: int, name: str, shape: tuple[int, ...], dim: int) -> Hashes:
        """Hashes of parameter `name`, from (seed, name) and nothing else: the raw bits of a counter-based generator."""
        n_out = shape[0] if shape else 1
        n_in = math.prod(shape[1:])
        key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
        bits = np.random.Philox(key=key).random_raw(n_out + n_in)
        buckets = torch.from_numpy(((bits >> np.uint64(1)) % np.uint64(dim)).astype(np.int64))
        signs = torch.from_numpy(1 - 2 * (bits & np.uint64(1)).astype(np.int8))
        return cls(buckets[:n_out], signs[:n_out], buckets[n_out:], signs[n_out:], dim)

    def to(self, device: torch.device) -> Hashes:
        out = self.out_buckets.to(device), self.out_signs.to(device)
        return Hashes(*out, self.in_buckets.to(device), self.in_signs.to(device), self.dim)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Bucket and sign of every entry of the parameter, flat."""
        buckets = (self.out_buckets[:, None] + self.in_buckets).remainder_(self.dim)
        return buckets.flatten(), (self.out_signs[:, None] * self.in_signs).flatten()


def count_sketch(values: Tensor, buckets: Tensor, signs: Tensor, dim: int) -> Tensor:
    """(…, n) -> (…, dim): each of the last axis's entries, with its sign, added to its bucket."""
    sketch = values.new_zeros(*values.shape[:-1], dim)
    return sketch.scatter_add_(-1, buckets.expand(values.shape), values * signs)


def scatter(contribution: Contribution, hashes: Hashes, out_BRD: Tensor) -> None:
    """Add the sketch of the rows to `out_BRD`, entry by entry. An embedding's rows are never formed."""
    if isinstance(contribution, Rows):
        _scatter_rows(contribution, hashes, out_BRD)
        return
    buckets, signs = hashes.matrix()
    signed = _signed(contribution, hashes) if isinstance(contribution, Outer) else None
    for start, stop, rows in flat_blocks(signed or contribution):
        values = rows * signs if signed is None else rows
        out_BRD[start:stop].scatter_add_(2, buckets.expand(rows.shape), values)


def _signed(outer: Outer, hashes: Hashes) -> Outer:
    """With the signs in the factors, which are much smaller than the rows."""
    G, o = outer.deltas_BGTRo.shape[1], outer.deltas_BGTRo.shape[-1]
    delta_signs, input_signs = hashes.out_signs, hashes.in_signs
    if outer.inputs_first:
        delta_signs, input_signs = input_signs, delta_signs
    deltas_BGTRo = outer.deltas_BGTRo * delta_signs.view(G, 1, 1, o)
    return Outer(deltas_BGTRo, outer.inputs_BGTi * input_signs, outer.shape, outer.inputs_first)


def _scatter_rows(rows: Rows, hashes: Hashes, out_BRD: Tensor) -> None:
    for start, stop, part in blocks(rows, 2 * rows.deltas_BTRi[0].numel(), cached_elements(out_BRD.device)):
        places_BT = part.indices_BT
        buckets_BTi = (hashes.out_buckets[places_BT][..., None] + hashes.in_buckets).remainder_(hashes.dim)
        signs_BTi = hashes.out_signs[places_BT][..., None] * hashes.in_signs
        values_BRTi = (part.deltas_BTRi * signs_BTi[:, :, None]).transpose(1, 2)
        buckets_BRTi = buckets_BTi[:, None].expand(values_BRTi.shape)
        out_BRD[start:stop].scatter_add_(2, buckets_BRTi.flatten(2), values_BRTi.flatten(2))


def fourier(outer: Outer, hashes: Hashes, out_BRF: Tensor) -> None:
    """Add the Fourier transform of the sketch of the rows to `out_BRF`; the rows are never formed.

    Positions of an example at which all its deltas are zero are skipped.
    """
    G, o = outer.deltas_BGTRo.shape[1], outer.deltas_BGTRo.shape[-1]
    delta_tables, input_tables = (hashes.out_buckets, hashes.out_signs), (hashes.in_buckets, hashes.in_signs)
    if outer.inputs_first:
        delta_tables, input_tables = input_tables, delta_tables
    block = max(1, cached_elements(out_BRF.device) // ((outer.rank + 1) * hashes.dim))
    # adding real numbers is several times faster than adding complex ones
    out_Bn = torch.view_as_real(out_BRF).flatten(1)
    for group in range(G):
        buckets, signs = (table[group * o : (group + 1) * o] for table in delta_tables)
        live_n2 = outer.deltas_BGTRo[:, group].ne(0).any(dim=3).any(dim=2).nonzero()
        for start in range(0, len(live_n2), block):
            examples, positions = live_n2[start : start + block].T
            deltas_nRo = outer.deltas_BGTRo[examples, group, positions]
            inputs_ni = outer.inputs_BGTi[examples, group, positions]
            products_nRF = torch.fft.rfft(count_sketch(deltas_nRo, buckets, signs, hashes.dim))
            products_nRF *= torch.fft.rfft(count_sketch(inputs_ni, *input_tables, hashes.dim))[:, None]
            out_Bn.index_add_(0, examples, torch.view_as_real(products_nRF).flatten(1))


def fourier_is_cheaper(outer: Outer, dim: int) -> bool:
    """Cost rule between `fourier` and `scatter`, in time per example."""
    B, G, T, R, o = outer.deltas_BGTRo.shape
    i = outer.inputs_BGTi.shape[-1]
    live = int(outer.deltas_BGTRo.ne(0).any(dim=4).any(dim=3).sum()) / B
    entries = R * G * o * i
    scattering = entries * (T * _MULTIPLY_NS + _SCATTER_NS)
    transform = dim * math.log2(dim) * _FFT_NS if dim > 1 else 0.0
    sketching = live * (R * (o * _SCATTER_NS + transform + dim / 2 * _PRODUCT_NS) + i * _SCATTER_NS + transform)
    return sketching < scattering
