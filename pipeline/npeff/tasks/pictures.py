"""PNG files of small images, for display."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LONGEST_SIDE = 96
"""Larger images are reduced to this size in pixels."""


def png(pixels_HWC: NDArray[np.floating], low: float, high: float) -> bytes:
    """Return an image as a PNG file.

    Args:
        pixels_HWC: Pixels (height, width, channels), with 1 (grey) or 3 channels.
        low: Value that becomes black.
        high: Value that becomes white.
    """
    scaled = (np.asarray(pixels_HWC, np.float64) - low) / (high - low if high > low else 1.0)
    levels = (255 * scaled.clip(0, 1)).round().astype(np.uint8)
    image, buffer = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels), io.BytesIO()
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    image.save(buffer, format="PNG")
    return buffer.getvalue()
