"""Quantized weights of linear layers (the option ``quantization``), by torchao or bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.options import PretrainedOptions

_PACKAGES = {"torchao-int8": "torchao", "bitsandbytes-8bit": "bitsandbytes", "bitsandbytes-4bit": "bitsandbytes"}


def quantization_arguments(options: PretrainedOptions, config: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize the model while it is loaded.

    Args:
        options: Options of the model, with the option ``quantization``.
        config: Configuration of the model.

    Raises:
        TaskError: The package is not installed, or the stored weights are quantized already.
    """
    assert options.quantization is not None
    package, where = _PACKAGES[options.quantization], f"quantization: {options.quantization}"
    if importlib.util.find_spec(package) is None:
        raise TaskError(f"{where} needs the package {package}: pip install 'npeff-pipeline[quantization]'")
    if getattr(config, "quantization_config", None) is not None:
        raise TaskError(
            f"{where}: the stored weights of {options.model!r} are quantized already: remove quantization, or use the "
            "model that they were made from"
        )
    return {"quantization_config": _settings(options)}


def _settings(options: PretrainedOptions) -> Any:
    if options.quantization == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if options.quantization == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options.dtype,
    )


def prepare_quantized(model: nn.Module, options: PretrainedOptions) -> None:
    """Check that a model was quantized, and keep its weights in a form that has gradients with respect to inputs.

    Raises:
        TaskError: The model has no layer that this option quantizes, or the adapter has a quantized layer of its own.
    """
    if options.quantization is None:
        return
    package, where = _PACKAGES[options.quantization], f"quantization: {options.quantization}"
    quantized = [name for name, value in model.named_parameters() if type(value).__module__.split(".")[0] == package]
    if not quantized:
        raise TaskError(
            f"{where} quantizes no layer of {options.model!r}, whose linear layers are not torch.nn.Linear: remove "
            "quantization, or use another of its values"
        )
    if own := [name for name in quantized if "modules_to_save" in name.split(".")]:
        raise TaskError(
            f"{where}: the adapter {options.adapter!r} replaces a layer that is quantized, {own[0]}: use an adapter "
            "without modules_to_save, or remove quantization"
        )
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a form of 4-bit weights that is for predictions only
            module.support_avx512bf16_for_cpu = False
