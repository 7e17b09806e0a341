from __future__ import annotations

import base64
import io

import numpy as np
from npeff.reports.pictures import Album, heat_map
from PIL import Image as Pillow


def png(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    Pillow.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def decoded(uri: str) -> Pillow.Image:
    return Pillow.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_images_are_kept_as_they_are_while_there_is_room() -> None:
    album = Album({3: png(20, 10), 4: None, 5: b"<svg xmlns='http://www.w3.org/2000/svg'/>"})
    image = album.image(3)
    assert image is not None
    assert (image.name, image.width, image.height, image.pixelated) == ("i3", 20, 10, True)
    assert image.inset == (25.0, 0.0)
    assert album.image(4) is None
    assert album.image(5) is None
    assert list(album.rules) == ["i3"]
    assert base64.b64decode(album.rules["i3"].partition(",")[2]) == png(20, 10)


def test_images_become_smaller_until_they_fit() -> None:
    images: dict[int, bytes | None] = {i: png(128, 100, i) for i in range(6)}
    before = sum(len(data or b"") for data in images.values())
    album = Album(images, budget_bytes=before // 4)
    stored = [base64.b64decode(uri.partition(",")[2]) for uri in album.rules.values()]
    assert len(stored) == 6
    assert sum(map(len, stored)) <= before // 4
    assert all(uri.startswith("data:image/webp") for uri in album.rules.values())
    assert all(max(decoded(uri).size) < 128 for uri in album.rules.values())
    assert (album.image(0) or 0).width == 128  # as it is stored: shares are laid over that


def test_an_image_that_cannot_be_read_is_left_as_it_is() -> None:
    broken = png(128, 128)[:200]
    assert list(Album({0: broken}, budget_bytes=10).rules) == ["i0"]


def test_a_heat_map_is_as_opaque_as_its_values_are_large() -> None:
    picture = decoded(heat_map(np.array([[0.0, 0.5, 1.0], [-1.0, 0.25, 0.0]])))
    assert picture.size == (3, 2)
    opacity = np.asarray(picture.convert("RGBA"))[:, :, 3] / 255
    assert np.abs(opacity - [[0, 0.5, 1], [0, 0.25, 0]]).max() <= 1 / 16 + 1e-9
    assert not np.asarray(decoded(heat_map(np.zeros((2, 2)))).convert("RGBA"))[:, :, 3].any()
