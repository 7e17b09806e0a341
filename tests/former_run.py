"""A complete run of the former layout, as an earlier version wrote it (see `tests/data/README.md`)."""

from __future__ import annotations

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parent / "data" / "former-layout.tar.xz"


def unpack(folder: Path) -> Path:
    """The run directory, a new folder in `folder`."""
    with tarfile.open(ARCHIVE) as archive:
        if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    return folder / "digits"
