"""Pretrained models with their tokenizer or image processor, from the hub or a local folder."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.activations import AccurateGELUActivation, FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.utils.peft_utils import find_adapter_config_file

from npeff.errors import as_one_line
from npeff.tasks.base import Examples, Task
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.adapters import with_adapter
from npeff.tasks.huggingface.options import PretrainedOptions, TextOptions
from npeff.tasks.huggingface.quantization import prepare_quantized, quantization_arguments
from npeff.tasks.labels import distinct_names
from npeff.tasks.prepared import Prepared, preparing

_PROCESSOR = "set processor to the folder or hub id of the tokenizer or image processor of the model"
_only_skeleton: ContextVar[bool] = ContextVar("only_skeleton", default=False)
"""Whether `load_model` returns the modules without the values of their parameters, see `Task.skeleton`."""
_REPLACED = "original_module"
"""Module that PEFT keeps of a layer whose place another one takes."""
_TYPES = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
"""Entries in the file of an image processor that are not settings."""


def model_config(options: PretrainedOptions) -> Any:
    """Return the configuration of the model."""
    _check_no_adapter(options)
    return _from_pretrained(options, AutoConfig, options.model, revision=options.revision)


def tokenizer_of(options: PretrainedOptions, **further: Any) -> Any:
    """Return the tokenizer without its length limit. The tasks truncate at ``max_length``."""
    tokenizer = _load_processor(options, AutoTokenizer, **further)
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None) is not None:
        model.dropout = None  # a random choice of the tokens, for training
    return tokenizer


def image_processor_of(options: PretrainedOptions) -> Any:
    """Return the image processor.

    Raises:
        TaskError: There is none, or its file has no settings, so that the library would use its defaults.
    """
    processor = _load_processor(options, AutoImageProcessor)
    source, revision = _processor_source(options)
    settings, _ = type(processor).get_image_processor_dict(source, revision=revision or "main")
    if not settings.keys() - _TYPES:
        raise TaskError(f"{source!r} has an image processor without settings: {_PROCESSOR}")
    return processor


def load_model(options: PretrainedOptions, factory: Any, pad_token_id: int | None = None, **config: Any) -> nn.Module:
    """Load the model with its adapter, in eval mode on the CPU; bitsandbytes puts it on a GPU if there is one.

    Args:
        factory: Class with `from_pretrained`, such as AutoModelForCausalLM.
        pad_token_id: The padding token of batches, which models that classify at the last token need.
        config: Entries of the model's configuration to change.

    Raises:
        TaskError: The model cannot be loaded, or has no weights for this task.
    """
    _check_no_adapter(options)
    if _only_skeleton.get() and options.adapter is None and options.quantization is None:
        return _skeleton(options, factory, pad_token_id, config)
    quantization = {} if options.quantization is None else quantization_arguments(options, model_config(options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights that an adapter replaces are random, and must be equal in all workers
        model, loading = _from_pretrained(
            options,
            factory,
            options.model,
            revision=options.revision,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attention,
            output_loading_info=True,
            **quantization,
            **config,
        )
        text_config = model.config.get_text_config()
        if pad_token_id is not None:
            text_config.pad_token_id = pad_token_id
        _disable_cache(model)
        random = {name: value for name, value in model.named_parameters() if name in loading["missing_keys"]}
        if options.adapter is not None:
            model = with_adapter(model, options.adapter, options.model, quantized=options.quantization is not None)
        prepare_quantized(model, options)
        missing = [name for name, value in random.items() if _is_used(value, model)]
    if missing:
        raise TaskError(
            f"{options.model!r} has no weights {', '.join(sorted(missing)[:3])}: it is not trained for this task; "
            "use a model that is, or choose another task"
        )
    return with_fused_gelu(model).eval()


def _skeleton(options: PretrainedOptions, factory: Any, pad_token_id: int | None, changes: dict[str, Any]) -> nn.Module:
    """Return the model on the device "meta", whose tensors have no values."""
    config = model_config(options)
    for name, value in changes.items():
        setattr(config, name, value)
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
    with torch.device("meta"):
        model: nn.Module = factory.from_config(
            config,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attention,
            trust_remote_code=options.trust_remote_code,
        )
    _disable_cache(model)
    return with_fused_gelu(model).eval()


def load_classifier(
    options: PretrainedOptions, factory: Any, label_names: Sequence[str] | None, pad_token_id: int | None = None
) -> nn.Module:
    """Load a classifier as in `load`. With an adapter, the number of classes is that of `label_names`."""
    if options.adapter is None or label_names is None:
        return load_model(options, factory, pad_token_id)
    return load_model(options, factory, pad_token_id, num_labels=len(label_names))


def check_single_precision(options: PretrainedOptions) -> None:
    """Raise TaskError if the model cannot compute in float32, as gradients with respect to inputs need."""
    if options.attention == "flash_attention_2":
        raise TaskError(
            "attention: flash_attention_2 computes in half precision, and attributions of inputs in float32: set "
            "attention to sdpa"
        )


def _check_no_adapter(options: PretrainedOptions) -> None:
    """Raise TaskError if the model is an adapter, or has one, which the library would load without any check."""
    try:
        found = find_adapter_config_file(options.model, revision=options.revision)
    except Exception:  # no such model: loading it says so
        return
    if found is not None:
        raise TaskError(
            f"{options.model!r} contains a PEFT adapter",
            "set model to the model without it, and adapter to the folder or hub id of the adapter",
        )


def _processor_source(options: PretrainedOptions) -> tuple[str, str | None]:
    """Return the source of the tokenizer or image processor, and its revision."""
    return (options.model, options.revision) if options.processor is None else (options.processor, None)


def _load_processor(options: PretrainedOptions, factory: Any, **further: Any) -> Any:
    source, revision = _processor_source(options)
    try:
        return _from_pretrained(options, factory, source, revision=revision, **further)
    except TaskError as error:
        raise TaskError(str(error), _PROCESSOR) from None


def _from_pretrained(options: PretrainedOptions, factory: Any, source: str, **further: Any) -> Any:
    given = {name: value for name, value in further.items() if value is not None}
    try:
        return factory.from_pretrained(source, trust_remote_code=options.trust_remote_code, **given)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the library, its parsers and the code of a model raise any exception
        raise TaskError(f"cannot load {source!r}: {as_one_line(error)}") from None


def _is_used(parameter: nn.Parameter, model: nn.Module) -> bool:
    """Return whether a parameter of the model is part of the model with its adapter, and not replaced by it."""
    return any(value is parameter and _REPLACED not in name.split(".") for name, value in model.named_parameters())


def _disable_cache(model: nn.Module) -> None:
    """Disable the key-value cache, which is for generation only, also in parts with a configuration of their own."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for part in () if config is None else (config, config.get_text_config()):
            if getattr(part, "use_cache", False):
                part.use_cache = False


def with_fused_gelu(model: nn.Module) -> nn.Module:
    """Replace the eight operations of the tanh approximation of GELU by one kernel, and return the model.

    The result is equal up to rounding. On a CPU, a pass over GPT-2 takes 10% less time, and much less memory.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation, AccurateGELUActivation):
                setattr(parent, name, GELUTanh())
    return model


OptionsT = TypeVar("OptionsT", bound=PretrainedOptions)


class PretrainedTask(Task, Generic[OptionsT]):
    """A task with a dataclass of options."""

    Options: ClassVar[type[PretrainedOptions]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = inspect.signature(cls.Options)  # type: ignore[attr-defined]  # so the options can be listed

    def __init__(self, **options: Any) -> None:
        self.options: OptionsT = self.Options(**options)  # type: ignore[assignment]

    def skeleton(self, cache: Path) -> nn.Module:
        before = _only_skeleton.set(True)
        try:
            return self.model(cache)
        finally:
            _only_skeleton.reset(before)


class TextTask(PretrainedTask[OptionsT]):
    """A task whose texts are tokenized once. All workers map the same files of tokens and of the table of examples."""

    Options: ClassVar[type[PretrainedOptions]] = TextOptions

    @abstractmethod
    def read_examples(self, files: Prepared) -> Examples:
        """Return the examples, from the files of the task or, if they do not exist, from the data."""

    def prepare(self, cache: Path) -> None:
        with preparing(cache, self.options) as files:
            self.read_examples(files)

    def examples(self, cache: Path) -> Examples:
        return self.read_examples(Prepared.of(cache, self.options))


def classes(config: Any, label_names: Sequence[str] | None, model: str) -> tuple[str, ...]:
    """Return the class names of a classifier.

    Raises:
        TaskError: The outputs are not the logits of classes of which exactly one is right, or two classes have the same
            name.
    """
    problem = getattr(config, "problem_type", None)
    names = label_names or [name for _, name in sorted(config.id2label.items())]
    if problem is None and len(names) == 1:
        problem = "regression, with one output"
    if problem not in (None, "single_label_classification"):
        raise TaskError(f"{model!r} is a model for {problem}: use a model for single-label classification")
    return distinct_names(names)
