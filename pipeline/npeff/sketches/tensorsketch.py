"""The hash functions of a tensor sketch, and two algorithms for the sketch of an outer product.

Each parameter is reshaped to a matrix and has a window of w of the D coordinates. Entry (o, i) is added to bucket
(h_out[o] + h_in[i]) mod w of the window, with sign s_out[o] s_in[i]. The sketch of u ⊗ v is then the circular
convolution of the count sketches of u and v, which is a product of Fourier transforms. (N. Pham & R. Pagh, Fast and
scalable polynomial kernels via explicit feature maps, KDD 2013.)

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
from npeff.gradients.routed import Routed

# times measured on one CPU core, in nanoseconds: a multiply-add in a matrix product, scattering one number into its
# bucket, adding one number to consecutive buckets, one number of a real Fourier transform per doubling of the length,
# accumulating one complex product
_MULTIPLY_NS, _SCATTER_NS, _FOLD_NS, _FFT_NS, _PRODUCT_NS = 0.025, 0.8, 0.2, 0.09, 0.5

WINDOWS, SMALLEST_WINDOWED, FEWEST_GROUPS = 4, 1024, 12


def window_width(dim: int, names: Iterable[str]) -> int:
    """Return w, the number of coordinates of a window. Each group of parameters is sketched into one window.

    In a large sketch of many groups a window is a quarter of the sketch, which makes transforms several times cheaper.
    Every example's gradient is spread over the groups, so the windows fill evenly. The variance is the same if the
    energy of the gradient is split evenly over the windows.
    """
    windowed = (
        dim % WINDOWS == 0 and dim >= SMALLEST_WINDOWED and len({_group(name) for name in names}) >= FEWEST_GROUPS
    )
    return dim // WINDOWS if windowed else dim


def _group(name: str) -> str:
    """Return the name of the parent of the module that holds parameter `name`."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[0] or module


@dataclass(frozen=True)
class Side:
    """The buckets and signs of the rows, or of the columns, of a parameter."""

    buckets: Tensor
    signs: Tensor
    stretches: tuple[tuple[int, int, int], ...] | None
    """(start, stop, first bucket) of ranges of entries with consecutive buckets, which are several times faster to add.
    None if buckets are not consecutive."""

    @classmethod
    def rotated(cls, key: str, count: int, width: int) -> Side:
        """Draw buckets as stretches of `width` consecutive entries, each with a random shift.

        Two entries of one stretch never collide. Entries of different stretches collide with probability 1/width.
        """
        shifts = random_bits(f"shifts:{key}", -(-count // width)) % np.uint64(width)
        places = np.arange(count)
        buckets = (places + shifts.astype(np.int64)[places // width]) % width
        breaks = [0, *(np.flatnonzero(np.diff(buckets) != 1) + 1).tolist(), count]
        stretches = tuple((a, b, int(buckets[a])) for a, b in pairwise(breaks) if a < b)
        return cls(torch.from_numpy(buckets), _signs(key, count), stretches)

    @classmethod
    def permuted(cls, key: str, count: int, width: int) -> Side:
        """Draw buckets as random permutations: every bucket is used once before any bucket is used again.

        This minimizes the number of collisions. The random signs alone make the sketch unbiased.
        """
        rounds = -(-count // width)
        order = np.argsort(random_bits(f"buckets:{key}", rounds * width).reshape(rounds, width), axis=1, kind="stable")
        return cls(torch.from_numpy(order.ravel()[:count].copy()), _signs(key, count), None)

    def to(self, device: torch.device) -> Side:
        return Side(self.buckets.to(device), self.signs.to(device), self.stretches)

    def part(self, start: int, stop: int) -> Side:
        """Return the buckets and signs of entries `start` to `stop`."""
        stretches = self.stretches and tuple(
            (max(a, start) - start, min(b, stop) - start, bucket + max(start - a, 0))
            for a, b, bucket in self.stretches
            if a < stop and b > start
        )
        return Side(self.buckets[start:stop], self.signs[start:stop], stretches)

    def add_count_sketch(self, values: Tensor, out: Tensor) -> None:
        """Add each entry of the last axis of `values` (…, n), times its sign, to its bucket of `out` (…, w)."""
        signs = self.signs.to(values.dtype)
        if self.stretches is None:
            out.scatter_add_(-1, self.buckets.expand(values.shape), values * signs)
            return
        for start, stop, bucket in self.stretches:
            out[..., bucket : bucket + stop - start].addcmul_(values[..., start:stop], signs[start:stop])


@dataclass(frozen=True)
class Hashes:
    """The window of a parameter, with the buckets and signs of its rows and columns.

    A counter-based generator draws the hashes. They depend only on the seed and on the parameter's name and shape.
    Parameters of one group (the query, key and value weights of an attention layer) share the window and the hashes of
    the columns, as if they formed one matrix, so that layers with the same inputs need only one transform of the
    inputs. The longer side has stretches of consecutive buckets, which are cheap to add. The other side has random
    buckets, so that any two entries of a parameter collide with probability 1/w.
    """

    start: int
    width: int
    rows: Side
    columns: Side

    @classmethod
    def draw(cls, seed: int, name: str, matrix: tuple[int, int], dim: int, width: int) -> Hashes:
        """Draw the hashes of parameter `name`, reshaped to a matrix, in a sketch of `dim` coordinates.

        Args:
            seed: Seed of the sketch.
            name: Name of the parameter.
            matrix: Numbers of rows and columns.
            dim: D.
            width: w.
        """
        group = _group(name)
        n_rows, n_columns = matrix
        window = int(random_bits(f"window:{seed}:{group}", 1)[0] % np.uint64(dim // width))
        draw_rows, draw_columns = Side.rotated, Side.permuted
        if n_rows < n_columns:
            draw_rows, draw_columns = draw_columns, draw_rows
        rows = draw_rows(f"rows:{seed}:{name}", n_rows, width)
        return cls(window * width, width, rows, draw_columns(f"columns:{seed}:{group}:{n_columns}", n_columns, width))

    def to(self, device: torch.device) -> Hashes:
        return Hashes(self.start, self.width, self.rows.to(device), self.columns.to(device))

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Return the bucket in the window and the sign of every entry of the parameter, flattened."""
        buckets = (self.rows.buckets[:, None] + self.columns.buckets).remainder_(self.width)
        return buckets.flatten(), (self.rows.signs[:, None] * self.columns.signs).flatten()

    def window(self, out_BRD: Tensor) -> Tensor:
        """Return a view of the parameter's window in the sketch."""
        return out_BRD[..., self.start : self.start + self.width]

    def sides(self, outer: Outer) -> tuple[Side, Side]:
        """Return the sides of the output gradients and of the inputs, for either storage order of the weight."""
        return (self.columns, self.rows) if outer.inputs_first else (self.rows, self.columns)


def random_bits(key: str, count: int) -> np.ndarray:
    """Draw `count` random 64-bit integers that depend only on `key`."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def _signs(key: str, count: int) -> Tensor:
    return torch.from_numpy(1 - 2 * (random_bits(f"signs:{key}", count) & np.uint64(1)).astype(np.int8))


def scatter(contribution: Contribution, hashes: Hashes, out_BRD: Tensor) -> None:
    """Add the sketch of the rows to `out_BRD`, entry by entry. The rows of an embedding are never formed."""
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
    """Multiply the signs into the factors of the rows, which are much smaller than the rows."""
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
    """Add the Fourier transform of the sketch of layers with the same inputs to `out_BRF`, without forming rows.

    Layers whose columns have the same hashes share all transforms. If many positions have zero deltas, they are
    skipped.

    Args:
        outers: Contributions of layers with the same inputs.
        hashes: Hashes of each layer, all with the same window.
        out_BRF: Fourier transform of the window, modified in place.
    """
    first, width = outers[0], hashes[0].width
    sides = [h.sides(part) for part, h in zip(outers, hashes, strict=True)]
    sharing = _with_equal_hashes([inputs for _, inputs in sides])
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
            for layers in sharing:
                transformed_nF = torch.fft.rfft(
                    block.without_dead(_sketched([inputs_ni], [sides[layers[0]][1]], width))
                )
                for row in range(first.rank):
                    deltas = [block.taken(outers[place].deltas[row][:, group]) for place in layers]
                    sketch_nw = _sketched(deltas, [rows[place] for place in layers], width)
                    block.add_to(out_BRF[:, row], torch.fft.rfft(sketch_nw).mul_(transformed_nF))


def _sketched(parts: Sequence[Tensor], sides: Sequence[Side], width: int) -> Tensor:
    """Compute the sum (n, width) of the count sketches of values (n, x)."""
    sketch_nw = parts[0].new_zeros(len(parts[0]), width)
    for values_nx, side in zip(parts, sides, strict=True):
        side.add_count_sketch(values_nx, sketch_nw)
    return sketch_nw


def _with_equal_hashes(inputs: Sequence[Side]) -> list[list[int]]:
    """Group the indices of layers whose inputs have the same hashes."""
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
"""Fraction of live positions above which processing all positions is faster than gathering the live positions."""


@dataclass(frozen=True)
class _Block:
    """A block of positions: some live positions of some examples, or all positions of consecutive examples."""

    examples_n: Tensor
    positions_n: Tensor
    whole: slice | None
    dead_n: Tensor | None
    """For a block with all positions: mask of the positions that must not contribute, whatever their inputs."""
    n_positions: int

    def taken(self, values_BTx: Tensor) -> Tensor:
        """Select the values of the block's positions: (n, x)."""
        if self.whole is not None:
            return values_BTx[self.whole].flatten(0, 1)
        # several times faster than indexing with examples and positions
        return values_BTx.flatten(0, 1).index_select(0, self.examples_n * self.n_positions + self.positions_n)

    def without_dead(self, values_nx: Tensor) -> Tensor:
        """Set the sketches of the inputs to zero at dead positions, where inputs may have any value."""
        return values_nx if self.dead_n is None else values_nx.masked_fill_(self.dead_n[:, None], 0)

    def add_to(self, out_BF: Tensor, values_nF: Tensor) -> None:
        if self.whole is not None:
            out_BF[self.whole] += values_nF.unflatten(0, (-1, self.n_positions)).sum(1)
            return
        _add_by_example(out_BF, self.examples_n, values_nF)


def _add_by_example(out_BF: Tensor, examples_n: Tensor, values_nF: Tensor) -> None:
    """Add values to those of their examples, which are in ascending order."""
    # adding real numbers is several times faster than adding complex ones
    first, last = int(examples_n[0]), int(examples_n[-1])
    real = torch.view_as_real(values_nF).flatten(1)
    sums = real.new_zeros(last + 1 - first, real.shape[1]).index_add_(0, examples_n - first, real)
    out_BF[first : last + 1] += torch.view_as_complex(sums.unflatten(1, (-1, 2)))


def _blocks(live_BT: Tensor, size: int) -> Iterator[_Block]:
    """Yield blocks of about `size` positions that cover all live positions, ordered by example."""
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


def fourier_routed(routed: Routed, hashes: Hashes, out_BRF: Tensor) -> None:
    """Add the Fourier transform of the sketch of the weights of experts to `out_BRF`, without forming rows."""
    width, n_rows = hashes.width, routed.shape[1]
    step = max(1, cached_elements(out_BRF.device) // (3 * width))
    for expert, span in routed.spans():
        sides = hashes.rows.part(expert * n_rows, (expert + 1) * n_rows), hashes.columns
        delta, inputs = sides[::-1] if routed.inputs_first else sides
        for start in range(span.start, span.stop, step):
            block = slice(start, min(start + step, span.stop))
            transformed_nF = torch.fft.rfft(_sketched([routed.inputs_ni[block]], [inputs], width))
            for row, deltas_no in enumerate(routed.deltas):
                sketch_nF = torch.fft.rfft(_sketched([deltas_no[block]], [delta], width)).mul_(transformed_nF)
                _add_by_example(out_BRF[:, row], routed.examples_n[block], sketch_nF)


def fourier_is_cheaper(part: Outer | Routed, width: int) -> bool:
    """Return whether a Fourier transform is estimated to be faster than `scatter`, in time per example."""
    R, o, entries = part.rank, part.deltas[0].shape[-1], math.prod(part.shape)
    if isinstance(part, Routed):
        i, live = part.inputs_ni.shape[-1], len(part.inputs_ni) / part.n_examples
        products, folded = live * o * i, (part.shape[0] * part.shape[1] > part.shape[2]) != part.inputs_first
    else:
        i, live = part.inputs_BGTi.shape[-1], int(part.live_BGT().sum()) / part.n_examples
        products, folded = entries * part.inputs_BGTi.shape[2], o > i
    scattering = R * (products * _MULTIPLY_NS + entries * _SCATTER_NS)
    transform = width * math.log2(width) * _FFT_NS if width > 1 else 0.0
    deltas_ns, inputs_ns = (_FOLD_NS, _SCATTER_NS) if folded else (_SCATTER_NS, _FOLD_NS)
    sketching = live * (R * (o * deltas_ns + transform + width / 2 * _PRODUCT_NS) + i * inputs_ns + transform)
    return sketching < scattering
