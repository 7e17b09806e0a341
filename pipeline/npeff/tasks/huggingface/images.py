"""Images of any kind as 8-bit images with one or three channels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from npeff.errors import NpeffError, as_one_line

Channels = Literal["L", "RGB"]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Pillow starts another program for some other formats, such as EPS."""
_MOST_PIXELS = 89_478_485
"""Largest image, the size above which Pillow warns of a decompression bomb."""
_OTHERS = "or exclude the row with filter"

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such images are refused here


class ImageError(NpeffError, ValueError):
    """An image that cannot be read."""


def read_image(file: Any, folder: Path, channels: Channels, longest_side: int | None = None) -> Image.Image:
    """Read an image as people see it: turned as its metadata states, and on white where it is transparent.

    Args:
        file: The bytes of an image file, its path, or a mapping with ``bytes`` or ``path``, which is the format of the
            library datasets.
        folder: Folder to which a path is relative. Files outside are refused.
        channels: ``L`` for a gray image, ``RGB`` for a color image.
        longest_side: Length to which a longer side is reduced, in pixels.

    Raises:
        ImageError: The image cannot be read, or its values have no fixed meaning as 8-bit values.
    """
    if isinstance(file, Mapping):
        file = file.get("bytes") or file.get("path")
    if not isinstance(file, bytes | str):
        raise ImageError(f"{type(file).__name__} is neither the bytes nor the path of a file", f"correct it, {_OTHERS}")
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else _path(file, folder), formats=FORMATS) as image:
            _check(image)
            has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if longest_side is not None:  # a JPEG is read faster at a reduced size
                image.draft(None, (2 * longest_side, 2 * longest_side))
            upright = ImageOps.exif_transpose(image)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(as_one_line(error), f"reduce it, {_OTHERS}") from None
    except FileNotFoundError as error:
        raise ImageError(as_one_line(error), "correct the path, or set image_folder") from None
    except Exception as error:  # Pillow raises exceptions of any class for damaged files
        no_format = isinstance(error, UnidentifiedImageError)  # its message contains an address in memory
        problem = "cannot identify image file" if no_format else as_one_line(error, 200)
        raise ImageError(problem, f"give an intact file, one of {', '.join(FORMATS)}, {_OTHERS}") from None
    found = _in_channels(_from_16_bits(upright) if has_16_bits else upright, channels)
    if longest_side is not None:
        found.thumbnail((longest_side, longest_side))
    return found


def _path(name: str, folder: Path) -> Path:
    """Return the path of a file in the folder. Links are followed before the check."""
    path, allowed = (folder / name).resolve(), folder.resolve()
    if not path.is_relative_to(allowed):
        raise ImageError(f"{name!r} is outside {folder}", "set image_folder to a folder that contains all image files")
    if path.exists() and not path.is_file():
        raise ImageError(f"{name!r} is not a file", f"correct the path, {_OTHERS}")
    return path


def _check(image: Image.Image) -> None:
    """Check what can be known before the pixels are read."""
    if image.width * image.height > _MOST_PIXELS:
        problem = f"it has {image.width} x {image.height} pixels, more than {_MOST_PIXELS:,}"
        raise ImageError(problem, f"reduce it, {_OTHERS}")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO file is a photo with previews
        raise ImageError("it has several frames or pages", f"store a single one, {_OTHERS}")


def _in_channels(image: Image.Image, channels: Channels) -> Image.Image:
    if image.mode in ("I", "F"):
        problem = f"its values are {'integers of 32 bits' if image.mode == 'I' else 'floating-point numbers'}"
        raise ImageError(problem, f"convert it to 8 or 16 bits, {_OTHERS}")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    return image.convert(channels)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale gray values from 0 … 65535 to 0 … 255. Pillow itself cuts them off at 255."""
    values = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        scaled.paste(255, mask=Image.fromarray(values == transparent))
    return scaled
