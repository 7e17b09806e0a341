"""The folder of an edited model: its parameters, and the record of what was edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from npeff.storage.atomic import replacing_directory
from npeff.storage.checksums import file_checksum
from npeff.storage.errors import StoreError


def write_edited_model(model: nn.Module, folder: Path, name: str, record: dict[str, Any]) -> str:
    """Write ``model.safetensors`` and the record to a folder.

    Args:
        model: the edited model.
        folder: the folder, which is replaced.
        name: name of the file of the record, without ``.json``.
        record: what was edited. It is also in the header of the model's file.

    Returns:
        The checksum of the model's file.
    """
    with replacing_directory(folder) as partial:
        save_model(model, str(partial / "model.safetensors"), {"npeff": json.dumps(record)})
        (partial / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return file_checksum(partial / "model.safetensors")


def verify_edited_model(folder: Path, name: str, checksum: str | None) -> None:
    """Check the folder of an edited model.

    Args:
        folder: the folder.
        name: as in `write_edited_model`.
        checksum: the checksum of the model's file; None if it is not known.

    Raises:
        StoreError: a file is missing or damaged.
    """
    path = folder / "model.safetensors"
    try:
        json.loads((folder / f"{name}.json").read_bytes())
        found = file_checksum(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} is damaged", path=folder) from error
    if checksum is not None and found != checksum:
        raise StoreError(f"{path} does not match its checksum", path=path)
