"""PEFT adapters: the kinds whose logits are those of PEFT at the positions of the tokenizer, and their loading."""

from __future__ import annotations

import warnings
from typing import Any

from npeff.errors import as_one_line
from npeff.tasks.base import TaskError

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
_REASONS = {
    "LILY": "averages over the examples of a batch, so that a result depends on the other examples",
    "POLY": "needs the number of a task for each example",
    "XLORA": "combines several adapters",
    "SHADOW": "adds a second model",
}


def with_adapter(model: Any, adapter: str, model_name: str) -> Any:
    """Load an adapter on a model.

    Args:
        model: The model, which is changed.
        adapter: Hub id or local folder of the adapter.
        model_name: Name of the model, for messages.

    Returns:
        The `peft.PeftModel`.

    Raises:
        TaskError: PEFT is not installed, the kind of the adapter is not supported, or its weights do not fit the model.
    """
    try:
        import peft
    except ImportError:
        raise TaskError("adapter needs the package peft: pip install 'npeff-pipeline[hf]'") from None
    where = f"cannot load adapter {adapter!r} on {model_name!r}"
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
    except KeyError as error:
        raise TaskError(f"{where}: the installed peft does not know the kind {error}: {_REMEDY}") from None
    except Exception as error:  # of the network, the file system or the file
        raise TaskError(f"{where}: {as_one_line(error)}") from None
    _check_kind(config, adapter)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, adapter)
        unused = adapted.load_adapter(adapter, adapted.active_adapter, torch_device="cpu").unexpected_keys
    except Exception as error:  # each kind of adapter raises its own exceptions
        raise TaskError(f"{where}: {as_one_line(error)}") from None
    if unused:
        raise TaskError(
            f"{where}: the model has no place for the weights {', '.join(sorted(unused)[:2])}: use the model that the "
            "adapter was trained on"
        )
    return adapted


def _check_kind(config: Any, adapter: str) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    problem = None
    if config.is_prompt_learning:
        problem = "puts virtual tokens in front of the text"
    elif kind not in SUPPORTED:
        problem = _REASONS.get(kind, "is not among those that were compared with PEFT")
    elif getattr(config, "alora_invocation_tokens", None):
        kind, problem = f"{kind} with alora_invocation_tokens", "is active only after certain tokens"
    elif getattr(config, "sample_at_inference", False):
        kind, problem = f"{kind} with sample_at_inference", "gives random logits"
    if problem is not None:
        raise TaskError(f"adapter {adapter!r} is of the kind {kind}, which {problem}: {_REMEDY}")
