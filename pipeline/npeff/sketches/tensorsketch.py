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
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from npeff.gradients.contribution import Contribution, blocks, cached_elements, flat_blocks
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.outer import Outer

# measured on one CPU core, in nanoseconds: a multiply-add within a matrix product, a number scattered into its bucket,
# a number added to one in a row of buckets, a number of a real Fourier transform per doubling of its length, a complex
# product accumulated
_MULTIPLY_NS, _SCATTER_NS, _FOLD_NS, _FFT_NS, _PRODUCT_NS = 0.025, 0.8, 0.2, 0.09, 0.5

WINDOWS, SMALLEST_WINDOWED, FEWEST_GROUPS = 4, 1024, 12


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
class Side:
    """Where the rows, or the columns, of a parameter go: bucket and sign of each."""

    buckets: Tensor
    signs: Tensor
    stretches: tuple[tuple[int, int, int], ...] | None
    """(start, stop, first bucket) of entries with consecutive buckets, where they are so: several times faster."""

    @classmethod
    def rotated(cls, key: str, count: int, width: int) -> Side:
        """Stretches of `width` entries, each shifted by a number of its own.

        Two entries of one stretch never meet, and two of different stretches do as often as by chance.
        """
        shifts = random_bits(f"shifts:{key}", -(-count // width)) % np.uint64(width)
        places = np.arange(count)
        buckets = (places + shifts.astype(np.int64)[places // width]) % width
        breaks = [0, *(np.flatnonzero(np.diff(buckets) != 1) + 1).tolist(), count]
        stretches = tuple((a, b, int(buckets[a])) for a, b in pairwise(breaks) if a < b)
        return cls(torch.from_numpy(buckets), _signs(key, count), stretches)

    @classmethod
    def permuted(cls, key: str, count: int, width: int) -> Side:
        """Every bucket is given out, in a random order, before any is given out again: entries collide as little as
        they can, while signs alone make the sketch unbiased."""
        rounds = -(-count // width)
        order = np.argsort(random_bits(f"buckets:{key}", rounds * width).reshape(rounds, width), axis=1, kind="stable")
        return cls(torch.from_numpy(order.ravel()[:count].copy()), _signs(key, count), None)

    def to(self, device: torch.device) -> Side:
        return Side(self.buckets.to(device), self.signs.to(device), self.stretches)

    def part(self, start: int, stop: int) -> Side:
        """Of some of the entries."""
        stretches = self.stretches and tuple(
            (max(a, start) - start, min(b, stop) - start, bucket + max(start - a, 0))
            for a, b, bucket in self.stretches
            if a < stop and b > start
        )
        return Side(self.buckets[start:stop], self.signs[start:stop], stretches)

    def add_count_sketch(self, values: Tensor, out: Tensor) -> None:
        """Add each entry of the last axis of (…, n), with its sign, to its bucket of `out` (…, w)."""
        signs = self.signs.to(values.dtype)
        if self.stretches is None:
            out.scatter_add_(-1, self.buckets.expand(values.shape), values * signs)
            return
        for start, stop, bucket in self.stretches:
            out[..., bucket : bucket + stop - start].addcmul_(values[..., start:stop], signs[start:stop])


@dataclass(frozen=True)
class Hashes:
    """Window of a parameter, and buckets in it and signs of its rows and columns.

    Drawn from (seed, name) and nothing else, by a counter-based generator. Parameters of one group (the query, key and
    value of an attention) share the window and the columns' hashes, as if they were one matrix: where they read the
    same inputs they need one transform. The longer side has stretches of consecutive buckets, which cost little, and
    the other random ones, so that entries of a parameter meet with probability 1/w whatever their rows and columns.
    """

    start: int
    width: int
    rows: Side
    columns: Side

    @classmethod
    def draw(cls, seed: int, name: str, shape: tuple[int, ...], dim: int, width: int) -> Hashes:
        """Hashes of parameter `name` in a sketch of `dim` coordinates with windows of `width`."""
        group = _group(name)
        n_columns = math.prod(shape[1:])
        window = int(random_bits(f"window:{seed}:{group}", 1)[0] % np.uint64(dim // width))
        n_rows = shape[0] if shape else 1
        draw_rows, draw_columns = Side.rotated, Side.permuted
        if n_rows < n_columns:
            draw_rows, draw_columns = draw_columns, draw_rows
        rows = draw_rows(f"rows:{seed}:{name}", n_rows, width)
        return cls(window * width, width, rows, draw_columns(f"columns:{seed}:{group}:{n_columns}", n_columns, width))

    def to(self, device: torch.device) -> Hashes:
        return Hashes(self.start, self.width, self.rows.to(device), self.columns.to(device))

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Bucket in the window and sign of every entry of the parameter, flat."""
        buckets = (self.rows.buckets[:, None] + self.columns.buckets).remainder_(self.width)
        return buckets.flatten(), (self.rows.signs[:, None] * self.columns.signs).flatten()

    def window(self, out_BRD: Tensor) -> Tensor:
        """The part of the sketch that the parameter goes to, a view."""
        return out_BRD[..., self.start : self.start + self.width]

    def sides(self, outer: Outer) -> tuple[Side, Side]:
        """Of the outputs' gradients and of the inputs of a layer, whichever way its weight is stored."""
        return (self.columns, self.rows) if outer.inputs_first else (self.rows, self.columns)


def random_bits(key: str, count: int) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def _signs(key: str, count: int) -> Tensor:
    return torch.from_numpy(1 - 2 * (random_bits(f"signs:{key}", count) & np.uint64(1)).astype(np.int8))


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
    delta, inputs = hashes.sides(outer)
    _, G, _, o = outer.deltas[0].shape
    deltas = tuple(deltas_BGTo * delta.signs.view(G, 1, o) for deltas_BGTo in outer.deltas)
    return Outer(deltas, outer.inputs_BGTi * inputs.signs, outer.shape, outer.inputs_first)


def _scatter_rows(rows: Rows, hashes: Hashes, out_BRw: Tensor) -> None:
    for start, stop, part in blocks(rows, 2 * rows.deltas_BTRi[0].numel(), cached_elements(out_BRw.device)):
        places_BT = part.indices_BT
        buckets_BTi = (hashes.rows.buckets[places_BT][..., None] + hashes.columns.buckets).remainder_(hashes.width)
        signs_BTi = hashes.rows.signs[places_BT][..., None] * hashes.columns.signs
        values_BRTi = (part.deltas_BTRi * signs_BTi[:, :, None]).transpose(1, 2)
        buckets_BRTi = buckets_BTi[:, None].expand(values_BRTi.shape)
        out_BRw[start:stop].scatter_add_(2, buckets_BRTi.flatten(2), values_BRTi.flatten(2))


def fourier(outers: Sequence[Outer], hashes: Sequence[Hashes], out_BRF: Tensor) -> None:
    """Add the Fourier transform of the sketch of the rows of layers that read the same inputs; no row is formed.

    `out_BRF` is that of their window. Layers whose columns have the same hashes share all transforms. Positions of an
    example at which all its deltas are zero are skipped where they are many.
    """
    first, width = outers[0], hashes[0].width
    sides = [h.sides(part) for part, h in zip(outers, hashes, strict=True)]
    sharing = _alike([inputs for _, inputs in sides])
    n_positions = max(1, cached_elements(out_BRF.device) // (3 * width))
    for group in range(first.inputs_BGTi.shape[1]):
        live_BT = outers[0].live_BGT()[:, group]
        for part in outers[1:]:
            live_BT = live_BT | part.live_BGT()[:, group]
        rows = [
            delta.part(group * part.deltas[0].shape[3], (group + 1) * part.deltas[0].shape[3])
            for part, (delta, _) in zip(outers, sides, strict=True)
        ]
        for block in _blocks(live_BT, n_positions):
            inputs_ni = block.taken(first.inputs_BGTi[:, group])
            for alike in sharing:
                transformed_nF = torch.fft.rfft(block.without_dead(_sketched([inputs_ni], [sides[alike[0]][1]], width)))
                for row in range(first.rank):
                    deltas = [block.taken(outers[place].deltas[row][:, group]) for place in alike]
                    sketch_nw = _sketched(deltas, [rows[place] for place in alike], width)
                    block.add_to(out_BRF[:, row], torch.fft.rfft(sketch_nw).mul_(transformed_nF))


def _sketched(parts: Sequence[Tensor], sides: Sequence[Side], width: int) -> Tensor:
    """(n, width): the count sketches of values (n, x) added up."""
    sketch_nw = parts[0].new_zeros(len(parts[0]), width)
    for values_nx, side in zip(parts, sides, strict=True):
        side.add_count_sketch(values_nx, sketch_nw)
    return sketch_nw


def _alike(inputs: Sequence[Side]) -> list[list[int]]:
    """Places of layers whose inputs have the same hashes."""
    found: list[list[int]] = []
    for place, side in enumerate(inputs):
        for group in found:
            other = inputs[group[0]]
            if torch.equal(side.buckets, other.buckets) and torch.equal(side.signs, other.signs):
                group.append(place)
                break
        else:
            found.append([place])
    return found


_MOSTLY_LIVE = 0.75
"""Share of live positions at which taking all of them as they lie is faster than gathering those."""


@dataclass(frozen=True)
class _Block:
    """Some positions of some examples: the live ones among them, or all those of consecutive examples."""

    examples_n: Tensor
    positions_n: Tensor
    whole: slice | None
    dead_n: Tensor | None
    """Of a whole block: positions that must add nothing, whatever their inputs."""
    n_positions: int

    def taken(self, values_BTx: Tensor) -> Tensor:
        """(n, x)"""
        if self.whole is not None:
            return values_BTx[self.whole].flatten(0, 1)
        # several times faster than indexing with both
        return values_BTx.flatten(0, 1).index_select(0, self.examples_n * self.n_positions + self.positions_n)

    def without_dead(self, values_nx: Tensor) -> Tensor:
        """The inputs' sketches, zero at dead positions: as the deltas' are, where inputs may be anything."""
        return values_nx if self.dead_n is None else values_nx.masked_fill_(self.dead_n[:, None], 0)

    def add_to(self, out_BF: Tensor, values_nF: Tensor) -> None:
        if self.whole is not None:
            out_BF[self.whole] += values_nF.unflatten(0, (-1, self.n_positions)).sum(1)
            return
        # adding real numbers is several times faster than adding complex ones
        first, last = int(self.examples_n[0]), int(self.examples_n[-1])
        real = torch.view_as_real(values_nF).flatten(1)
        sums = real.new_zeros(last + 1 - first, real.shape[1]).index_add_(0, self.examples_n - first, real)
        out_BF[first : last + 1] += torch.view_as_complex(sums.unflatten(1, (-1, 2)))


def _blocks(live_BT: Tensor, size: int) -> Iterator[_Block]:
    """All live positions, example by example, near `size` at a time."""
    B, T = live_BT.shape
    n_live = int(live_BT.sum())
    if n_live and n_live >= _MOSTLY_LIVE * B * T:
        step = max(1, size // T)
        for start in range(0, B, step):
            whole = slice(start, start + step)
            dead_n = None if n_live == B * T else ~live_BT[whole].flatten()
            yield _Block(live_BT, live_BT, whole, dead_n, T)
        return
    places_n2 = live_BT.nonzero()
    for start in range(0, len(places_n2), size):
        examples_n, positions_n = places_n2[start : start + size].T
        yield _Block(examples_n, positions_n, None, None, T)


def fourier_is_cheaper(outer: Outer, width: int) -> bool:
    """Cost rule between `fourier` and `scatter`, in time per example."""
    B, G, T, o = outer.deltas[0].shape
    R, i = outer.rank, outer.inputs_BGTi.shape[-1]
    live = int(outer.live_BGT().sum()) / B
    entries = R * G * o * i
    scattering = entries * (T * _MULTIPLY_NS + _SCATTER_NS)
    transform = width * math.log2(width) * _FFT_NS if width > 1 else 0.0
    deltas_ns, inputs_ns = (_FOLD_NS, _SCATTER_NS) if o > i else (_SCATTER_NS, _FOLD_NS)
    sketching = live * (R * (o * deltas_ns + transform + width / 2 * _PRODUCT_NS) + i * inputs_ns + transform)
    return sketching < scattering
