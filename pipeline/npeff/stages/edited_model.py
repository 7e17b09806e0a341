"""The folder of an edited model: its parameters, and the record of what was edited."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from npeff.errors import first_line
from npeff.gradients import is_quantized
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.part import intact_record
from npeff.storage.atomic import local_copy, replacing_directory
from npeff.storage.checksums import file_checksum
from npeff.storage.errors import StoreError


def write_edited_model(model: nn.Module, folder: Path, stage: str, record: dict[str, Any]) -> str:
    """Write ``model.safetensors`` and the record to a folder. Quantized weights, which no edit changes, are left out.

    Args:
        model: the edited model.
        folder: the folder, which is replaced.
        stage: name of the stage, and of the file of the record, without ``.json``.
        record: what was edited. It is also in the header of the model's file.

    Returns:
        The checksum of the model's file.
    """
    with replacing_directory(folder) as partial, _without_quantized(model):
        save_model(model, str(partial / "model.safetensors"), {"npeff": json.dumps(record)})
        (partial / f"{stage}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return file_checksum(partial / "model.safetensors")


def edited_model_file(run: RunDirectory, stage: Literal["repair", "step"]) -> Path:
    """Return the file of the edited model of a stage.

    Raises:
        RunDirectoryError: the stage has not run, or did not change the model.
    """
    path = (run.repaired if stage == "repair" else run.stepped) / "model.safetensors"
    if not path.exists():
        first = f"run `npeff {stage} {run.argument}` first"
        remedy = "it has not changed the model: change its settings" if run.record_file(stage).exists() else first
        raise RunDirectoryError(f"{run.path} has no edited model of {stage}", remedy)
    return path


def update_of(run: RunDirectory, model: nn.Module, stage: Literal["repair", "step"]) -> dict[str, Tensor]:
    """Return the difference between the edited model of a stage and the model of the run, by parameter.

    Args:
        run: the run.
        model: the model of the run, on the CPU.
        stage: the stage.

    Raises:
        RunDirectoryError: the stage has not run, or did not change the model.
        StoreError: the edited model is damaged, or has other parameters.
    """
    path = edited_model_file(run, stage)
    verify_edited_model(run, path.parent, stage)
    edited = copy.deepcopy(model)
    try:
        with local_copy(path) as file, _without_quantized(edited):
            load_model(edited, str(file))
    except (RuntimeError, SafetensorError) as error:
        problem = f"{path} is not an edited model of this run ({first_line(error)})"
        raise StoreError(problem, f"run `npeff {stage} {run.argument}` again", path=path) from None
    after = dict(edited.named_parameters())
    return {
        name: after[name].detach() - value.detach()
        for name, value in model.named_parameters()
        if not is_quantized(value)
    }


@contextmanager
def _without_quantized(model: nn.Module) -> Iterator[None]:
    """Save and load the state of a model without its quantized weights, and without what belongs to them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(map(is_quantized, parameters.values())):
        yield
        return
    kept = {name for name, value in parameters.items() if not is_quantized(value)} | dict(model.named_buffers()).keys()

    def only_kept(_module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
        for name in state.keys() - kept:
            del state[name]

    def not_missing(_module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in kept]

    handles = [
        model.register_state_dict_post_hook(only_kept),
        model.register_load_state_dict_post_hook(not_missing),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def verify_edited_model(run: RunDirectory, folder: Path, stage: str) -> None:
    """Check the folder of an edited model, against the record of the stage if there is one.

    Args:
        run: the run.
        folder: the folder.
        stage: name of the stage that wrote it, and of the file of its record there.

    Raises:
        StoreError: a file is missing or damaged.
    """
    path, checksum = folder / "model.safetensors", (intact_record(run, stage) or {}).get("model_checksum")
    try:
        json.loads((folder / f"{stage}.json").read_bytes())
        found = file_checksum(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} is damaged", path=folder) from error
    if checksum is not None and found != checksum:
        raise StoreError(f"{path} does not match its checksum", path=path)
