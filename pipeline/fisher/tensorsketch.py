"""The hash functions of a tensor sketch, and the same sketch of an outer product computed two ways.

Entry (o, i) of a parameter, seen as a matrix, is added to bucket (h_out[o] + h_in[i]) mod w of the parameter's window,
w coordinates of the D, with sign s_out[o] s_in[i].
The sketch of u ⊗ v is then the circular convolution of the count sketches of u and v: the product of their Fourier
transforms. (N. Pham & R. Pagh, Fast and scalable polynomial kernels via explicit feature maps, KDD 2013.)

Legend: B batch, R rank, T positions, G groups, o outputs and i inputs of a group, D sketch, w window,
F = w // 2 + 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.fisher.contributions import Contribution, Outer, Rows, blocks, cached_elements, flat_blocks

# measured on one CPU core, in nanoseconds: a multiply-add within a matrix product, a number scattered into its bucket,
# a number of a real Fourier transform per doubling of its length, a complex product accumulated
_MULTIPLY_NS, _SCATTER_NS, _FFT_NS, _PRODUCT_NS = 0.025, 0.8, 0.09, 0.5

WINDOWS, SMALLEST_WINDOWED, FEWEST_GROUPS = 4, 1024, 16


def window_width(dim: int, names: Iterable[str]) -> int:
    """Coordinates that one parameter is sketched to; each group of parameters has its window of that width.

    A quarter of a large sketch of many groups: transforms are several times cheaper, and as every example's gradient is
    spread over the groups the windows fill alike (with its energy split evenly over them the variance is the same).
    """
    windowed = (
        dim % WINDOWS == 0 and dim >= SMALLEST_WINDOWED and len({_group(name) for name in names}) >= FEWEST_GROUPS
    )
    return dim // WINDOWS if windowed else dim


def _group(name: str) -> str:
    """The module that holds the module of parameter `name`."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[0] or module


@dataclass(frozen=True)
class Hashes:
    """Window of a parameter, and buckets in it and signs of its rows and columns.

    Drawn from (seed, name) and nothing else, by a counter-based generator. Parameters of one group (the query, key and
    value of an attention) share the window and the columns' hashes, as if they were one matrix: where they read the
    same inputs they need one transform.
    """

    start: int
    width: int
    out_buckets: Tensor
    out_signs: Tensor
    in_buckets: Tensor
    in_signs: Tensor

    @classmethod
    def draw(cls, seed: int, name: str, shape: tuple[int, ...], dim: int, width: int) -> Hashes:
        """Hashes of parameter `name` in a sketch of `dim` coordinates with windows of `width`."""
        group = _group(name)
        n_in = math.prod(shape[1:])
        window = int(random_bits(f"window:{seed}:{group}", 1)[0] % np.uint64(dim // width))
        out = _buckets_and_signs(f"rows:{seed}:{name}", shape[0] if shape else 1, width)
        return cls(window * width, width, *out, *_buckets_and_signs(f"columns:{seed}:{group}:{n_in}", n_in, width))

    def to(self, device: torch.device) -> Hashes:
        out = self.out_buckets.to(device), self.out_signs.to(device)
        return Hashes(self.start, self.width, *out, self.in_buckets.to(device), self.in_signs.to(device))

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Bucket in the window and sign of every entry of the parameter, flat."""
        buckets = (self.out_buckets[:, None] + self.in_buckets).remainder_(self.width)
        return buckets.flatten(), (self.out_signs[:, None] * self.in_signs).flatten()

    def window(self, out_BRD: Tensor) -> Tensor:
        """The part of the sketch that the parameter goes to, a view."""
        return out_BRD[..., self.start : self.start + self.width]


def random_bits(key: str, count: int) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def _buckets_and_signs(key: str, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Every bucket is given out before any is given out again: rows (or columns) of one parameter collide as little as
    they can, while signs alone make the sketch unbiased."""
    rounds = -(-count // width)
    order = np.argsort(random_bits(f"buckets:{key}", rounds * width).reshape(rounds, width), axis=1, kind="stable")
    signs = 1 - 2 * (random_bits(f"signs:{key}", count) & np.uint64(1)).astype(np.int8)
    return torch.from_numpy(order.ravel()[:count].copy()), torch.from_numpy(signs)


def count_sketch(values: Tensor, buckets: Tensor, signs: Tensor, width: int) -> Tensor:
    """(…, n) -> (…, width): each of the last axis's entries, with its sign, added to its bucket."""
    sketch = values.new_zeros(*values.shape[:-1], width)
    return sketch.scatter_add_(-1, buckets.expand(values.shape), values * signs)


def scatter(contribution: Contribution, hashes: Hashes, out_BRD: Tensor) -> None:
    """Add the sketch of the rows to `out_BRD`, entry by entry. An embedding's rows are never formed."""
    out_BRw = hashes.window(out_BRD)
    if isinstance(contribution, Rows):
        _scatter_rows(contribution, hashes, out_BRw)
        return
    buckets, signs = hashes.matrix()
    signed = _signed(contribution, hashes) if isinstance(contribution, Outer) else None
    for start, stop, rows in flat_blocks(signed or contribution):
        values = rows * signs if signed is None else rows
        out_BRw[start:stop].scatter_add_(2, buckets.expand(rows.shape), values)


def _signed(outer: Outer, hashes: Hashes) -> Outer:
    """With the signs in the factors, which are much smaller than the rows."""
    delta_signs, input_signs = hashes.out_signs, hashes.in_signs
    if outer.inputs_first:
        delta_signs, input_signs = input_signs, delta_signs
    _, G, _, o = outer.deltas[0].shape
    deltas = tuple(deltas_BGTo * delta_signs.view(G, 1, o) for deltas_BGTo in outer.deltas)
    return Outer(deltas, outer.inputs_BGTi * input_signs, outer.shape, outer.inputs_first)


def _scatter_rows(rows: Rows, hashes: Hashes, out_BRw: Tensor) -> None:
    for start, stop, part in blocks(rows, 2 * rows.deltas_BTRi[0].numel(), cached_elements(out_BRw.device)):
        places_BT = part.indices_BT
        buckets_BTi = (hashes.out_buckets[places_BT][..., None] + hashes.in_buckets).remainder_(hashes.width)
        signs_BTi = hashes.out_signs[places_BT][..., None] * hashes.in_signs
        values_BRTi = (part.deltas_BTRi * signs_BTi[:, :, None]).transpose(1, 2)
        buckets_BRTi = buckets_BTi[:, None].expand(values_BRTi.shape)
        out_BRw[start:stop].scatter_add_(2, buckets_BRTi.flatten(2), values_BRTi.flatten(2))


def fourier(outers: Sequence[Outer], hashes: Sequence[Hashes], out_BRF: Tensor) -> None:
    """Add the Fourier transform of the sketch of the rows of layers that read the same inputs; no row is formed.

    `out_BRF` is that of their window. Layers whose columns have the same hashes share all transforms. Positions of an
    example at which all its deltas are zero are skipped.
    """
    first, width = outers[0], hashes[0].width
    sides = [_Sides.of(part, h) for part, h in zip(outers, hashes, strict=True)]
    n_positions = max(1, cached_elements(out_BRF.device) // (3 * width))
    for group in range(first.inputs_BGTi.shape[1]):
        live_BT = outers[0].live_BGT()[:, group]
        for part in outers[1:]:
            live_BT = live_BT | part.live_BGT()[:, group]
        for live in _live_blocks(live_BT, n_positions):
            inputs_ni = live.taken(first.inputs_BGTi[:, group])
            for alike in _alike(sides):
                transformed_nF = torch.fft.rfft(count_sketch(inputs_ni, *sides[alike[0]].inputs, width))
                for row in range(first.rank):
                    sketch_nw = inputs_ni.new_zeros(len(inputs_ni), width)
                    for place in alike:
                        values_no = live.taken(outers[place].deltas[row][:, group])
                        mine = slice(group * values_no.shape[1], (group + 1) * values_no.shape[1])
                        buckets, signs = (table[mine] for table in sides[place].delta)
                        sketch_nw.scatter_add_(1, buckets.expand(values_no.shape), values_no * signs)
                    live.add_to(out_BRF[:, row], torch.fft.rfft(sketch_nw).mul_(transformed_nF))


@dataclass(frozen=True)
class _Sides:
    """Buckets and signs of the outputs' gradients and of the inputs of a layer, whichever way its weight is stored."""

    delta: tuple[Tensor, Tensor]
    inputs: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, outer: Outer, hashes: Hashes) -> _Sides:
        out, columns = (hashes.out_buckets, hashes.out_signs), (hashes.in_buckets, hashes.in_signs)
        return cls(columns, out) if outer.inputs_first else cls(out, columns)


def _alike(sides: Sequence[_Sides]) -> list[list[int]]:
    """Places of layers whose inputs have the same hashes."""
    found: list[list[int]] = []
    for place, side in enumerate(sides):
        for group in found:
            pairs = zip(side.inputs, sides[group[0]].inputs, strict=True)
            if all(torch.equal(mine, theirs) for mine, theirs in pairs):
                group.append(place)
                break
        else:
            found.append([place])
    return found


@dataclass(frozen=True)
class _LiveBlock:
    """Some live positions of some examples; all positions of consecutive examples if `whole`."""

    examples_n: Tensor
    positions_n: Tensor
    whole: slice | None
    n_positions: int

    def taken(self, values_BTx: Tensor) -> Tensor:
        if self.whole is not None:
            return values_BTx[self.whole].flatten(0, 1)
        # several times faster than indexing with both
        return values_BTx.flatten(0, 1).index_select(0, self.examples_n * self.n_positions + self.positions_n)

    def add_to(self, out_BF: Tensor, values_nF: Tensor) -> None:
        if self.whole is not None:
            out_BF[self.whole] += values_nF.unflatten(0, (-1, self.n_positions)).sum(1)
            return
        # adding real numbers is several times faster than adding complex ones
        first, last = int(self.examples_n[0]), int(self.examples_n[-1])
        real = torch.view_as_real(values_nF).flatten(1)
        sums = real.new_zeros(last + 1 - first, real.shape[1]).index_add_(0, self.examples_n - first, real)
        out_BF[first : last + 1] += torch.view_as_complex(sums.unflatten(1, (-1, 2)))


def _live_blocks(live_BT: Tensor, size: int) -> Iterator[_LiveBlock]:
    """The live positions, example by example, near `size` at a time."""
    B, T = live_BT.shape
    if T and live_BT.all():
        step = max(1, size // T)
        for start in range(0, B, step):
            yield _LiveBlock(live_BT, live_BT, slice(start, start + step), T)
        return
    places_n2 = live_BT.nonzero()
    for start in range(0, len(places_n2), size):
        examples_n, positions_n = places_n2[start : start + size].T
        yield _LiveBlock(examples_n, positions_n, None, T)


def fourier_is_cheaper(outer: Outer, width: int) -> bool:
    """Cost rule between `fourier` and `scatter`, in time per example."""
    B, G, T, o = outer.deltas[0].shape
    R, i = outer.rank, outer.inputs_BGTi.shape[-1]
    live = int(outer.live_BGT().sum()) / B
    entries = R * G * o * i
    scattering = entries * (T * _MULTIPLY_NS + _SCATTER_NS)
    transform = width * math.log2(width) * _FFT_NS if width > 1 else 0.0
    sketching = live * (R * (o * _SCATTER_NS + transform + width / 2 * _PRODUCT_NS) + i * _SCATTER_NS + transform)
    return sketching < scattering
