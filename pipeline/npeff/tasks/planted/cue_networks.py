"""Networks that read a digit and a cue beside it: a colour, or a caption.

Legend: B examples, T tokens, D features of a word.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

N_CLASSES = 10
N_WORD_FEATURES = 16
_WIDTH = 32


class CueNetwork(Protocol):
    """A network of two modalities."""

    def modalities(self, image: Tensor, cue: Tensor) -> dict[str, Tensor]:
        """Return the two modalities by name, floating point.

        Args:
            image: Images (B, 1, 8, 8).
            cue: The cue of each image, as `CuedDigits.batch` has it.
        """

    def classify(self, given: dict[str, Tensor]) -> Tensor:
        """Return the logits (B, 10) of modalities."""


class ColourNetwork(nn.Module):
    """Reads the image and a vector (B, 10) that is not zero at the place of the colour."""

    def __init__(self) -> None:
        super().__init__()
        self.image = _image_branch()
        self.colour = nn.Sequential(nn.Linear(N_CLASSES, _WIDTH), nn.ReLU())
        self.head = nn.Linear(2 * _WIDTH, N_CLASSES)

    def modalities(self, image: Tensor, cue: Tensor) -> dict[str, Tensor]:
        return {"image": image, "colour": cue}

    def classify(self, given: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.image(given["image"]), self.colour(given["colour"])], dim=1))
        return logits

    def forward(self, image: Tensor, cue: Tensor) -> Tensor:
        return self.classify(self.modalities(image, cue))


class CaptionNetwork(nn.Module):
    """Reads the image and the numbers (B, T) of the words of a caption, with one layer of attention.

    Args:
        n_words: Number of words.
        length: Number T of words of a caption.
    """

    def __init__(self, n_words: int, length: int) -> None:
        super().__init__()
        self.image = _image_branch()
        self.words = nn.Embedding(n_words, N_WORD_FEATURES)
        self.positions = nn.Parameter(torch.randn(length, N_WORD_FEATURES))
        self.query, self.key, self.value = (nn.Linear(N_WORD_FEATURES, N_WORD_FEATURES) for _ in range(3))
        self.caption = nn.Sequential(nn.Linear(N_WORD_FEATURES, _WIDTH), nn.ReLU())
        self.head = nn.Linear(2 * _WIDTH, N_CLASSES)

    def modalities(self, image: Tensor, cue: Tensor) -> dict[str, Tensor]:
        return {"image": image, "caption": self.words(cue)}

    def classify(self, given: dict[str, Tensor]) -> Tensor:
        x_BTD = given["caption"] + self.positions
        scores_BTT = self.query(x_BTD) @ self.key(x_BTD).mT / math.sqrt(N_WORD_FEATURES)
        x_BTD = x_BTD + scores_BTT.softmax(-1) @ self.value(x_BTD)
        logits: Tensor = self.head(torch.cat([self.image(given["image"]), self.caption(x_BTD.mean(1))], dim=1))
        return logits

    def forward(self, image: Tensor, cue: Tensor) -> Tensor:
        return self.classify(self.modalities(image, cue))


def _image_branch() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, _WIDTH), nn.ReLU())
