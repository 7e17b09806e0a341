"""The digits, with one image that has a NaN in it. Named in run files as ``end_to_end.nan_digits:NanDigits``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from npeff.tasks import Examples
from npeff.tasks.digits import DigitsTask
from torch import Tensor

DAMAGED = 13


class NanDigits(DigitsTask):
    def examples(self, cache: Path) -> Examples:
        return _Damaged(super().examples(cache))


class _Damaged(Examples):
    def __init__(self, sound: Examples) -> None:
        self._sound, self.class_names = sound, sound.class_names

    def __len__(self) -> int:
        return len(self._sound)

    def batch(self, indices: Sequence[int]) -> Tensor:
        images: Tensor = self._sound.batch(indices).clone()
        images[torch.as_tensor(indices) == DAMAGED, 0, 3, 4] = torch.nan
        return images

    def table(self) -> pa.Table:
        return self._sound.table()
