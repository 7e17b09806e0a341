"""A task with a secret among its options, ``token_task:TokenTask``: it is refused unless its value arrives."""

from __future__ import annotations

import hashlib
from pathlib import Path

from defective_tasks import SoundTask
from npeff.tasks import TaskError
from torch import nn


class TokenTask(SoundTask):
    """Checks the value of the secret ``token`` by the hash ``digest`` wherever it is loaded."""

    def __init__(self, token: str, digest: str, data: str = "", fails: str = "") -> None:
        super().__init__()
        if hashlib.sha256(token.encode()).hexdigest() != digest:
            raise ValueError(f"this is not the token: {token}")
        self._token, self._data, self._fails = token, data, fails

    def prepare(self, cache: Path) -> None:
        if self._fails == "prepare":
            raise TaskError(f"the server refuses {self._token!r}: give another")

    def model(self, cache: Path) -> nn.Module:
        if self._fails == "model":
            (Path(self._data) / self._token).read_text()
        if self._fails == "long":
            raise RuntimeError("x" * 380 + self._token)
        if self._fails == "chain":
            try:
                (Path(self._data) / self._token).read_text()
            except FileNotFoundError as error:
                raise TaskError("the weights are missing") from error
        return super().model(cache)
