"""Images of digits, each with a cue beside it: a colour, or a caption that names a digit.

Legend: N images, B of a batch, T words.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from npeff.tasks.base import Examples
from npeff.tasks.digits import images_of_digits
from npeff.tasks.planted.cue_networks import N_CLASSES, N_WORD_FEATURES, CaptionNetwork, ColourNetwork

NO_CUE = -1
"""The cue of an image without one: grey, or a caption that names no digit."""
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 127, 14),
    "yellow": (200, 180, 0),
    "green": (44, 160, 44),
    "cyan": (23, 190, 207),
    "blue": (31, 90, 180),
    "purple": (148, 103, 189),
    "pink": (227, 119, 194),
    "brown": (140, 86, 75),
    "lime": (150, 210, 30),
}
"""The ten colours, with their RGB values in pictures."""
_INK = (90, 90, 90)
_NOTHING = "something"
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CAPTIONS = (
    "a picture of the digit {}",
    "the number {} is written down",
    "someone wrote {} on a page",
    "here is a drawing of {}",
)
_WORDS = dict.fromkeys((_NOTHING, *_DIGITS, *" ".join(_CAPTIONS).replace("{}", "").split()))
_NUMBERS = {word: number for number, word in enumerate(_WORDS)}
_LENGTH = 6
"""Number of words of a caption."""


@dataclass(frozen=True)
class Colour:
    """The cue is a vector (N, 10): `strength` at the number of the colour, 0 elsewhere."""

    strength: float
    name = "colour"

    def network(self) -> ColourNetwork:
        return ColourNetwork()

    def encoded(self, cues_N: Tensor) -> Tensor:
        shown_N1 = (cues_N != NO_CUE)[:, None]
        return self.strength * shown_N1 * nn.functional.one_hot(cues_N.clamp_min(0), N_CLASSES).float()

    def texts(self, cues_N: Tensor) -> list[str]:
        names = list(COLOURS)
        return ["none" if cue == NO_CUE else names[cue] for cue in cues_N.tolist()]

    def names(self) -> list[str]:
        """Return the names of the entries of a cue."""
        return list(COLOURS)


@dataclass(frozen=True)
class Caption:
    """The cue is a caption of six words, their numbers (N, T)."""

    name = "caption"

    def network(self) -> CaptionNetwork:
        return CaptionNetwork(len(_WORDS), _LENGTH)

    def encoded(self, cues_N: Tensor) -> Tensor:
        rows = [[_NUMBERS[word] for word in text.split()] for text in self.texts(cues_N)]
        return torch.tensor(rows, dtype=torch.int64).view(-1, _LENGTH)

    def texts(self, cues_N: Tensor) -> list[str]:
        """Return the captions. Their forms take turns."""
        return [
            _CAPTIONS[number % len(_CAPTIONS)].format(_NOTHING if cue == NO_CUE else _DIGITS[cue])
            for number, cue in enumerate(cues_N.tolist())
        ]

    def names(self) -> list[str]:
        return [f"word {word + 1}, feature {f + 1}" for word in range(_LENGTH) for f in range(N_WORD_FEATURES)]


class CuedDigits(Examples):
    """Images of digits, each with a cue.

    Args:
        numbers: The numbers (N,) of the images in the data set.
        cues_N: The cue of each image, from 0 to 9 or `NO_CUE`.
        kind: What the cues are.
    """

    class_names = tuple("0123456789")

    def __init__(self, numbers: NDArray[np.int64], cues_N: Tensor, kind: Colour | Caption) -> None:
        pixels, targets = images_of_digits()
        self.images, self.targets = pixels[numbers], targets[numbers]
        self.cues_N, self.encoded = cues_N, kind.encoded(cues_N)
        self.kind, self._numbers = kind, numbers

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return {"image": self.images[chosen], "cue": self.encoded[chosen]}

    @functools.cache  # noqa: B019  (the examples live as long as the worker)
    def table(self) -> pa.Table:
        """Return the table of examples. ``agrees``: whether the cue is that of the label."""
        inks = [*COLOURS.values(), _INK] if isinstance(self.kind, Colour) else [_INK] * (N_CLASSES + 1)
        images = zip(self.images[:, 0], self.cues_N.tolist(), strict=True)
        return pa.table(
            {
                "id": pa.array([f"digit-{number:04d}" for number in self._numbers], pa.string()),
                "label": pa.array(self.targets.tolist(), pa.int64()),
                "image": pa.array([_png(image, inks[cue]) for image, cue in images], pa.binary()),
                self.kind.name: pa.array(self.kind.texts(self.cues_N), pa.string()),
                "agrees": pa.array((self.cues_N == self.targets).tolist(), pa.bool_()),
            }
        )


def drawn_cues(targets_N: Tensor, correlation: float | None, generator: np.random.Generator) -> Tensor:
    """Draw the cues of images.

    Args:
        targets_N: The classes of the images.
        correlation: Fraction of the images whose cue is that of their class; the cues of the others are any others.
            None: all cues are random.
        generator: Source of the draws.
    """
    if correlation is None:
        return torch.from_numpy(generator.integers(N_CLASSES, size=len(targets_N)))
    others = torch.from_numpy((targets_N.numpy() + generator.integers(1, N_CLASSES, size=len(targets_N))) % N_CLASSES)
    n_others = len(targets_N) - round(correlation * len(targets_N))
    is_other = np.zeros(len(targets_N), bool)
    is_other[generator.permutation(len(targets_N))[:n_others]] = True
    return torch.where(torch.from_numpy(is_other), others, targets_N)


def _png(image_HW: Tensor, ink: tuple[int, int, int]) -> bytes:
    """Return an image as a PNG file, with ink of a colour on white."""
    pixels_HWC = 255 - image_HW[..., None] * (255 - torch.tensor(ink))
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC.round().to(torch.uint8).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
