"""Checks that stored results belong together; see `npeff.runs.lineage`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npeff.storage.checksums import read_json
from npeff.storage.errors import StoreError


def refuse_foreign(what: Path, found: str | None, record: Mapping[str, Any] | None, remedy: str) -> None:
    """Check that a file or a store belongs to the results of a record.

    Args:
        what: The file or the store.
        found: Its lineage; None if unknown.
        record: The record of the stage that wrote it.
        remedy: What the user can do.

    Raises:
        StoreError: It belongs to other results.
    """
    expected = (record or {}).get("lineage")
    if found is not None and expected is not None and found != expected:
        raise StoreError(
            f"{what} belongs to another run or factorization, or was made with other settings", remedy, path=what
        )


def refuse_unfit(stage: str, made_from: str, earlier: str, lineage: str | None, remedy: str) -> None:
    """Check that the results of a stage were made from the present results of an earlier stage.

    Args:
        stage: Name of the stage.
        made_from: The lineage of the results of the earlier stage that it read.
        earlier: Name of the earlier stage.
        lineage: The present lineage of the results of the earlier stage; None if unknown.
        remedy: What the user can do.

    Raises:
        StoreError: They were made from other results.
    """
    if lineage is not None and lineage != made_from:
        raise StoreError(f"the results of {stage} do not fit: they were made from other results of {earlier}", remedy)


def group_lineage(path: Path) -> str | None:
    """Return the attribute ``lineage`` of the group at `path`; None if it is unknown or there is no group.

    Raises:
        StoreError: The metadata of the group are damaged.
    """
    try:
        found: str | None = read_json(path / "zarr.json").get("attributes", {}).get("lineage")
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return found
