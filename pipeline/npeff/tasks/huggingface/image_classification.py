"""Classification of images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from npeff.tasks.base import Examples, Inputs
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.images import Channels, ImageError, read_image
from npeff.tasks.huggingface.options import ImageClassificationOptions
from npeff.tasks.huggingface.pretrained import (
    PretrainedTask,
    check_single_precision,
    classes,
    image_processor_of,
    load_classifier,
    model_config,
)
from npeff.tasks.tables import example_table

_THUMBNAIL = 128
"""Longest side of the displayed images, in pixels."""
_TRIED_SIZES = ((300, 400), (500, 350))
"""Sizes of two images, to which a processor with a fixed output size gives the same size."""


class ImageClassificationTask(PretrainedTask[ImageClassificationOptions]):
    """``AutoModelForImageClassification`` on a table of images."""

    Options = ImageClassificationOptions

    def model(self, cache: Path) -> nn.Module:
        return load_classifier(self.options, AutoModelForImageClassification, self.options.label_names)

    def examples(self, cache: Path) -> Examples:
        return _Images(self.options)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
        result: Tensor = model(**{name: value.to(dtype) for name, value in batch.items()}).logits
        return result

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Inputs:
        """Return the pixels that the model gets, after the image processor has resized and cropped the images."""
        check_single_precision(self.options)
        pixels = batch["pixel_values"]
        if pixels.dim() != 4:
            raise TaskError(
                f"the image processor of {self.options.model!r} gives inputs of shape {tuple(pixels.shape)}, not "
                "(images, channels, height, width): use another model, or a task of your own with an `inputs` method"
            )
        return Inputs(pixels, lambda values: self.logits(model, {**batch, "pixel_values": values}), (2, 3))


class _Images(Examples):
    def __init__(self, options: ImageClassificationOptions) -> None:
        self._used = [options.image_column, *([options.label_column] if options.label_column else [])]
        self._rows, self._data = options.read([options.image_column], options.label_column), options.data
        self._folder = options.folder if options.image_folder is None else Path(options.image_folder)
        config = model_config(options)
        self.class_names = classes(config, options.label_names, options.model)
        self._labels = options.labels(self._rows, options.label_column, self.class_names)
        self._files, self._ids = self._rows[options.image_column], self._rows["id"]
        self._channels: Channels = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        self._processor = image_processor_of(options)
        self._check_sizes()

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": self._inputs([self._image(index) for index in indices])}

    def table(self) -> pa.Table:
        image = pa.array([self._thumbnail(index) for index in range(len(self))], pa.binary())
        return example_table(self._rows, self._labels, {"image": image}, self._used)

    def _image(self, index: int, longest_side: int | None = None) -> Image.Image:
        try:
            return read_image(self._files[index].as_py(), self._folder, self._channels, longest_side)
        except ImageError as error:
            example = self._ids[index].as_py()
            problem = f"{self._data}: cannot read the image of row {example!r}: {error.problem}"
            raise TaskError(problem, error.remedy) from None

    def _check_sizes(self) -> None:
        """Raise TaskError if the processor does not give all images the same size."""
        if len({self._inputs([Image.new(self._channels, size)]).shape for size in _TRIED_SIZES}) == 1:
            return
        first: dict[tuple[int, int], int] = {}
        for index in range(len(self)):
            first.setdefault(self._image(index).size, index)
        made = {self._inputs([self._image(index)]).shape[2:]: index for index in reversed(first.values())}
        if len(made) > 1:
            shown = " and ".join(
                f"{height}×{width} (row {self._ids[index].as_py()!r})"
                for (height, width), index in list(made.items())[:2]
            )
            raise TaskError(
                f"{self._data}: the image processor gives images of different sizes, {shown}: set its do_resize or "
                "do_center_crop, or resize the images in the data"
            )

    def _inputs(self, images: list[Image.Image]) -> Tensor:
        values: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
        return values

    def _thumbnail(self, index: int) -> bytes:
        buffer = io.BytesIO()
        self._image(index, _THUMBNAIL).save(buffer, format="PNG")
        return buffer.getvalue()
