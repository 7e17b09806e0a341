"""The worker of the stage `spectrum`: sums over groups of stored examples, and eigenvalues.

Shapes: n examples of a piece, m rows, R rank, D sketch.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.fisher.second_moments import Groups, MomentGroups, MomentSum, RowGroups
from npeff.fisher.spectrum import nonnegative
from npeff.models.heap import return_freed_memory
from npeff.stages.scaled_rows import scaled_rows
from npeff.stages.spectrum.group_sums import GroupFiles, GroupSums, Totals
from npeff.stages.spectrum.plan import N_GROUPS, Piece, SpectrumPlan
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums

_IN_MEMORY = 2**27
"""Largest size in bytes of the sums of all groups that stay in memory."""


class SpectrumWorker:
    """Sums groups of examples, and computes eigenvalues of the sums.

    Args:
        fishers: the Fisher store.
        checksums: checksum of every stored shard.
        plan: the groups.
        files: the files of the sums.
        device: device to compute on.
    """

    def __init__(
        self,
        fishers: Path,
        checksums: dict[int, ShardChecksums],
        plan: SpectrumPlan,
        files: GroupFiles,
        device: str,
    ) -> None:
        self._store, self._checksums = FisherStore.open(fishers), checksums
        self._plan, self._files = plan, files
        self._device = torch.device(device)
        self._sums: dict[int, GroupSums] = {}

    def add(self, item: tuple[int, int]) -> None:
        """Add a part to the sums of a group, in the group's file. A part that is already added is left.

        Args:
            item: Numbers of the group and of the part, whose predecessors are already added.

        Raises:
            StoreError: a shard or the file is missing or damaged.
        """
        self._sums.clear()
        self.__dict__.pop("_groups", None)
        group, part = item
        parts, empty = self._plan.parts(group), self._plan.kind == "matrix"
        if self._files.path(group).exists():
            sums = self._files.read(group, self._device)
        else:
            sums = GroupSums(0, Totals(), MomentSum(self._plan.dim, self._device) if empty else None, None)
        if sums.n_parts > part:
            return
        found = [] if sums.rows_nD is None else [sums.rows_nD]
        for piece in parts[part]:
            totals, rows_mD = self._read(piece)
            sums.totals += totals
            if rows_mD is not None and sums.moments is not None:
                sums.moments.add(rows_mD)
            elif rows_mD is not None:
                found.append(rows_mD.cpu().numpy())
            del rows_mD
        if self._plan.kind == "rows":
            sums.rows_nD = np.concatenate([np.empty((0, self._plan.dim), np.float32), *found])
        sums.n_parts = part + 1
        return_freed_memory()  # of rows, before the file is written
        self._files.write(group, sums)

    def totals(self, _: None) -> list[Totals]:
        """Return the numbers of all groups.

        Raises:
            StoreError: a file is missing or damaged.
        """
        return [self._group(group).totals for group in range(N_GROUPS)]

    def eigenvalues(self, chosen: tuple[int, ...]) -> NDArray[np.float64]:
        """Return the eigenvalues of the sum over some groups, descending, divided by the scale, without some zeros.

        Raises:
            StoreError: a file is missing or damaged.
        """
        return_freed_memory()
        return nonnegative(self._groups.eigenvalues(chosen))

    @cached_property
    def _groups(self) -> Groups:
        if self._plan.kind == "matrix":
            return MomentGroups(N_GROUPS, self._moments)
        rows = [self._group(group).rows_nD for group in range(N_GROUPS)]
        return RowGroups([torch.from_numpy(rows_nD).to(self._device) for rows_nD in rows if rows_nD is not None])

    def _moments(self, group: int) -> MomentSum:
        moments = self._group(group).moments
        assert moments is not None
        return moments

    def _group(self, group: int) -> GroupSums:
        """Read the sums of a group, which stay in memory if those of all groups are small."""
        found = self._sums.get(group)
        if found is None:
            found = self._files.read(group, self._device)
            if self._plan.kind != "matrix" or N_GROUPS * 4 * self._plan.dim**2 <= _IN_MEMORY:
                self._sums[group] = found
        return found

    def _read(self, piece: Piece) -> tuple[Totals, Tensor | None]:
        """Return the numbers of a piece, and the rows of its factors."""
        names = ["frobenius_norms", "grams", "ranks", "valid"]
        with_rows = self._plan.kind != "traces"
        arrays = self._store.read_shard(
            piece.shard, self._checksums[piece.shard], [*names, "factors"] if with_rows else names
        )
        valid_n = np.zeros_like(arrays["valid"])
        valid_n[piece.first :: piece.step] = arrays["valid"][piece.first :: piece.step]
        norms_n, ranks_n = arrays["frobenius_norms"][valid_n] / self._plan.scale, arrays["ranks"][valid_n]
        traces_n = np.trace(arrays["grams"][valid_n], axis1=1, axis2=2) / self._plan.scale
        totals = Totals(int(valid_n.sum()), int(ranks_n.sum()), float(traces_n.sum()), float(np.square(norms_n).sum()))
        if not with_rows:
            return totals, None
        return totals, torch.from_numpy(scaled_rows(arrays, valid_n, self._plan.scale)).to(self._device)
