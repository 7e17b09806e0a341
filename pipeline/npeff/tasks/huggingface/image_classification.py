"""Classification of images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from npeff.errors import as_one_line
from npeff.tasks.base import Examples, TaskError
from npeff.tasks.huggingface.pretrained import PretrainedOptions, PretrainedTask, classes
from npeff.tasks.tables import class_numbers, example_table

_THUMBNAIL = 128
"""Longest side of the displayed images, in pixels."""
_TRIED_SIZES = ((300, 400), (500, 350))
"""Sizes of two images, to which a processor with a fixed output size gives the same size."""


@dataclass(frozen=True, kw_only=True)
class ImageClassificationOptions(PretrainedOptions):
    image_column: str
    """Column of image files: their bytes, a Hugging Face image, or paths relative to the table's folder."""
    label_column: str | None = None
    """Column of labels, as class numbers or names; None if there are no labels."""
    label_names: Sequence[str] | None = None
    """Names of the classes in the order of the logits. The default is the model's ``id2label``. Labels are matched
    case-insensitively."""


class ImageClassificationTask(PretrainedTask[ImageClassificationOptions]):
    """``AutoModelForImageClassification`` on a table of images."""

    Options = ImageClassificationOptions

    def model(self, cache: Path) -> nn.Module:
        return self.options.load_classifier(AutoModelForImageClassification, self.options.label_names)

    def examples(self, cache: Path) -> Examples:
        return _Images(self.options)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        dtype = next(model.parameters()).dtype
        result: Tensor = model(**{name: value.to(dtype) for name, value in batch.items()}).logits
        return result


class _Images(Examples):
    def __init__(self, options: ImageClassificationOptions) -> None:
        self._used = [options.image_column, *([options.label_column] if options.label_column else [])]
        self._rows, self._data, self._folder = options.read(self._used), options.data, options.folder
        config = options.config()
        self.class_names = classes(config, options.label_names, options.model)
        labels = self._rows[options.label_column].to_pylist() if options.label_column else [None] * len(self._rows)
        self._labels = class_numbers(labels, self.class_names, options.data)
        self._files, self._ids = self._rows[options.image_column], self._rows["id"]
        self._mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        self._processor = options.image_processor()
        self._check_sizes()

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": self._inputs([self._image(index) for index in indices])}

    def table(self) -> pa.Table:
        image = pa.array([self._thumbnail(index) for index in range(len(self))], pa.binary())
        return example_table(self._rows, self._labels, {"image": image}, self._used)

    def _image(self, index: int, longest_side: int | None = None) -> Image.Image:
        file: Any = self._files[index].as_py()
        if isinstance(file, Mapping):  # the format of images in the library datasets
            file = file.get("bytes") or file.get("path")
        try:
            if not isinstance(file, bytes | str):
                raise TypeError(f"{type(file).__name__} is neither the bytes nor the path of a file")
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else self._folder / file) as image:
                if longest_side is not None:
                    image.thumbnail((longest_side, longest_side))
                return image.convert(self._mode)
        except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            example = self._ids[index].as_py()
            raise TaskError(
                f"{self._data}: cannot read the image of row {example!r}: {as_one_line(error, 200)}"
            ) from None

    def _check_sizes(self) -> None:
        """Raise TaskError if the processor does not give all images the same size."""
        if len({self._inputs([Image.new(self._mode, size)]).shape for size in _TRIED_SIZES}) == 1:
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
