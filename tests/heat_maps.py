"""Heat maps of a report as arrays."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def pixels(uri: str | None) -> np.ndarray:
    """The red, green, blue and opacity of a picture in a data URI, 0 to 255."""
    assert uri is not None
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(picture.convert("RGBA")).astype(int)
