"""Images of every kind are read right or refused in one line: modes, depths, transparency, rotation, damage, paths."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npeff.tasks.huggingface.images import Channels, ImageError, read_image
from PIL import EpsImagePlugin, Image

WHITE = (255, 255, 255)
COLORS = np.array([[(200, 30, 90), (10, 240, 60)]], np.uint8)
DEEP = np.array([[0, 257 * 100, 65535, 40000]], np.uint16)
SHALLOW = [0, 100, 255, 156]
NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


def image(mode: str, *pixels: Any) -> Image.Image:
    """An image with one row of pixels."""
    made = Image.new(mode, (len(pixels), 1))
    made.putdata(pixels)
    return made


def palette() -> Image.Image:
    made = image("P", 0, 1)
    made.putpalette([1, 2, 3, 4, 5, 6])
    return made


def saved(made: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    made.save(stream, kind, **options)
    return stream.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return saved(Image.fromarray(COLORS), kind, exif=exif, **lossless)


def frames(kind: str) -> bytes:
    first = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    return saved(first, kind, save_all=True, append_images=[Image.new("RGB", (2, 2), "white")])


def png(width: int, depth: int, color: int, row: bytes, *chunks: tuple[bytes, bytes], height: int = 1) -> bytes:
    """A PNG file of one row, from its header and the bytes of the row."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    content = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    made = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in content]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def tiff(bits: int, photometric: int, sample_format: int, row: bytes, width: int) -> bytes:
    """A TIFF file of one row of gray values, from its tags and the bytes of the row."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {339: sample_format}).items())
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + struct.pack("<H", len(tags) + 1) + entries + bytes(4)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def noise(kind: str) -> bytes:
    return saved(Image.fromarray(NOISE), kind)


RIGHT: dict[str, tuple[Callable[[], bytes], Channels, Any]] = {
    "RGB": (lambda: saved(Image.fromarray(COLORS), "PNG"), "RGB", COLORS[0]),
    "RGB in a BMP": (lambda: saved(Image.fromarray(COLORS), "BMP"), "RGB", COLORS[0]),
    "RGB in a TIFF": (lambda: saved(Image.fromarray(COLORS), "TIFF"), "RGB", COLORS[0]),
    "RGB in a PPM": (lambda: saved(Image.fromarray(COLORS), "PPM"), "RGB", COLORS[0]),
    "RGB in a lossless WebP": (lambda: saved(Image.fromarray(COLORS), "WEBP", lossless=True), "RGB", COLORS[0]),
    "RGB for a gray model": (lambda: saved(image("RGB", WHITE, (9, 9, 9)), "PNG"), "L", [255, 9]),
    "gray": (lambda: saved(image("L", 0, 77, 255), "PNG"), "L", [0, 77, 255]),
    "gray for a color model": (lambda: saved(image("L", 0, 77), "PNG"), "RGB", [(0, 0, 0), (77, 77, 77)]),
    "1 bit": (lambda: saved(image("1", 0, 255), "PNG"), "L", [0, 255]),
    "1 bit in a TIFF": (lambda: saved(image("1", 0, 255), "TIFF"), "RGB", [(0, 0, 0), WHITE]),
    "2 bits": (lambda: png(4, 2, 0, b"\x1b"), "L", [0, 85, 170, 255]),
    "16 bits in a PNG": (lambda: saved(Image.fromarray(DEEP), "PNG"), "L", SHALLOW),
    "16 bits in a TIFF": (lambda: saved(Image.fromarray(DEEP), "TIFF"), "L", SHALLOW),
    "16 bits in a TIFF, zero is white": (lambda: tiff(16, 0, 1, DEEP.tobytes(), 4), "L", [255 - v for v in SHALLOW]),
    "12 bits in a TIFF": (lambda: tiff(12, 1, 1, b"\x00\x0f\xff\x80\x00\x00", 4), "L", [0, 255, 128, 0]),
    "8 bits in a TIFF, zero is white": (lambda: tiff(8, 0, 1, b"\0\x64\xff\x9c", 4), "L", [255, 155, 0, 99]),
    "16 bits in a PGM": (lambda: saved(Image.fromarray(DEEP), "PPM"), "L", SHALLOW),
    "10 bits in a PGM": (lambda: b"P5\n2 1\n1023\n\0\0\3\xff", "L", [0, 255]),
    "16 bits for a color model": (lambda: saved(Image.fromarray(DEEP), "PNG"), "RGB", [(v, v, v) for v in SHALLOW]),
    "16 bits, 0 transparent": (lambda: saved(Image.fromarray(DEEP), "PNG", transparency=0), "L", [255, *SHALLOW[1:]]),
    "16 bits and alpha": (lambda: png(1, 16, 4, b"\x80\0\xff\xff"), "L", [128]),
    "48 bits": (lambda: png(1, 16, 2, b"\x80\0\xff\xff\x10\0"), "RGB", [(128, 255, 16)]),
    "64 bits": (lambda: png(1, 16, 6, b"\x80\0\xff\xff\x10\0\xff\xff"), "RGB", [(128, 255, 16)]),
    "alpha": (lambda: saved(image("RGBA", (9, 8, 7, 255), (9, 8, 7, 0)), "PNG"), "RGB", [(9, 8, 7), WHITE]),
    "half transparent": (lambda: saved(image("RGBA", (0, 0, 0, 51)), "PNG"), "RGB", [(204, 204, 204)]),
    "gray and alpha": (lambda: saved(image("LA", (9, 255), (9, 0)), "PNG"), "L", [9, 255]),
    "a transparent color": (lambda: saved(image("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)), "RGB", [WHITE]),
    "a transparent gray": (lambda: saved(image("L", 0, 7), "PNG", transparency=7), "L", [0, 255]),
    "a transparent gray of 2 bits": (lambda: png(4, 2, 0, b"\x1b", (b"tRNS", b"\0\1")), "L", [0, 255, 170, 255]),
    "a transparent gray of 4 bits": (lambda: png(2, 4, 0, b"\x80", (b"tRNS", b"\0\x08")), "L", [255, 0]),
    "a transparent gray of 1 bit": (lambda: png(2, 1, 0, b"\x40", (b"tRNS", b"\0\0")), "L", [255, 255]),
    "palette": (lambda: saved(palette(), "PNG"), "RGB", [(1, 2, 3), (4, 5, 6)]),
    "palette with transparency": (lambda: saved(palette(), "PNG", transparency=0), "RGB", [WHITE, (4, 5, 6)]),
    "GIF": (lambda: saved(palette(), "GIF"), "RGB", [(1, 2, 3), (4, 5, 6)]),
    "GIF with transparency": (lambda: saved(palette(), "GIF", transparency=0), "RGB", [WHITE, (4, 5, 6)]),
    "CMYK in a TIFF": (lambda: saved(image("CMYK", (255, 0, 0, 0)), "TIFF"), "RGB", [(0, 255, 255)]),
    "CMYK in a JPEG": (lambda: saved(Image.new("CMYK", (8, 1), (255, 0, 0, 0)), "JPEG"), "RGB", [(0, 255, 255)] * 8),
    "turned by 180 degrees": (lambda: turned("PNG", 3), "RGB", COLORS[0, ::-1]),
    "mirrored": (lambda: turned("TIFF", 2), "RGB", COLORS[0, ::-1]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_an_image_has_the_values_that_it_shows(name: str, tmp_path: Path) -> None:
    data, channels, expected = RIGHT[name]
    found = read_image(data(), tmp_path, channels)
    assert found.mode == channels
    np.testing.assert_array_equal(np.asarray(found)[0], expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_that_is_to_be_turned_by_90_degrees_is_upright(kind: str, tmp_path: Path) -> None:
    assert read_image(turned(kind, 6), tmp_path, "RGB").size == (1, 2)
    assert read_image({"bytes": turned(kind, 8), "path": None}, tmp_path, "RGB", longest_side=1).size == (1, 1)


def test_a_photo_with_previews_is_its_first_image(tmp_path: Path) -> None:
    assert np.asarray(read_image(frames("MPO"), tmp_path, "L")).max() == 0


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "32 bits": (lambda: saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "its values are integers of 32 bits"),
    "floats": (lambda: saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), "its values are floating-point"),
    "values with a sign": (lambda: tiff(8, 1, 2, b"\0\xff", 2), "its values have a sign"),
    "a transparent color of 48 bits": (
        lambda: png(1, 16, 2, b"\x80\0\xff\xff\x10\0", (b"tRNS", b"\x80\0\xff\xff\x10\0")),
        "its transparent color has 48 bits",
    ),
    "an animated GIF": (lambda: frames("GIF"), "it has several frames or pages"),
    "an animated PNG": (lambda: frames("PNG"), "it has several frames or pages"),
    "an animated WebP": (lambda: frames("WEBP"), "it has several frames or pages"),
    "pages of a TIFF": (lambda: frames("TIFF"), "it has several frames or pages"),
    "EPS": (lambda: noise("EPS"), "cannot identify image file"),
    "PDF": (lambda: noise("PDF"), "cannot identify image file"),
    "an icon": (lambda: noise("ICO"), "cannot identify image file"),
    "no image": (lambda: b"not an image", "cannot identify image file"),
    "no bytes": (lambda: b"", "cannot identify image file"),
    "the start of a PNG": (lambda: b"\x89PNG\r\n\x1a\n", "cannot identify image file"),
    "half a PNG": (lambda: half(noise("PNG")), "truncated"),
    "half a JPEG": (lambda: half(noise("JPEG")), "truncated"),
    "half a GIF": (lambda: half(noise("GIF")), "truncated"),
    "half a BMP": (lambda: half(noise("BMP")), "truncated"),
    "half a TIFF": (lambda: half(noise("TIFF")), "truncated"),
    "half a WebP": (lambda: half(noise("WEBP")), "give an intact file"),
    "900 million pixels": (lambda: png(30_000, 8, 2, b"\0", height=30_000), "decompression bomb"),
    "100 million pixels": (lambda: png(10_000, 8, 2, b"\0", height=10_000), "it has 10000 x 10000 pixels, more than"),
    "10 MB of comment": (lambda: png(1, 8, 0, b"\0", (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))), "too large"),
    "null": (lambda: None, "NoneType is neither the bytes nor the path of a file"),
    "an empty mapping": (lambda: {"bytes": None, "path": None}, "NoneType is neither the bytes nor the path"),
    "a list": (lambda: [1, 2], "list is neither the bytes nor the path of a file"),
    "a number": (lambda: 5, "int is neither the bytes nor the path of a file"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_an_image_without_a_definite_meaning_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, said = REFUSED[name]
    file = data()

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    with pytest.raises(ImageError) as caught:
        read_image(file, tmp_path, "RGB")
    assert said in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image and links, beside a folder with another image."""
    for name in ("data/sub", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(saved(image("L", 9), "PNG"))
    data = tmp_path / "data"
    (data / "inside.png").symlink_to("sub/a.png")
    (data / "outside.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "loop.png").symlink_to("loop.png")
    (tmp_path / "link to data").symlink_to("data")
    os.mkfifo(data / "pipe.png")
    return data


@pytest.mark.parametrize("path", ["sub/a.png", "sub/../sub/a.png", "inside.png", "{data}/sub/a.png", "./sub//a.png"])
def test_paths_in_the_folder_are_read(path: str, folder: Path) -> None:
    for given in (folder, folder.parent / "link to data"):
        assert read_image(path.format(data=folder), given, "L").getpixel((0, 0)) == 9


OUTSIDE = ["../elsewhere/a.png", "sub/../../elsewhere/a.png", "{elsewhere}/a.png", "outside.png", "linked/a.png"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_out_of_the_folder_are_refused_unless_the_folder_is_set(path: str, folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    with pytest.raises(ImageError, match=r"is outside .*: set image_folder to a folder that contains all image files"):
        read_image(path.format(elsewhere=elsewhere), folder, "L")
    inner = os.path.relpath(folder / path.format(elsewhere=elsewhere), folder.parent)
    assert read_image(inner, folder.parent, "L").getpixel((0, 0)) == 9


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no-such-file.png", "No such file or directory"),
        ("sub", "'sub' is not a file"),
        ("", "'' is not a file"),
        ("pipe.png", "'pipe.png' is not a file"),
        ("loop.png", "ymlink"),
        ("a\0.png", "null"),
        ("x" * 5000, "File name too long"),
        ("/dev/zero", "is outside"),
        ("https://example.org/a.png", "No such file or directory"),
        ("file:///etc/passwd", "No such file or directory"),
    ],
)
def test_paths_that_are_no_image_file_are_refused_in_one_line(path: str, said: str, folder: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_image(path, folder, "L")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
