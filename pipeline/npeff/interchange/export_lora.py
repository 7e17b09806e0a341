"""Export of a step along a direction, or of an edited model, as a LoRA adapter in the format of PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from npeff.errors import without_values
from npeff.interchange.lora import LoraUpdate, lora_update, target_modules, tensors
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.earlier_results import fingerprint_of, prediction_batch_size
from npeff.stages.edited_model import edited_model_file, update_of
from npeff.stages.pipeline import stored_direction
from npeff.stages.worker_specs import model_spec
from npeff.storage.atomic import refuse_not_empty, replacing_directory
from npeff.storage.location import location
from npeff.store.annotations import read_annotations
from npeff.store.tables import read_table
from npeff.verification import moved

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_LISTED = 1e-6
"""Part of the norm of the update above which a parameter that is left out is listed."""

MEASURED = 64
"""Number of examples on which the error of the logits is measured."""

Edited = Literal["repair", "step"]
_POOR = 0.2
"""Relative error of the change of the logits above which a line says that the adapter is not the edit."""


@dataclass(frozen=True)
class LogitDifference:
    """The difference between the logits of the edited model and of the model with the adapter.

    Attributes:
        n_examples: number of examples on which it is measured.
        relative: norm of the difference ÷ norm of the difference between the edited model and the model of the run.
        largest: largest difference of a logit.
    """

    n_examples: int
    relative: float
    largest: float


@dataclass(frozen=True)
class ExportedLora:
    """What was exported, with its errors."""

    update: LoraUpdate
    logits: LogitDifference

    def __str__(self) -> str:
        found = self.update
        poor = self.logits.relative > _POOR
        advice = ": the adapter is not the edit; a run with only the weights of linear layers has one" if poor else ""
        return (
            f"rank {found.rank}, {len(found.layers)} layers; the adapter leaves out {found.error:.0%} of the norm of "
            f"the update ({found.omitted_share:.0%} in other parameters); relative error of the change of the logits "
            f"{self.logits.relative:.0%}, at most {self.logits.largest:.2g}{advice}"
        )


def export_lora(
    run: RunDirectory,
    folder: str | Path,
    *,
    component: int | None = None,
    epsilon: float | None = None,
    edited: Edited | None = None,
    error: float = 0.01,
    rank: int | None = None,
) -> ExportedLora:
    """Write an adapter to a folder: ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``.

    The updates of weights of linear layers become low-rank factors (`npeff.interchange.lora`). The updates of other
    parameters, such as biases and embeddings, are left out. Both errors are stated in the README.

    Args:
        run: The run, with the factorization.
        folder: The folder to write. It must not exist, or be empty.
        component: The component, with ``epsilon``.
        epsilon: Length of the step along the unit direction of the component; its sign is that of the step.
        edited: In place of a component, the edited model of the stage ``repair`` or ``step``.
        error: Largest relative error of the update of a layer, from which the smallest rank is chosen, up to 256.
        rank: The rank, in place of ``error``.

    Returns:
        The factors and the errors.

    Raises:
        ConfigError: The arguments do not fit together, or an adapter cannot express the update.
        RunDirectoryError: The component is not lifted, or there is no edited model, or the model has an adapter.
        StoreError: A file is missing or damaged, or the folder is not empty or cannot be written.
        TaskError: The model cannot be loaded.
    """
    if (edited is None) == (component is None) or (component is None) != (epsilon is None):
        raise ConfigError("give a component with epsilon, or an edited model (repair or step)")
    target = location(folder)
    refuse_not_empty(target)
    update_of_model, title = _update(run, component, epsilon, edited)
    loaded = replace(model_spec(run, fingerprint_of(run)), device="cpu").load()
    if any(name.startswith("base_model.") for name, _ in loaded.model.named_parameters()):
        raise RunDirectoryError(
            f"the model of {run.path} has an adapter already", "export the adapter of a run of the model without it"
        )
    update = update_of_model(loaded.model)
    found = lora_update(loaded.model, update, error=error, rank=rank)
    result = ExportedLora(found, _logit_error(run, loaded, update, found))
    with replacing_directory(target) as made:
        config = _config(run, loaded.model, found)
        (made / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (made / "adapter_model.safetensors").write_bytes(save(dict(tensors(found)), {"format": "pt"}))
        (made / "README.md").write_text(_readme(run, result, title, component), encoding="utf-8")
    return result


def _update(
    run: RunDirectory, component: int | None, epsilon: float | None, edited: Edited | None
) -> tuple[Callable[[nn.Module], Mapping[str, Tensor]], str]:
    """Return a function of the model that returns the update by parameter, and a title of the update.

    What is missing in the run is found here, before the model is loaded.
    """
    if edited is not None:
        edited_model_file(run, edited)
        return partial(update_of, run, stage=edited), f"the edited model of `npeff {edited}`"
    assert component is not None
    if not epsilon:
        raise ConfigError("a step of length 0 changes nothing: give another epsilon")
    direction = stored_direction(run, component)
    # numpy arrays of a store may be read-only
    update = {name: epsilon * torch.from_numpy(np.array(values)) for name, values in direction.items()}
    return lambda _: update, f"component {component}, a step of {epsilon:+g}"


def _logit_error(run: RunDirectory, loaded: Any, update: Mapping[str, Tensor], found: LoraUpdate) -> LogitDifference:
    """Compare the logits of the first valid held-out examples, or of fitted ones if there are no others."""
    examples = read_table(run.table("examples"), "examples", ["example", "split", "valid"])
    valid = examples.filter(examples["valid"]).sort_by([("split", "descending"), ("example", "ascending")])
    chosen, size = valid["example"].to_pylist()[:MEASURED], prediction_batch_size(run)
    with torch.no_grad():
        before = _flat(loaded.predict(chosen, size).logits)
        with moved(loaded.model, update, 1.0):
            edited = _flat(loaded.predict(chosen, size).logits)
        with moved(loaded.model, {layer.parameter: layer.update for layer in found.layers}, 1.0):
            adapted = _flat(loaded.predict(chosen, size).logits)
    change, difference = edited - before, edited - adapted
    relative = float(difference.norm() / change.norm()) if bool(change.any()) else 0.0
    return LogitDifference(len(chosen), relative, float(difference.abs().max()))


def _flat(logits: Any) -> Tensor:
    parts = [logits] if isinstance(logits, Tensor) else list(logits)
    return torch.cat([part.double().flatten() for part in parts])


def _config(run: RunDirectory, model: nn.Module, found: LoraUpdate) -> dict[str, Any]:
    causal = run.config.task.name == "huggingface-causal-lm"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": _base_model(run),
        "revision": run.config.task.options.get("revision"),
        "inference_mode": True,
        "r": found.rank,
        "lora_alpha": found.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in found.layers),
        "target_modules": target_modules(model, found),
        "modules_to_save": None,
    }


def _base_model(run: RunDirectory) -> str | None:
    """Return the hub id or folder of the model in the run file; None if a variable is part of it, or there is none."""
    name = run.config.task.options.get("model")
    return name if isinstance(name, str) and "${" not in name else None


def _readme(run: RunDirectory, result: ExportedLora, title: str, component: int | None) -> str:
    found, logits, base = result.update, result.logits, _base_model(run)
    known = None if component is None else read_annotations(run).name(component)
    head = {"library_name": "peft", "tags": ["lora", "npeff"]}
    if base is not None and _HUB_ID.fullmatch(base) and not Path(base).exists():
        head["base_model"] = base
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# LoRA adapter: {title}", ""]
    if known is not None:
        lines += [f"Name of the component: `{known.replace('`', chr(39))}`.", ""]
    lines += [
        f"Written by npeff {npeff_version()} from the factorization `{run.name}` of the run "
        f"`{without_values(run.path.name)}`.",
        f"Base model: `{base or run.config.task.name}`.",
        "",
        "| | |",
        "|---|---|",
        f"| rank | {found.rank}, alpha {found.rank} |",
        f"| linear layers | {len(found.layers)} |",
        f"| norm of the update | {found.norm:.6g} |",
        f"| left out of the update (norm ÷ norm) | {found.error:.3g} |",
        f"| … by the rank | {found.truncation_error:.3g} |",
        f"| … in other parameters | {found.omitted_share:.3g} |",
        f"| error of the logits ÷ their change, on {logits.n_examples} examples | {logits.relative:.3g} |",
        f"| largest difference of a logit | {logits.largest:.3g} |",
        "",
    ]
    if found.omitted:
        lines += ["Parameters that the adapter does not change, with their part of the norm of the update:", ""]
        parts = sorted(found.omitted.items(), key=lambda item: -item[1])
        lines += [f"- `{name}`: {norm / found.norm:.3g}" for name, norm in parts if norm > _LISTED * found.norm]
    return "\n".join(lines).rstrip() + "\n"


def npeff_version() -> str:
    """Return the version of this package."""
    import importlib.metadata

    return importlib.metadata.version("npeff-pipeline")
