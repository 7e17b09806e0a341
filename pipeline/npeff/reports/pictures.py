"""Images of a report as data URIs: the images of the examples, each stored once, and heat maps."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELATED_BELOW = 65
"""Images narrower than this number of pixels are enlarged without smoothing."""
_BUDGET_BYTES = 10_000_000
"""Largest total size of the images of a report in bytes, before base64 encoding adds a third."""
_SMALLER_SIDES = (96, 64, 48, 32)
_SAMPLE = 64
"""Number of images in the sample that determines the size."""
_LEVELS = 9

Colour = tuple[int, int, int]
ORANGE: Colour = (222, 92, 20)
"""Colour of the evidence of parameters. It is `--heat` of the style sheet."""
BLUE: Colour = (30, 127, 216)
"""Colour of the information in the inputs, `--heat-2` of the style sheet. Everyone can tell it from orange."""


@dataclass(frozen=True)
class Image:
    """The image of an example: its CSS class, and its stored size in pixels."""

    name: str
    height: int
    width: int

    @property
    def pixelated(self) -> bool:
        return self.width < _PIXELATED_BELOW

    @property
    def inset(self) -> tuple[float, float]:
        """Vertical and horizontal margins of the image in its square frame, in percent."""
        longest = max(self.height, self.width)
        return 50 * (1 - self.height / longest), 50 * (1 - self.width / longest)


class Album:
    """The images of a report, with one CSS rule per image.

    If the images have more than 10 MB in total, all are scaled down to the same size: the largest of 96, 64, 48 and 32
    pixels for which the total is expected to fit, otherwise 32. Only PNG images are shown.
    """

    def __init__(self, images: Mapping[int, bytes | None], budget_bytes: int = _BUDGET_BYTES) -> None:
        found = {example: data for example, data in images.items() if data is not None and _is_png(data)}
        self._images = {example: Image(f"i{example}", *png_size(data)) for example, data in found.items()}
        self.rules = {
            self._images[example].name: data_uri(data) for example, data in _within(budget_bytes, found).items()
        }
        """CSS class to data URI."""

    def image(self, example: int) -> Image | None:
        return self._images.get(example)


def heat_map(values_HW: NDArray[np.floating], colour: Colour = ORANGE) -> str:
    """Return a heat map as a data URI. The opacity is proportional to the value; values below zero are transparent."""
    largest = float(values_HW.max(initial=0.0))
    shares = np.clip(values_HW / largest, 0.0, 1.0) if largest > 0 else np.zeros_like(values_HW)
    levels_HW = np.rint((_LEVELS - 1) * shares).astype(np.uint8)
    opacities = np.rint(np.linspace(0, 255, _LEVELS)).astype(np.uint8)
    pixels_HW4 = np.empty((*levels_HW.shape, 4), np.uint8)
    pixels_HW4[..., :3] = colour
    pixels_HW4[..., 3] = opacities[levels_HW]
    stream = io.BytesIO()
    Pillow.fromarray(pixels_HW4).save(stream, format="WEBP", lossless=True, exact=True)
    return data_uri(stream.getvalue())


def data_uri(data: bytes) -> str:
    """Return the data URI of a PNG or WebP image."""
    kind = "png" if data.startswith(_PNG_SIGNATURE) else "webp"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")


def _is_png(data: bytes) -> bool:
    return data.startswith(_PNG_SIGNATURE) and len(data) >= 24


def png_size(png: bytes) -> tuple[int, int]:
    """Return the height and width of an image, at least 1."""
    width, height = struct.unpack(">II", png[16:24])
    return max(height, 1), max(width, 1)


def _within(budget_bytes: int, images: dict[int, bytes]) -> dict[int, bytes]:
    """Scale the images down if they exceed the budget. A sample of the images determines the size."""
    if sum(map(len, images.values())) <= budget_bytes:
        return images
    sample = list(images.values())[:: max(1, len(images) // _SAMPLE)]
    for side in _SMALLER_SIDES:
        if sum(len(_smaller(data, side)) for data in sample) / len(sample) * len(images) <= budget_bytes:
            break
    return {example: _smaller(data, side) for example, data in images.items()}


def _smaller(png: bytes, side: int) -> bytes:
    """Scale an image down to WebP. The original is returned if it is smaller or cannot be read."""
    try:
        picture = Pillow.open(io.BytesIO(png), formats=["PNG"])
        picture.thumbnail((side, side))
        stream = io.BytesIO()
        picture.save(stream, format="WEBP", quality=60)
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
        return png
    return min(stream.getvalue(), png, key=len)
