"""The error of a run directory."""

from __future__ import annotations

from pathlib import Path

from npeff.errors import NpeffError


class RunDirectoryError(NpeffError):
    """A run directory that cannot be used."""


def damaged_record(run_dir: Path, stage: str, details: str = "") -> RunDirectoryError:
    """Return the error for the damaged record of a complete stage."""
    path, found = run_dir / "stages" / f"{stage}.json", f" ({details})" if details else ""
    remedy = f"delete it and run `npeff {stage} {run_dir}` again"
    return RunDirectoryError(f"{path} is damaged{found}", remedy, path=path)
