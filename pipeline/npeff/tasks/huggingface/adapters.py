"""PEFT adapters: the kinds whose logits are those of PEFT at the positions of the tokenizer, and their loading."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import cached_file

from npeff.errors import as_one_line
from npeff.tasks.errors import TaskError

# fmt: off
SUPPORTED = (
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA",
    "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT",
    "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA",
    "VBLORA", "VERA", "WAVEFT",
)
# fmt: on
"""Kinds of adapters that change the layers of a model. The tests compare each of them with PEFT."""
_REMEDY = "use an adapter that changes the layers of the model, such as LoRA"
_COMPLETE = "use a complete adapter, and the model that it was trained on"
_REASONS = {
    "LILY": "averages over the examples of a batch, so that a result depends on the other examples",
    "POLY": "needs the number of a task for each example",
    "XLORA": "combines several adapters",
    "SHADOW": "adds a second model",
}


def with_adapter(model: Any, adapter: str, model_name: str, *, quantized: bool = False) -> Any:
    """Load an adapter on a model.

    Args:
        model: The model, which is changed.
        adapter: Hub id or local folder of the adapter.
        model_name: Name of the model, for messages.
        quantized: Whether weights of the model are quantized.

    Returns:
        The `peft.PeftModel`.

    Raises:
        TaskError: PEFT is not installed, the kind of the adapter is not supported, its file has settings that PEFT does
            not know, or its weights are not those that the model needs.
    """
    try:
        import peft
    except ImportError:
        raise TaskError("adapter needs the package peft: pip install 'npeff-pipeline[hf]'") from None
    where = f"cannot load adapter {adapter!r} on {model_name!r}"
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
        settings = json.loads(Path(cached_file(adapter, peft.utils.CONFIG_NAME)).read_text(encoding="utf-8"))
    except KeyError as error:
        raise TaskError(f"{where}: the installed peft does not know the kind {error}: {_REMEDY}") from None
    except Exception as error:  # of the network, the file system or the file
        raise TaskError(f"{where}: {as_one_line(error)}") from None
    _check_kind(config, adapter)
    if quantized:
        _check_on_quantized(config, adapter)
    _check_settings(config, settings, adapter)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, adapter)
        unset, unused = _reload(adapted, adapter)
    except KeyError as error:
        raise TaskError(f"{where}: it has no {error}", _COMPLETE) from None
    except Exception as error:  # each kind of adapter raises its own exceptions
        raise TaskError(f"{where}: {as_one_line(error)}", _COMPLETE) from None
    if unset:
        raise TaskError(f"{where}: it has no weights {_some(unset)}", _COMPLETE)
    if unused:
        raise TaskError(f"{where}: the model has no place for the weights {_some(unused)}", _COMPLETE)
    return adapted


def _reload(adapted: Any, adapter: str) -> tuple[list[str], list[str]]:
    """Load the weights once more, and return the names of weights that the files lack, and of those that fit nowhere.

    PEFT does not report every missing weight, for example not those that several layers share. Therefore, all weights
    that PEFT would save are first overwritten with a value that no adapter has.
    """
    own = _saved(adapted)
    for value in own.values():
        value.fill_(float("nan") if value.is_floating_point() else _NO_INDEX)
    loading = adapted.load_adapter(adapter, adapted.active_adapter, torch_device="cpu")
    unset = [name for name, value in _saved(adapted).items() if _is_unset(value)]
    return sorted(unset), sorted(set(loading.unexpected_keys) - own.keys())


def _saved(adapted: Any) -> dict[str, Tensor]:
    """Return the weights that PEFT would save: real numbers and indices."""
    import peft

    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: value for name, value in state.items() if value.is_floating_point() or value.dtype.is_signed}


_NO_INDEX = -1


def _is_unset(value: Tensor) -> bool:
    if not value.numel():
        return False
    return bool(value.isnan().all() if value.is_floating_point() else (value == _NO_INDEX).all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:2])


def _check_settings(config: Any, settings: Mapping[str, Any], adapter: str) -> None:
    """Raise TaskError if the file has a setting that PEFT ignores because it does not know it."""
    known = {field.name for field in dataclasses.fields(config)} | {"runtime_config"}
    unknown = sorted(name for name, value in settings.items() if name not in known and value not in _OFF)
    if unknown:
        made_with = f"peft {settings['peft_version']}" if settings.get("peft_version") else "the peft it was made with"
        raise TaskError(
            f"adapter {adapter!r} has settings that the installed peft does not know, {_some(unknown)}: install "
            f"{made_with}, or delete them from adapter_config.json if they change nothing"
        )


_OFF: tuple[Any, ...] = (None, False, [], {}, "")
"""Values with which a setting that PEFT does not know is not in use."""


def _check_on_quantized(config: Any, adapter: str) -> None:
    """Raise TaskError if the adapter was not compared with PEFT on quantized weights, or needs to change them."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    problem = None
    if kind != "LORA":
        problem = f"is of the kind {kind}"
    elif config.use_dora:
        problem = "has use_dora, which reads the weights of the model"
    elif not (isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian"):
        problem = f"has init_lora_weights {config.init_lora_weights}, which changes the weights of the model"
    if problem is not None:
        raise TaskError(
            f"adapter {adapter!r} {problem}, on a model with quantized weights: use an ordinary LoRA adapter, or "
            "remove quantization"
        )


def _check_kind(config: Any, adapter: str) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    problem = None
    if config.is_prompt_learning:
        problem = "puts virtual tokens in front of the text"
    elif kind not in SUPPORTED:
        problem = _REASONS.get(kind, "is not among those that were compared with PEFT")
    elif getattr(config, "alora_invocation_tokens", None):
        kind, problem = f"{kind} with alora_invocation_tokens", "is active only after certain tokens"
    elif kind == "LORA" and str(config.init_lora_weights).startswith("pissa_niter"):
        kind, problem = f"{kind} with init_lora_weights {config.init_lora_weights}", "changes the model at random"
    elif getattr(config, "sample_at_inference", False):
        kind, problem = f"{kind} with sample_at_inference", "gives random logits"
    if problem is not None:
        raise TaskError(f"adapter {adapter!r} is of the kind {kind}, which {problem}: {_REMEDY}")
