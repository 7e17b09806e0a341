"""Image classification: a tiny ViT on images as bytes, as Hugging Face stores them, and as paths."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from npeff.models.loaded import ModelSpec
from npeff.tasks import TaskError
from PIL import Image

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import AutoModelForImageClassification, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIZES = [(8, 8), (300, 20), (5, 9)]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
NAMES = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(image_size=8, patch_size=4, **SMALL, **NAMES)
    tiny.save_model(folder, AutoModelForImageClassification, config)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Image.Image]:
    """Three images, also saved as files; the second is in grey."""
    generator = np.random.default_rng(0)
    made = [Image.fromarray(generator.integers(0, 255, (h, w, 3), np.uint8)) for w, h in SIZES]
    made[1] = made[1].convert("L")
    (tmp_path / "files").mkdir()
    for number, image in enumerate(made):
        image.save(tmp_path / "files" / f"{number}.png")
    return made


def columns(folder: Path) -> dict[str, Any]:
    paths = [f"files/{number}.png" for number in range(3)]
    files = [(folder / path).read_bytes() for path in paths]
    return {
        "path": paths,
        "bytes": files,
        "image": [{"bytes": file, "path": None} for file in files],
        "stored": [{"bytes": None, "path": path} for path in paths],
        "animal": ["cat", "Dog", None],
        "size": [1, 2, 3],
    }


def load(model: Path, data: str, **options: Any) -> tiny.Loaded:
    options = {"image_column": "bytes", "label_column": "animal", **options}
    return tiny.load("image-classification", model, data, **options)


@pytest.mark.parametrize("column", ["path", "bytes", "image", "stored"])
def test_images_are_read_as_the_model_was_trained_to_see_them(
    column: str, model: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    loaded = load(model, tiny.write(tmp_path / "data.parquet", columns(tmp_path)), image_column=column)
    tiny.check_batches(loaded)
    processor = ViTImageProcessorPil.from_pretrained(model)
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = loaded.model(pixel_values=pixels).logits
    torch.testing.assert_close(loaded.logits(range(3)), expected, rtol=1e-5, atol=1e-5)
    assert loaded.examples.class_names == ("cat", "dog")
    assert loaded.column("label") == [0, 1, None]
    assert loaded.column("size") == [1, 2, 3]
    assert loaded.examples.lengths() is None
    assert not {"text", "bytes"} & set(loaded.examples.table().column_names) - {"bytes"}


def test_people_are_shown_small_pngs(model: Path, images: list[Image.Image], tmp_path: Path) -> None:
    table = load(model, tiny.write(tmp_path / "data.parquet", columns(tmp_path))).examples.table()
    shown = [Image.open(io.BytesIO(file)) for file in table["image"].to_pylist()]
    assert [(image.format, max(image.size)) for image in shown] == [("PNG", 8), ("PNG", 128), ("PNG", 9)]
    np.testing.assert_array_equal(np.asarray(shown[0]), np.asarray(images[0]))


def test_grey_models_get_grey_images(images: list[Image.Image], tmp_path: Path) -> None:
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL, **NAMES)
    tiny.save_model(tmp_path / "grey", AutoModelForImageClassification, config)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(tmp_path / "grey")
    loaded = load(tmp_path / "grey", tiny.write(tmp_path / "data.parquet", columns(tmp_path)))
    assert loaded.batch(range(3))["pixel_values"].shape == (3, 1, 8, 8)
    assert loaded.logits(range(3)).shape == (3, 2)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"not an image", "cannot read the image of row '0': cannot identify image file"),
        (None, "cannot read the image of row '0': NoneType is neither the bytes nor the path of a file"),
        ("no-such-file.png", "cannot read the image of row '0': [Errno 2] No such file or directory"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(file: Any, said: str, model: Path, tmp_path: Path) -> None:
    loaded = load(model, tiny.write(tmp_path / "data.parquet", {"bytes": [file], "animal": ["cat"]}))
    for use in (lambda: loaded.batch([0]), loaded.examples.table):
        with pytest.raises(TaskError) as caught:
            use()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_model_in_half_precision_gets_its_images_in_half_precision(
    model: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    loaded = load(model, tiny.write(tmp_path / "data.parquet", columns(tmp_path)), dtype="bfloat16")
    assert loaded.logits([0]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "cannot load"),
        ("{}", "has an image processor without settings: set processor to the folder"),
        ('{"image_processor_type": "ViTImageProcessor"}', "has an image processor without settings"),
    ],
)
def test_the_settings_of_an_image_processor_are_never_assumed(
    settings: str | None, said: str, model: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").unlink()
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(settings)
    with pytest.raises(TaskError, match=f"{said}.*set processor to" if settings is None else said) as caught:
        load(tmp_path, tiny.write(tmp_path / "data.parquet", columns(tmp_path)))
    assert "\n" not in str(caught.value)
    loaded = load(tmp_path, str(tmp_path / "data.parquet"), processor=str(model))
    assert loaded.logits(range(3)).shape == (3, 2)


def test_images_of_different_sizes_are_refused_unless_the_processor_resizes_them(model: Path, tmp_path: Path) -> None:
    ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path)
    data = tiny.write(tmp_path / "data.parquet", {"bytes": [tiny.png(seed, 8) for seed in range(3)]})
    loaded = load(model, data, processor=str(tmp_path), label_column=None)
    assert loaded.batch(range(3))["pixel_values"].shape == (3, 3, 8, 8)
    data = tiny.write(tmp_path / "data.parquet", {"bytes": [tiny.png(0, 8), tiny.png(1, 8), tiny.png(2, 12)]})
    with pytest.raises(TaskError, match=r"gives images of different sizes, .*8×8 \(row '0'\).*: set its do_resize"):
        load(model, data, processor=str(tmp_path), label_column=None)


def test_an_image_model_for_regression_is_refused(images: list[Image.Image], tmp_path: Path) -> None:
    config = ViTConfig(image_size=8, patch_size=4, num_labels=1, **SMALL)
    tiny.save_model(tmp_path / "model", AutoModelForImageClassification, config)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    with pytest.raises(TaskError, match="is a model for regression, with one output"):
        load(tmp_path / "model", tiny.write(tmp_path / "data.parquet", columns(tmp_path)))


def test_paths_leave_the_folder_of_the_data_only_if_image_folder_is_set(
    model: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    (tmp_path / "tables").mkdir()
    absolute = [str(tmp_path / "files" / "0.png")]
    data = tiny.write(tmp_path / "tables" / "data.parquet", {"path": absolute, "animal": ["cat"]})
    said = r"cannot read the image of row '0': .*0.png' is outside .*tables: set image_folder to a folder that contains"
    with pytest.raises(TaskError, match=said):
        load(model, data, image_column="path").examples.table()
    loaded = load(model, data, image_column="path", image_folder=str(tmp_path / "files"))
    assert loaded.batch([0])["pixel_values"].shape == (1, 3, 8, 8)


def test_images_of_16_bits_and_turned_images_reach_the_model_as_they_are_shown(model: Path, tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    deep.save(tmp_path / "deep.png")
    Image.new("RGB", (8, 8), (100, 100, 100)).save(tmp_path / "plain.png")
    columns = {"path": ["deep.png", "plain.png"], "animal": ["cat", "cat"]}
    loaded = load(model, tiny.write(tmp_path / "data.parquet", columns), image_column="path")
    pixels = loaded.batch([0, 1])["pixel_values"]
    torch.testing.assert_close(pixels[0], pixels[1], rtol=0, atol=0)
    shown = loaded.column("image")
    assert shown[0] == shown[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_inputs_are_the_pixels_that_the_model_gets(
    dtype: str, model: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    """Not those of the stored images, which have other sizes."""
    data = tiny.write(tmp_path / "data.parquet", columns(tmp_path))
    options = {"model": str(model), "data": data, "image_column": "bytes", "dtype": dtype}
    loaded = ModelSpec("huggingface-image-classification", options, tmp_path, ("*",), (), "cpu").load()
    loaded.check_inputs([0, 1, 2])
    batch = loaded.batch([0, 1, 2])
    inputs, flat = loaded.inputs(batch, 3), loaded.flat_inputs(batch)
    assert inputs.positions == (2, 3)
    assert torch.equal(inputs.values, batch["pixel_values"])
    assert flat.values_BPF.shape == (3, 64, 3)
    values = inputs.values.requires_grad_()
    (gradient,) = torch.autograd.grad(inputs.logits(values).sum(), values)
    assert gradient.dtype == torch.float32
    assert gradient.abs().amax((1, 2, 3)).min() > 1e-4


def test_inputs_that_are_no_images_are_refused(model: Path, images: list[Image.Image], tmp_path: Path) -> None:
    loaded = load(model, tiny.write(tmp_path / "data.parquet", columns(tmp_path)))
    with pytest.raises(TaskError, match=r"inputs of shape \(2, 3, 8\), not \(images, channels, height, width\)"):
        loaded.task.inputs(loaded.model, {"pixel_values": torch.zeros(2, 3, 8)})
