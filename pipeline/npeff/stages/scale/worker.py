"""The worker of the stage `scale`. An item is a block of paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.input_fisher.path import Curve, FisherPath, fisher_path
from npeff.models.loaded import ModelSpec
from npeff.runs.definition import unit_file
from npeff.stages.scale import other_spaces
from npeff.stages.scale.curves import Curves
from npeff.stages.scale.plan import Block, Ends, PlannedPath, Request, chosen
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import rows_to_columns, write_table
from npeff.tasks import TaskError
from npeff.tasks.pictures import png

_MORPHS = 6
"""Number of paths of which images are stored."""
_STEPS = 8
"""Steps of ψ and of s between these images."""

Row = dict[str, Any]


@dataclass(frozen=True)
class ScaleOptions:
    """The settings of the stage, with the values of environment variables."""

    points: int
    tolerance: float
    space: str
    along: str | None
    at_once: int
    """Largest number of points of a forward pass."""


@dataclass(frozen=True)
class ScalePaths:
    results: Path
    """Folder with the results of each finished block."""
    directions: Path
    checksums: Mapping[int, str] = field(default_factory=dict)
    """Checksums of the directions."""
    lineage: str | None = None
    """What the results are made from, see `npeff.runs.lineage`."""


class ScaleWorker:
    """Chooses the paths, and measures blocks of them.

    Args:
        model: the run's model.
        paths: folder of the results, and store of the directions.
        options: the settings.
    """

    def __init__(self, model: ModelSpec, paths: ScalePaths, options: ScaleOptions) -> None:
        self._loaded = model.load()
        self._paths, self._options = paths, options
        self._curves = Curves(self._loaded, options.along)

    def plan(self, request: Request) -> tuple[list[Ends], bool]:
        """Return the ends of all paths, and whether they lead from texts to texts.

        An error of the first path in the further space is raised here.
        """
        ends = chosen(request, self._loaded, self._curves)
        first = PlannedPath(0, *ends[0])
        self._other(first, self._curves.of(first.start, first.end), self._curves.image_shape(first.start))
        return ends, self._curves.are_between_texts(first.start)

    def measure(self, block: Block) -> int:
        """Write the rows of a block to files. Returns the number of paths."""
        tables: dict[str, list[Row]] = {"scales": [], "morphs": [], "paths": []}
        for planned in block.paths:
            self._add(planned, tables)
        for table, rows in tables.items():  # last the table whose file marks a finished block
            file = unit_file(self._paths.results, block.number, table, first="paths")
            write_table(file, table, rows_to_columns(rows, table), self._paths.lineage)
        return len(block.paths)

    def _add(self, planned: PlannedPath, tables: dict[str, list[Row]]) -> None:
        options = self._options
        curve = self._curves.of(planned.start, planned.end, self._direction(planned.component))
        found = fisher_path(curve, points=options.points, tolerance=options.tolerance, at_once=options.at_once)
        tables["paths"].append(_path_row(planned, "model", found))
        tables["scales"] += _scale_rows(planned, "model", found)
        if planned.component is not None:
            return
        shape = self._curves.image_shape(planned.start)
        if (other := self._other(planned, curve, shape)) is not None:
            matching, difference = other_spaces.compared(found, other)
            row = _path_row(planned, options.space, other)
            tables["paths"].append(row | {"matching": matching, "largest_difference": difference})
            tables["scales"] += _scale_rows(planned, options.space, other)
        if planned.number < _MORPHS and shape is not None and shape[2] in (1, 3) and found.length > 0:
            tables["morphs"] += _morph_rows(planned, curve, found, shape)

    def _other(self, planned: PlannedPath, curve: Curve, shape: tuple[int, int, int] | None) -> FisherPath | None:
        """Return the path in the further space; None if there is none."""
        points, along = self._options.points, self._options.along
        match self._options.space:
            case "input":
                return other_spaces.of_inputs(curve, points)
            case "gaussian" if along is not None:
                return other_spaces.of_stimulus(self._loaded, along, points)
            case "gaussian" if shape is not None:
                return other_spaces.of_images(curve, shape, points)
            case "gaussian":
                raise TaskError(
                    f"task {self._loaded.spec.task!r}: scale.space: gaussian needs images (examples, channels, height, "
                    "width) as inputs: choose model or input"
                )
        return None

    def _direction(self, component: int | None) -> dict[str, torch.Tensor] | None:
        if component is None:
            return None
        store = DirectionStore.open(self._paths.directions, self._paths.checksums)
        return {name: torch.from_numpy(array) for name, array in store.read(component).items()}


def _path_row(planned: PlannedPath, space: str, path: FisherPath) -> Row:
    length = _finite(path.length)
    share = None if path.changed_length is None or not path.length > 0 else path.changed_length / path.length
    return {
        "path": planned.number,
        "space": space,
        "component": planned.component,
        "from_example": planned.start,
        "to_example": planned.end,
        "length": length,
        "distance": _finite(path.distance),
        "efficiency": None if path.efficiency is None else _finite(path.efficiency),
        "half_at": path.half_at,
        "n_points": len(path.s_n),
        "tolerance_met": path.tolerance_met,
        "share": share,
        "matching": None,
        "largest_difference": None,
    }


def _scale_rows(planned: PlannedPath, space: str, path: FisherPath) -> list[Row]:
    columns = (path.s_n.tolist(), path.fisher_n.tolist(), path.psi_n.tolist())
    return [
        {"path": planned.number, "space": space, "s": s, "fisher": fisher, "psi": _finite(psi)}
        for s, fisher, psi in zip(*columns, strict=True)
    ]


def _morph_rows(planned: PlannedPath, curve: Curve, path: FisherPath, shape: tuple[int, int, int]) -> list[Row]:
    """Return images at equal steps of ψ and of s, with the same grey levels."""
    steps = np.linspace(0.0, 1.0, _STEPS + 1)
    positions = {"psi": path.position_of(steps), "s": steps}
    images = {by: curve.points(s_n)[0].double().cpu().numpy().reshape(-1, *shape) for by, s_n in positions.items()}
    low, high = float(images["s"].min()), float(images["s"].max())
    rows = []
    for by, s_n in positions.items():
        for step, (s, image) in enumerate(zip(s_n.tolist(), images[by], strict=True)):
            rows.append({"path": planned.number, "by": by, "step": step, "s": s, "image": png(image, low, high)})
    return rows


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
