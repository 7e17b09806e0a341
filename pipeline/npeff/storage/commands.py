"""The command that writes a file of a run again, for error messages."""

from __future__ import annotations

from pathlib import Path

FACTORIZATIONS = "factorizations"
"""The folder of a run with its factorizations."""

DEFAULT = "default"
"""The name of the first factorization of a run."""


def run_argument(path: Path) -> str:
    """Return the arguments of a command that name the run, and the factorization, with the file or folder ``path``."""
    folder = path.parent
    if folder.parent.name != FACTORIZATIONS:
        return str(folder)
    run = folder.parent.parent
    return str(run) if folder.name == DEFAULT else f"{run} --factorization {folder.name}"
