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
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Tags of a TIFF file."""
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
            white = _white(image)
            _scale_transparent_gray(image)
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
    found = _in_channels(upright if white is None else _in_8_bits(upright, white), channels)
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
    if image.mode not in ("I", "F") and not {*_tags(image).get(_SAMPLE_FORMAT, ())} <= {1, 4}:
        raise ImageError("its values have a sign", f"convert them to values without a sign, {_OTHERS}")
    if _raw_mode(image) == "RGB;16B" and "transparency" in image.info:
        raise ImageError("its transparent color has 48 bits", f"convert it to 8 bits, {_OTHERS}")


def _tags(image: Any) -> Mapping[int, Any]:
    """Return the tags of a TIFF file."""
    tags: Mapping[int, Any] = image.tag_v2 if image.format == "TIFF" else {}
    return tags


def _raw_mode(image: Any) -> str:
    """Return how the pixels are stored in a PNG file, such as ``L;4`` for gray values of 4 bits."""
    return str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""


def _white(image: Image.Image) -> int | None:
    """Return the value of white in an image with more than 8 bits per gray value; None for other images.

    The value is negative if it is zero that is white.
    """
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        white = (1 << int(_tags(image)[_BITS][0])) - 1
        return -white if _tags(image).get(_PHOTOMETRIC) == 0 else white
    has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return 65535 if has_16_bits else None


def _scale_transparent_gray(image: Image.Image) -> None:
    """Scale the transparent gray value of a PNG file with 2 or 4 bits. Pillow scales only the pixels."""
    factor = {"L;2": 85, "L;4": 17}.get(_raw_mode(image), 1)
    if factor > 1 and "transparency" in image.info:
        image.info["transparency"] *= factor


def _in_channels(image: Image.Image, channels: Channels) -> Image.Image:
    if image.mode in ("I", "F"):
        problem = f"its values are {'integers of 32 bits' if image.mode == 'I' else 'floating-point numbers'}"
        raise ImageError(problem, f"convert it to 8 or 16 bits, {_OTHERS}")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    return image.convert(channels)


def _in_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Scale gray values from 0 … `white` to 0 … 255, and invert them if `white` is negative (see `_white`)."""
    values, most = np.asarray(image).astype(np.uint32), abs(white)
    scaled = ((values * 255 + most // 2) // most).astype(np.uint8)
    made = Image.fromarray(scaled if white > 0 else 255 - scaled)
    if isinstance(transparent := image.info.get("transparency"), int):
        made.paste(255, mask=Image.fromarray(values == transparent))
    return made
