"""Small models that together use every rule: each case is a model, its logits, its examples and how to batch them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PADDING = 0


@dataclass(frozen=True)
class Case:
    """`batch(indices)` stacks examples, padded to a common length where they have one."""

    model: nn.Module
    logits_fn: Callable[[nn.Module, Any], Tensor]
    batch: Callable[[Sequence[int]], Any]
    n_examples: int


def call(model: nn.Module, batch: Any) -> Tensor:
    logits: Tensor = model(**batch) if isinstance(batch, dict) else model(batch)
    return logits


def vectors(model: nn.Module, *shape: int, n_examples: int = 32, seed: int = 1) -> Case:
    """A case whose examples are random tensors of one shape."""
    data = torch.randn(n_examples, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    return Case(model, call, lambda indices: data[list(indices)].to(dtype), n_examples)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4)
    )


class Cnn(nn.Module):
    """Strides, groups, dilation, every norm, an in-place activation after a layer, and a residual added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular")
        self.group_norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 4, (3, 2), padding="same", groups=2, dilation=(2, 1), bias=False)
        self.batch_norm = nn.BatchNorm2d(4)
        self.batch_norm.load_state_dict(
            {"running_mean": torch.linspace(-1, 1, 4), "running_var": torch.linspace(0.5, 2, 4)}, strict=False
        )
        self.deep = nn.Conv2d(4, 6, 2, stride=(1, 2), groups=2)
        self.layer_norm = nn.LayerNorm((2, 3))
        self.head = nn.Linear(18, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu_(self.group_norm(self.first(images)))
        residual = self.batch_norm(self.grouped(hidden))
        residual += hidden
        hidden = torch.tanh(self.deep(residual))
        hidden = self.layer_norm(hidden.reshape(len(images), 3, 2, -1)[..., :3].transpose(1, 2).transpose(1, 2))
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


class Convolutions(nn.Module):
    """One- and three-dimensional convolutions, and a transposed one, which has no rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose1d(4, 2, 3, stride=2)
        self.three = nn.Conv3d(1, 2, (2, 1, 3), padding=(0, 1, 1))
        self.head = nn.Linear(2, 3)

    def forward(self, signals: Tensor) -> Tensor:
        hidden = self.transposed(torch.relu(self.one(signals)))
        logits: Tensor = self.head(torch.tanh(self.three(hidden[:, None, :, None])).mean(dim=(2, 3, 4)))
        return logits


class TiedEncoder(nn.Module):
    """Token and position embeddings, attention from Linear layers, RMSNorm, padding mask, tied weights twice over.

    The token embedding is also the output layer, whose logits at the first position are read off for 4 tokens; the
    feed-forward layer is used twice.
    """

    def __init__(self, batched_positions: bool = False) -> None:
        super().__init__()
        width, vocabulary = 6, 9
        self.batched_positions = batched_positions
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.positions = nn.Embedding(12, width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.feed_forward = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        hidden = self.tokens(ids) + self.positions(places.expand(ids.shape) if self.batched_positions else places)
        hidden = self.norm(hidden)
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) / hidden.shape[-1] ** 0.5
        weights = scores.masked_fill((ids == PADDING)[:, None], -torch.inf).softmax(-1)
        hidden = hidden + weights @ self.value(hidden)
        for _ in range(2):
            hidden = hidden + torch.tanh_(self.feed_forward(hidden))  # a view of a product of matrices
        logits: Tensor = self.head(hidden[:, 0])
        return logits[:, 1:5]


class TorchEncoder(nn.Module):
    """nn.TransformerEncoderLayer: its attention reads parameters of a child that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4, padding_idx=PADDING)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids == PADDING
        hidden = self.layer(self.tokens(ids), src_key_padding_mask=mask)
        logits: Tensor = self.head(hidden[:, 0])
        return logits


class Scaled(nn.Module):
    """A module with parameters of its own, one of them a scalar, used by keyword and giving a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.power = nn.Parameter(torch.tensor(1.3))

    def forward(self, *, hidden: Tensor, flag: bool) -> tuple[Tensor, Tensor, str]:
        out = self.inner(hidden) * self.scale
        return torch.sigmoid(out) ** self.power, out.mean(-1), "flag" if flag else ""


class Custom(nn.Module):
    """Own parameters at the root (a learnt first token) and in a child; a layer that sees a reshaped, larger batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first_token = nn.Parameter(torch.linspace(-1, 1, 5).reshape(1, 1, 5))
        self.flat = nn.Linear(5, 5)
        self.scaled = Scaled(5)
        self.head = nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.cat([self.first_token.expand(len(values), -1, -1), values], dim=1)
        hidden = self.flat(hidden.reshape(-1, 5)).reshape(hidden.shape)
        hidden, mean, _ = self.scaled(hidden=hidden, flag=True)
        logits: Tensor = self.head(hidden.mean(1)) + mean.sum(1, keepdim=True) * torch.arange(3)
        return logits


class Recurrent(nn.Module):
    """An LSTM whose last hidden state, with the examples on its second axis, is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        start = values.new_zeros(1, len(values), 4)
        _, (hidden, _) = self.lstm(values, (start, start))
        logits: Tensor = self.head(hidden[-1])
        return logits


class Conv1D(nn.Module):
    """A linear layer stored as inputs x outputs, under the name that the GPT-2 family of transformers gives it."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_inputs, n_outputs) / n_inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(n_outputs))

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.weight + self.bias


class Transposed(nn.Module):
    """Transposed linear layers, over tokens and on the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Conv1D(7, 5)
        self.head = Conv1D(3, 7)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(values))
        logits: Tensor = self.head(hidden.cumsum(1).square())[:, -1]
        return logits


def token_case(model: nn.Module, n_examples: int = 32, extra_padding: int = 0) -> Case:
    """Sequences of 2 to 6 tokens, padded to the longest of the batch, and further by `extra_padding`."""
    generator = torch.Generator().manual_seed(2)
    sequences = [
        torch.randint(1, 9, (int(torch.randint(2, 7, (), generator=generator)),), generator=generator)
        for _ in range(n_examples)
    ]

    def batch(indices: Sequence[int]) -> Tensor:
        ids = nn.utils.rnn.pad_sequence([sequences[i] for i in indices], batch_first=True, padding_value=PADDING)
        return F.pad(ids, (0, extra_padding), value=PADDING)

    return Case(model, call, batch, n_examples)


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """A case by name, with seeded weights."""
    torch.manual_seed(0)
    if name == "mlp":
        return vectors(mlp().to(dtype), 6)
    if name == "cnn":
        return vectors(Cnn().to(dtype), 2, 7, 13)
    if name == "convolutions":
        return vectors(Convolutions().to(dtype), 3, 9)
    if name == "tied encoder":
        return token_case(TiedEncoder().to(dtype))
    if name == "torch encoder":
        return token_case(TorchEncoder().to(dtype))
    if name == "custom":
        return vectors(Custom().to(dtype), 2, 5)
    if name == "transposed linear":
        return vectors(Transposed().to(dtype), 3, 5)
    assert name == "recurrent"
    return vectors(Recurrent().to(dtype), 4, 3)


NAMES = ["mlp", "cnn", "convolutions", "tied encoder", "torch encoder", "custom", "transposed linear", "recurrent"]
