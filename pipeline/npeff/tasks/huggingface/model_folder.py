"""A model in a local folder, as its files describe it. This module imports neither torch nor transformers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npeff.errors import as_one_line
from npeff.tasks.errors import TaskError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = (".safetensors", ".bin")
KINDS = {
    "ForSequenceClassification": "huggingface-sequence-classification",
    "ForTokenClassification": "huggingface-token-classification",
    "ForImageClassification": "huggingface-image-classification",
    "ForMultipleChoice": "huggingface-multiple-choice",
    "ForCausalLM": "huggingface-causal-lm",
    "LMHeadModel": "huggingface-causal-lm",
    "ForConditionalGeneration": "huggingface-seq2seq-lm",
}
"""Tasks by the end of the name of a model's class (``architectures`` in ``config.json``)."""
_CLASSIFIERS = [kind for kind in KINDS if kind.endswith(("Classification", "Choice"))]


@dataclass(frozen=True)
class ModelFolder:
    """A folder that ``model.save_pretrained`` has written."""

    path: Path
    config: Mapping[str, Any]
    """The content of ``config.json``."""

    @classmethod
    def read(cls, model: str) -> ModelFolder | None:
        """Return the folder ``model``; None if it is the id of a model of the hub.

        Raises:
            TaskError: There is no such folder, or it has no readable configuration or no weights.
        """
        path = Path(model)
        if not path.exists():
            if _HUB_ID.fullmatch(model) and not model.startswith("."):
                return None
            raise TaskError(f"model {model!r} does not exist: correct the path, or give a hub id such as owner/name")
        file = path / "config.json"
        if not file.is_file():
            has_adapter = (path / "adapter_config.json").is_file()
            remedy = (
                "it contains a PEFT adapter: set model to the model without it, and adapter to this folder"
                if has_adapter
                else "give a folder that model.save_pretrained has written"
            )
            raise TaskError(f"model {model!r} has no config.json: {remedy}")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TaskError(f"cannot read {file}: {as_one_line(error)}: save the model again") from None
        if not isinstance(config, dict):
            raise TaskError(f"cannot read {file}: it is not a JSON object: save the model again")
        if not any(each.suffix in _WEIGHTS for each in path.iterdir()):
            raise TaskError(
                f"model {model!r} has no weights ({' or '.join(_WEIGHTS)}): save it with model.save_pretrained"
            )
        return cls(path, config)

    @property
    def architecture(self) -> str:
        """Name of the model's class; empty if the configuration does not tell."""
        found = self.config.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else ""

    @property
    def task(self) -> str | None:
        """The task for models of this class; None if it is not known."""
        return next((task for kind, task in KINDS.items() if self.architecture.endswith(kind)), None)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the logits; None if the configuration has none."""
        names = self.config.get("id2label")
        if not isinstance(names, dict) or not all(str(number).isdigit() for number in names):
            return None
        return [str(names[number]) for number in sorted(names, key=int)]

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens; None if the configuration does not tell."""
        for part in (self.config, self.config.get("text_config")):
            if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
                return int(part["vocab_size"])
        return None

    @property
    def positions(self) -> int | None:
        """Largest number of tokens of a text; None if the configuration does not tell."""
        found = [
            part[name]
            for part in (self.config, self.config.get("text_config"))
            if isinstance(part, dict)
            for name in ("max_position_embeddings", "n_positions")
            if isinstance(part.get(name), int)
        ]
        return min(found, default=None)

    def tensor_sizes(self) -> dict[str, int]:
        """Return the number of entries of every tensor by name, from the headers of the safetensors files.

        The result is empty if there are no such files.

        Raises:
            TaskError: A file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        sizes: dict[str, int] = {}
        for path in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(path, framework="np") as file:
                    sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise TaskError(f"cannot read {path}: {as_one_line(error)}: save the model again") from None
        return sizes

    def describe(self) -> str:
        """Return a description for a table."""
        return f"{self.path}: {self.architecture or 'of an unknown class'}"


def check_kind(task: str, model: ModelFolder) -> None:
    """Check that a model is not a classifier of another kind. Other models may have weights for several tasks.

    Raises:
        TaskError: The model belongs to another task.
    """
    classifiers = {KINDS[kind] for kind in _CLASSIFIERS}
    if model.task is not None and model.task != task and {model.task, task} & classifiers:
        raise TaskError(f"model {str(model.path)!r} is a {model.architecture}: use task.name: {model.task}")
