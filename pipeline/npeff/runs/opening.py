"""Runs that are given to the functions of the Python interface: open runs, configurations and paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory

AnyRun = RunDirectory | RunConfig | str | Path
"""An open run, a configuration, the path of a run file (``.yaml``, ``.yml``), or the path or URI of a run directory."""


def as_run(run: AnyRun, *, of_all: bool = False, check: Callable[[RunConfig], object] | None = None) -> RunDirectory:
    """Open a run.

    Args:
        run: The run. The directory of a configuration, or of a run file, is created if it does not exist. The path of
            a run directory may also be its folder ``factorizations/NAME``.
        of_all: Whether only results are needed that all factorizations of the run share, so that the path of a run
            with several factorizations need not name one.
        check: As in `RunDirectory.create`.

    Returns:
        The run. A `RunDirectory` is returned unchanged.

    Raises:
        ConfigError: The run file is missing or not valid.
        RunDirectoryError: There is no run in the directory, or it holds another run.
    """
    if isinstance(run, RunDirectory):
        return run
    if isinstance(run, RunConfig):
        return RunDirectory.create(run, check)
    if str(run).endswith((".yaml", ".yml")):
        return RunDirectory.create(RunConfig.from_yaml(run), check)
    return RunDirectory.open_any(run) if of_all else RunDirectory.open(run)
