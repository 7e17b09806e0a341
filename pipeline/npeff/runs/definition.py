"""The definition of a stage, which can be read without importing the code of the stage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npeff.store.table_names import OF_THE_RUN, WRITTEN_BY

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig
    from npeff.runs.directory import RunDirectory

Summary = dict[str, Any]
"""The record of a complete stage."""


@dataclass(frozen=True)
class UnitProgress:
    """How many of a stage's units (shards, steps, components) are finished."""

    done: int
    total: int | None
    """None if the number is not known in advance."""
    unit: str

    def __str__(self) -> str:
        return f"{self.done}/{self.total} {self.unit}" if self.total is not None else f"{self.done} {self.unit}"


def finished(folder: Path) -> dict[int, Path]:
    """Return the files of the finished units (shards, components) in ``folder``, by unit number."""
    return {int(path.stem): path for path in sorted(folder.glob("*.*")) if path.stem.isdecimal()}


def unit_file(results: Path, unit: int, table: str, *, first: str) -> Path:
    """Return the file with a unit's rows of a table, in the folder of the partial results of a stage.

    The file of the table ``first`` marks the unit as finished. It is written last.
    """
    return (results if table == first else results / table) / f"{unit:05d}.parquet"


def units_by_component(run: RunDirectory, stage: str, unit: str) -> UnitProgress:
    """Return the progress of a stage that writes a result file for each component."""
    return UnitProgress(len(finished(run.partial_results(stage))), run.config.factorization.n_components, unit)


@dataclass(frozen=True, eq=False)
class StageDefinition:
    """A stage of a run. The package of each stage defines one, and `npeff.stages.registry.STAGES` lists them.

    Code is named by strings ``"module:attribute"``, which are resolved on use, so that the command line and `status`
    read the definitions of all stages without importing torch.
    """

    name: str
    """The name of the command, and of the record ``stages/NAME.json``."""
    help: str
    """One-line description of the stage for the command line."""
    function: str
    """``(run, *, executor=None, progress="auto")``: runs the stage, or returns the record of a complete stage."""
    after: StageDefinition | None = None
    """The stage whose results this stage needs."""
    in_run: Callable[[RunConfig], bool] = lambda config: True
    """Whether ``npeff run`` includes the stage."""
    leaves: str | None = None
    """The name of the stage whose record this stage writes, if it replaces that stage."""
    stores: tuple[str, ...] = ()
    """Files and folders that the stage writes besides its tables, relative to the run or the factorization."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Tables and stores that are written only if a key of the run file is neither false nor 0: name to dotted key."""
    whole: tuple[str, ...] = ()
    """Tables that are computed from the results of all units, and not for each unit."""
    added: tuple[str, ...] = ()
    """Tables that earlier versions of the program did not write. Their records stay valid without these tables."""
    completes: tuple[str, ...] = ()
    """Tables of earlier stages to which this stage adds columns."""
    completed_later: Mapping[str, str] = field(default_factory=dict)
    """Tables that a later stage completes, with the name of that stage, whose record holds their checksums."""
    traces: tuple[str, ...] = ()
    """Files and folders that exist after the stage has begun; ``partial/NAME`` by default."""
    parts: str | None = None
    """``(run) -> Iterator[Part]``: the parts that `check` verifies besides the record, the tables and the stores."""
    units: Callable[[RunDirectory], UnitProgress | None] = lambda run: None
    """The progress of the stage."""
    details: Callable[[Summary], str] = lambda record: ""
    """The line that `status` shows for a complete stage."""
    settings: Callable[[RunConfig], Any] = lambda config: None
    """The settings that the results depend on, besides those of the stages before (JSON)."""
    recomputed: bool = True
    """Whether results that no longer fit their inputs or settings are computed again. If not, the stage is refused."""
    stands: Callable[[RunDirectory, Summary], bool] = lambda run, record: True
    """Whether a record is still valid, given the other content of the run directory."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that the stage writes or completes."""
        return (*(table for table, stage in WRITTEN_BY.items() if stage == self.name), *self.completes)

    @property
    def of_the_run(self) -> bool:
        """Whether all factorizations of a run share the results of the stage."""
        return self.name in OF_THE_RUN

    @property
    def record(self) -> str:
        """The name of the record of the stage."""
        return self.leaves or self.name

    def __call__(self, run: RunDirectory, *arguments: Any, **options: Any) -> Any:
        """Run the stage."""
        return self.resolve(self.function)(run, *arguments, **options)

    @staticmethod
    def resolve(path: str) -> Any:
        """Import the object ``"module:attribute"``."""
        module, _, attribute = path.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def ancestors(self) -> Iterator[StageDefinition]:
        """Yield the stages whose results this stage needs, directly or indirectly, the nearest first."""
        stage = self.after
        while stage is not None:
            yield stage
            stage = stage.after
