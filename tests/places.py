"""Where the files of the factorization `default` lie in a run directory."""

from __future__ import annotations

from pathlib import Path

from npeff.runs.config import FACTORIZATION_SECTIONS, RunConfig
from npeff.store.run_files import FILES, SETTINGS

HOME = "factorizations/default"


def place(name: str) -> str:
    """The path, relative to the run directory, of a file that the factorization `default` calls `name`."""
    of_factorization = any(name == file or name.startswith(f"{file}/") for file in (*FILES, SETTINGS))
    return f"{HOME}/{name}" if of_factorization else name


def write_configuration(path: Path, config: RunConfig) -> None:
    """Replace the stored configuration of a run and of its factorization."""
    config = config.model_copy(update={"run_dir": str(path)})
    of_run = [name for name in RunConfig.model_fields if name not in FACTORIZATION_SECTIONS]
    (path / "run.yaml").write_text(config.to_yaml(of_run))
    (path / place("factorization.yaml")).write_text(config.to_yaml(FACTORIZATION_SECTIONS))


def plain(path: str) -> str:
    """The name of a file without the folder of the factorization."""
    return path.removeprefix(f"{HOME}/")
