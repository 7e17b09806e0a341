"""Options of the tasks with pretrained models. This module imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from npeff.tasks.errors import TaskError
from npeff.tasks.image_folders import IMAGE
from npeff.tasks.labels import LabelOptions
from npeff.tasks.tables import TableOptions

DType = Literal["float32", "float16", "bfloat16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Quantization = Literal["torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit"]
Granularity = Literal["sequences", "positions"]


@dataclass(frozen=True, kw_only=True)
class PretrainedOptions(TableOptions):
    """Options of the model and of loading it."""

    model: str
    """Hub id or local folder of the model."""
    processor: str | None = None
    """Hub id or local folder of the tokenizer or image processor. The default is that of the model."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    dtype: DType = "float32"
    """Type of the parameters and of the computation."""
    attention: Attention | None = None
    """Implementation of attention. By default, the library chooses."""
    adapter: str | None = None
    """Hub id or local folder of a PEFT adapter of the model, such as LoRA. Its weights are additional parameters;
    ``parameters.include: ["*lora_*"]`` selects them."""
    quantization: Quantization | None = None
    """Precision to which the weights of linear layers are quantized when the model is loaded. Quantized weights have no
    gradient. Adapters, normalizations and biases have one."""
    trust_remote_code: bool = False
    """Whether to run Python code of the model repository."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("dtype", self.dtype, get_args(DType))
        if self.attention is not None:
            _check_choice("attention", self.attention, get_args(Attention))
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, get_args(Quantization))
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise TaskError("attention: flash_attention_2 needs dtype: float16 or bfloat16")


@dataclass(frozen=True, kw_only=True)
class TextOptions(PretrainedOptions):
    """Options of all tasks with texts."""

    max_length: int = 128
    """Largest number of tokens of a text. Longer texts are truncated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 1:
            raise TaskError(f"max_length must be at least 1, not {self.max_length}")


@dataclass(frozen=True, kw_only=True)
class PredictionOptions(TextOptions):
    """Options of tasks with several predictions per row."""

    examples: Granularity = "sequences"
    """``sequences``: a row is an example. ``positions``: every prediction is an example, and its class is the label."""
    positions_per_row: int | None = None
    """For ``positions``: number of predictions of each row that are examples, drawn at random; all if None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples not in get_args(Granularity):
            raise TaskError(f"examples must be one of {', '.join(get_args(Granularity))}, not {self.examples!r}")
        if self.positions_per_row is None:
            return
        if self.examples != "positions":
            raise TaskError("positions_per_row needs examples: positions")
        if self.positions_per_row < 1:
            raise TaskError(f"positions_per_row must be at least 1, not {self.positions_per_row}")


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationOptions(LabelOptions, TextOptions):
    text_columns: Sequence[str]
    """One column of texts, or two columns for pairs of texts."""
    label_column: str | None = None
    """Column of labels, as class numbers or names; None if there are no labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text_columns, str) or not 1 <= len(self.text_columns) <= 2:
            raise TaskError("text_columns must be a list of one column, or of two for pairs of texts")


@dataclass(frozen=True, kw_only=True)
class TokenClassificationOptions(LabelOptions, PredictionOptions):
    words_column: str
    """Column of the words: lists of strings, or strings of words separated by spaces."""
    tags_column: str | None = None
    """Column of the tags of the words: lists of class numbers or names, or strings of them separated by spaces; None if
    there are no tags."""


@dataclass(frozen=True, kw_only=True)
class ImageClassificationOptions(LabelOptions, PretrainedOptions):
    image_column: str = IMAGE
    """Column of image files: their bytes, a Hugging Face image, or paths relative to ``image_folder``."""
    image_folder: str | None = None
    """Folder with all image files to which the column has paths. The default is the table's folder."""
    label_column: str | None = None
    """Column of labels, as class numbers or names; None if there are no labels."""


@dataclass(frozen=True, kw_only=True)
class CausalLMOptions(PredictionOptions):
    text_column: str
    """Column of the texts whose tokens are predicted. Without a prompt, the first token is not predicted."""
    prompt_column: str | None = None
    """Column of the prompts, which directly precede the texts. Their tokens are input only."""
    max_length: int = 512
    """Largest number of tokens of prompt and text together. Longer examples are truncated."""

    @property
    def texts(self) -> Sequence[str]:
        """Columns of the parts of an example."""
        return [self.text_column] if self.prompt_column is None else [self.prompt_column, self.text_column]


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLMOptions(PredictionOptions):
    source_column: str
    """Column of the sources, the inputs of the encoder."""
    target_column: str
    """Column of the targets, the outputs of the decoder. Their tokens are predicted."""
    max_length: int = 512
    """Largest number of tokens of a source, and of a target. Longer texts are truncated."""


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceOptions(LabelOptions, TextOptions):
    prompt_column: str
    """Column of the prompts, which precede every choice."""
    choice_columns: Sequence[str]
    """Columns of texts, one per choice, or one column of lists of texts."""
    label_column: str | None = None
    """Column of the right choice: its number from 0, or its name; None if there are no labels."""
    label_names: Sequence[str] | None = None
    """Names of the choices. The default is the names of their columns, or 0, 1, … for a column of lists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.choice_columns, str) or not self.choice_columns:
            raise TaskError("choice_columns must be a list of text columns, or of one column of lists")


def _check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise TaskError(f"{option} must be one of {', '.join(choices)}, not {value!r}")
