"""What a stage is: one value, which can be read without importing the code of the stage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npeff.store.table_names import WRITTEN_BY

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory

Summary = dict[str, Any]
"""What a complete stage has recorded of itself."""


@dataclass(frozen=True)
class UnitProgress:
    """How many of a stage's units (shards, steps, components) are finished."""

    done: int
    total: int | None
    """None where it is not known in advance."""
    unit: str

    def __str__(self) -> str:
        return f"{self.done}/{self.total} {self.unit}" if self.total is not None else f"{self.done} {self.unit}"


def finished(folder: Path) -> dict[int, Path]:
    """Units (shards, components) whose result or record a worker has left in ``folder``, with its file."""
    return {int(path.stem): path for path in sorted(folder.glob("*.*")) if path.stem.isdecimal()}


def units_by_component(run: RunDirectory, stage: str, unit: str) -> UnitProgress:
    """The progress of a stage that leaves a result for each component."""
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
    """What the stage does, as the one line that the command line shows."""
    function: str
    """``(run, *, executor=None, progress=None)``: runs the stage, or returns what a complete one has recorded."""
    after: StageDefinition | None = None
    """The stage whose results this stage needs."""
    in_every_run: bool = True
    """Whether ``npeff run`` includes the stage."""
    leaves: str | None = None
    """The name of the stage whose record this stage writes, where it takes that stage's place."""
    stores: tuple[str, ...] = ()
    """Files and folders that a complete stage has written, besides its tables, relative to the run directory."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Those tables and stores that are written only where a key of the run file is set: name to dotted key."""
    completes: tuple[str, ...] = ()
    """Tables of earlier stages to which this stage adds columns."""
    completed_later: Mapping[str, str] = field(default_factory=dict)
    """Tables that a later stage completes, with the name of that stage, whose record holds their checksums."""
    traces: tuple[str, ...] = ()
    """Files and folders that exist once the stage has begun; ``partial/NAME`` unless given."""
    parts: str | None = None
    """``(run) -> Iterator[Part]``: what `check` verifies besides the record, the tables and the stores."""
    units: Callable[[RunDirectory], UnitProgress | None] = lambda run: None
    """How far the stage is."""
    details: Callable[[Summary], str] = lambda record: ""
    """The line that `status` shows of a complete stage."""
    stands: Callable[[RunDirectory, Summary], bool] = lambda run, record: True
    """Whether a record still says that the stage is complete, given what else is in the run directory."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that a complete stage has written."""
        return (*(table for table, stage in WRITTEN_BY.items() if stage == self.name), *self.completes)

    @property
    def record(self) -> str:
        """The name of its record."""
        return self.leaves or self.name

    def __call__(self, run: RunDirectory, *arguments: Any, **options: Any) -> Any:
        """Run the stage."""
        return self.resolve(self.function)(run, *arguments, **options)

    @staticmethod
    def resolve(path: str) -> Any:
        """The object that ``"module:attribute"`` names."""
        module, _, attribute = path.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def ancestors(self) -> Iterator[StageDefinition]:
        """The stages whose results this stage needs, the nearest first."""
        stage = self.after
        while stage is not None:
            yield stage
            stage = stage.after
