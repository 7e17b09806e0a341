"""The stored configuration of a run: reading it, comparing it with that of a command, and writing it.

``run.yaml`` has the sections of the run, which the Fishers depend on. The file
``factorizations/NAME/factorization.yaml`` has the sections of a factorization. In the former layout, ``run.yaml`` has
the sections of the factorization ``default`` too.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from npeff.runs.config import FACTORIZATION_SECTIONS, FISHER_SECTIONS, OPTIONAL_SECTIONS, RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.errors import RunDirectoryError
from npeff.runs.provenance import provenance
from npeff.storage.atomic import remove_directory
from npeff.storage.commands import DEFAULT
from npeff.storage.location import is_remote
from npeff.store.run_files import SETTINGS, home_of
from npeff.variables import resolved

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory


def stored_config(path: Path, name: str) -> RunConfig:
    """Return the stored configuration of a run and of one of its factorizations.

    If the factorization has no settings, its sections are those of ``run.yaml`` (the former layout), or defaults.

    Raises:
        RunDirectoryError: A file is damaged.
    """
    stored, settings = path / "run.yaml", home_of(path, name) / SETTINGS
    try:
        return RunConfig.stored(stored, settings if settings.exists() else None, name)
    except ConfigError as error:
        problem = f"the stored configuration of the run is damaged: {error}"
        raise RunDirectoryError(problem, "restore it from a copy", path=stored, separator="; ") from None


def is_defined(run: RunDirectory) -> bool:
    """Return whether the run directory has the settings of the factorization."""
    return run.settings.exists() or (run.name == DEFAULT and has_former_sections(run.path))


def has_former_sections(path: Path) -> bool:
    """Return whether ``run.yaml`` has the sections of a factorization, as in the former layout."""
    try:
        return "\nfactorization:" in "\n" + (path / "run.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def refuse_other_settings(run: RunDirectory) -> None:
    """Check that the configuration of a command is that of the stored results.

    Raises:
        RunDirectoryError: It is another one. Nothing is written.
    """
    stored = stored_config(run.path, run.name)
    different = run.config.differences(stored)
    of_run = [key for key in different if _section(key) not in FACTORIZATION_SECTIONS]
    if of_run:
        remedy = "choose another run_dir"
        if not run.has_results():
            remedy += f", or delete {run.path} (it has no results yet) to start over"
        raise RunDirectoryError(
            f"{run.path} holds a run with another configuration (it differs in {', '.join(of_run)})",
            remedy,
            path=run.path,
        )
    if not is_defined(run) or not run.has_factorization():
        return
    if different:
        raise RunDirectoryError(
            f"{run.path} holds the factorization {run.name} with other settings (it differs in {', '.join(different)})",
            "set another factorization.name (or use `npeff factorize --name NAME`) to keep both, or delete it with "
            f"`npeff rm {run.path} --factorization {run.name}`",
            path=run.home,
        )
    if run.config.factorization.max_iterations < stored.factorization.max_iterations:
        refuse_fewer_iterations(run)


def refuse_other_fishers(config: RunConfig) -> None:
    """Check that a configuration with ``fishers.from`` has the settings of the run that it names.

    Raises:
        RunDirectoryError: It has other settings, or there is no such run.
    """
    from npeff.runs.directory import RunDirectory

    if config.fishers.from_ is None:
        return
    other = RunDirectory.open_any(resolved(config.fishers.from_, "fishers.from"))
    different = [
        key for key in config.differences(other.config) if _section(key) in FISHER_SECTIONS and key != "fishers.from"
    ]
    if different:
        raise RunDirectoryError(
            f"{', '.join(different)} cannot differ from the settings of {other.path}, whose Fishers this run uses "
            "(fishers.from)",
            "remove them from the run file",
        )


def refuse_fewer_iterations(run: RunDirectory) -> None:
    """Check that the solver has not made more steps than ``factorization.max_iterations``.

    Raises:
        RunDirectoryError: It has made more steps.
    """
    limit, done = run.config.factorization.max_iterations, steps_done(run)
    if limit < done:
        raise RunDirectoryError(
            f"the factorization {run.name} of {run.path} has made {done} steps, more than "
            f"factorization.max_iterations: {limit}",
            f"set it to {done} or more, or set another factorization.name (or use `npeff factorize --name NAME`)",
            path=run.home,
        )


def steps_done(run: RunDirectory) -> int:
    """Return the number of steps of the solver that are stored."""
    steps = [int(path.name) for path in run.checkpoints.glob("*") if path.name.isdecimal()]
    with suppress(RunDirectoryError):  # a damaged record, which the stage reports
        steps.append((run.record("factorize") or {}).get("n_iter", 0))
    return max(steps, default=0)


def settle(run: RunDirectory) -> None:
    """Write the configuration of a locked run where it is missing or differs.

    Raises:
        RunDirectoryError: The run has results with another configuration.
    """
    new = not (run.path / "run.yaml").exists()
    if new:
        run.write(run.path / "run.yaml", _of_the_run(run.config))
    else:
        refuse_other_settings(run)
    if new or not is_defined(run) or _is_changed(run):
        if run.home == run.path:  # the former layout
            run.write(run.path / "run.yaml", _with_stored_run_dir(run).to_yaml())
        else:
            if not run.settings.exists() and is_remote(run.home) and not run.has_factorization():
                remove_directory(run.home)  # remains of a deleted factorization
            run.write(run.settings, run.config.to_yaml(FACTORIZATION_SECTIONS))
    restore_provenance(run)


def _is_changed(run: RunDirectory) -> bool:
    stored, config = stored_config(run.path, run.name), run.config
    sections = ("factorization", "report", *OPTIONAL_SECTIONS)
    changed = any(getattr(stored, section) != getattr(config, section) for section in sections)
    return changed or bool(config.differences(stored))


def restore_provenance(run: RunDirectory) -> None:
    """Write the provenance file of a run if it is missing."""
    path = run.path / "provenance.json"
    if not path.exists():
        run.write(path, json.dumps(provenance(run.config), indent=2))


def write_without_former_sections(run: RunDirectory) -> None:
    """Write ``run.yaml`` with the sections of the run only."""
    run.write(run.path / "run.yaml", _of_the_run(_with_stored_run_dir(run)))


def _with_stored_run_dir(run: RunDirectory) -> RunConfig:
    """Return the configuration with the stored text of ``run_dir``, in which variables are names."""
    return run.config.model_copy(update={"run_dir": stored_config(run.path, run.name).run_dir})


def _of_the_run(config: RunConfig) -> str:
    return config.to_yaml([name for name in RunConfig.model_fields if name not in FACTORIZATION_SECTIONS])


def _section(key: str) -> str:
    return key.partition(".")[0]
