"""The error of a run directory."""

from __future__ import annotations

from npeff.errors import NpeffError
from npeff.store.run_files import FilesOfRun


class RunDirectoryError(NpeffError):
    """A run directory that cannot be used."""


def damaged_record(run: FilesOfRun, stage: str, details: str = "") -> RunDirectoryError:
    """Return the error for the damaged record of a complete stage."""
    path, found = run.record_file(stage), f" ({details})" if details else ""
    remedy = f"delete it and run `npeff {stage} {run.argument}` again"
    return RunDirectoryError(f"{path} is damaged{found}", remedy, path=path)
