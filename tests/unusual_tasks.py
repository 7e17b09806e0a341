"""Tasks whose models are unusual: run files of the tests name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from defective_tasks import SoundTask
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class PointTask(SoundTask):
    """Points in five dimensions, for which a subclass has another model."""

    def __init__(self) -> None:
        super().__init__(n=24)

    def model(self, cache: Path) -> nn.Module:
        torch.manual_seed(0)
        return self.net()

    def net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class MadeUnderInferenceMode(PointTask):
    def net(self) -> nn.Module:
        with torch.inference_mode():
            return super().net()


class Scripted(PointTask):
    def net(self) -> nn.Module:
        return torch.jit.script(super().net())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(5, 8), nn.Linear(8, 3), reentrant
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, values: Tensor) -> Tensor:
        hidden = checkpoint(self.inner, torch.tanh(self.first(values)), use_reentrant=self.reentrant)
        logits: Tensor = self.last(hidden)
        return logits


class ReentrantCheckpoint(PointTask):
    def net(self) -> nn.Module:
        return Checkpointed(reentrant=True)


class OtherCheckpoint(PointTask):
    def net(self) -> nn.Module:
        return Checkpointed(reentrant=False)


class ComplexFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))

    def forward(self, values: Tensor) -> Tensor:
        filtered = torch.fft.irfft(torch.fft.rfft(self.first(values)) * self.filter, n=8)
        logits: Tensor = self.last(torch.tanh(filtered))
        return logits


class Complex(PointTask):
    def net(self) -> nn.Module:
        return ComplexFilter()


class Autocast(PointTask):
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            logits: Tensor = model(batch).float()
        return logits


class Dropout(PointTask):
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = functional.dropout(model(batch), 0.2)
        return logits


class Bag(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.words, self.last = nn.EmbeddingBag(20, 6, mode="mean", **options), nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.last(self.words((values * 7).long().remainder(20)))
        return logits


class SparseBag(PointTask):
    def net(self) -> nn.Module:
        return Bag(sparse=True)


class BagByFrequency(PointTask):
    def net(self) -> nn.Module:
        return Bag(scale_grad_by_freq=True)


class BatchStatistics(PointTask):
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch - batch.mean(0))
        return logits
