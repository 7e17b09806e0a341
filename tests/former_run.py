"""A complete run of the former layout, as an earlier version wrote it (see `tests/data/README.md`)."""

from __future__ import annotations

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parent / "data" / "former-layout.tar.xz"


def unpack(folder: Path) -> Path:
    """The run directory, a new folder in `folder`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "digits"
