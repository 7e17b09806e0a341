"""The provenance of a run: versions of packages, git commit and seed."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from npeff.runs.config import RunConfig

_PACKAGES = ("npeff-pipeline", "torch", "ray", "zarr", "dask", "numpy", "scipy", "pyarrow", "scikit-learn")


def provenance(config: RunConfig) -> dict[str, Any]:
    """Return the provenance of a run that is created now, for ``provenance.json``."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": config.task.name,
        "seed": config.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_sha": _git_sha(),
    }


def _git_sha() -> str | None:
    """Return the commit of this package's checkout, with ``-dirty`` if files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if sha.returncode != 0:
        return None
    return sha.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
