"""A softmax regression of handwritten digits, whose logits are linear in the parameters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from npeff.tasks import Examples, Task
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

N, K = 600, 8


@functools.cache
def _fitted() -> tuple[np.ndarray, np.ndarray, LogisticRegression]:
    images, labels = load_digits(return_X_y=True)
    fitted = LogisticRegression(C=0.1, max_iter=300).fit(images[N:] / 16, labels[N:])
    return images[:N] / 16, labels[:N], fitted


class LinearDigits(Task, Examples):
    """The examples are images that the regression was not fitted on."""

    class_names = tuple("0123456789")

    def __init__(self) -> None:
        pixels, self._labels, self._fitted = _fitted()
        self._pixels = torch.from_numpy(pixels).float()

    def model(self, cache: Path) -> nn.Module:
        model = nn.Linear(64, 10)
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(self._fitted.coef_))
            model.bias.copy_(torch.from_numpy(self._fitted.intercept_))
        return model

    def examples(self, cache: Path) -> Examples:
        return self

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch.to(next(model.parameters()).dtype))
        return logits

    def __len__(self) -> int:
        return N

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._pixels[list(indices)]

    def table(self) -> pa.Table:
        return pa.table({"id": [str(i) for i in range(N)], "label": pa.array(self._labels, pa.int64())})
