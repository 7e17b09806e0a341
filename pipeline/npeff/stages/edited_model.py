"""The folder of an edited model: its parameters, and the record of what was edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from npeff.runs.directory import RunDirectory
from npeff.runs.part import intact_record
from npeff.storage.atomic import replacing_directory
from npeff.storage.checksums import file_checksum
from npeff.storage.errors import StoreError


def write_edited_model(model: nn.Module, folder: Path, stage: str, record: dict[str, Any]) -> str:
    """Write ``model.safetensors`` and the record to a folder.

    Args:
        model: the edited model.
        folder: the folder, which is replaced.
        stage: name of the stage, and of the file of the record, without ``.json``.
        record: what was edited. It is also in the header of the model's file.

    Returns:
        The checksum of the model's file.
    """
    with replacing_directory(folder) as partial:
        save_model(model, str(partial / "model.safetensors"), {"npeff": json.dumps(record)})
        (partial / f"{stage}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return file_checksum(partial / "model.safetensors")


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
