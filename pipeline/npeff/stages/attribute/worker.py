"""The worker of the stage `attribute`: the positions of a component's top examples where its direction acts.

An item is a component. Each example is a separate batch, so that positions of the layers' outputs are its positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.gradients import GradientCollector, LabelSpec, position_shares
from npeff.models.loaded import ModelSpec
from npeff.runs.definition import unit_file
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import rows_to_columns, write_table
from npeff.tasks import Token

_TABLE = "position_shares"


@dataclass(frozen=True)
class AttributionPaths:
    directions: Path
    results: Path
    """Folder of one Parquet file per finished component."""
    checksums: Mapping[int, str] = field(default_factory=dict)
    """Checksums of the directions."""
    lineage: str | None = None
    """What the results are made from, see `npeff.runs.lineage`."""


class AttributionWorker:
    """Splits the evidence of components' top examples over positions, one component per call.

    Args:
        model: the run's model.
        labels: labels of the gradient rows.
        paths: store of the directions, and folder of the results.
        examples: numbers of each component's examples.
    """

    def __init__(
        self, model: ModelSpec, labels: LabelSpec, paths: AttributionPaths, examples: Mapping[int, Sequence[int]]
    ) -> None:
        self._loaded = model.load()
        self._collector = GradientCollector(
            self._loaded.model, self._loaded.logits, self._loaded.layout, labels, self._loaded.one
        )
        self._directions, self._paths, self._examples = (
            DirectionStore.open(paths.directions, paths.checksums),
            paths,
            examples,
        )

    def attribute(self, component: int) -> int:
        """Write the component's rows of the table `position_shares` to a file. Returns the number of rows."""
        examples = list(self._examples[component])
        tokens = self._loaded.tokens(examples) if examples else None
        rows: list[dict[str, Any]] = []
        if tokens is not None:
            stored = self._directions.read(component)
            device = self._loaded.device
            directions = {name: torch.from_numpy(values)[None].to(device) for name, values in stored.items()}
            for example, row in zip(examples, tokens, strict=True):
                rows += self._rows(component, example, row, directions)
        file = unit_file(self._paths.results, component, _TABLE, first=_TABLE)
        write_table(file, _TABLE, rows_to_columns(rows, _TABLE), self._paths.lineage)
        return len(rows)

    def _rows(
        self, component: int, example: int, tokens: Sequence[Token], directions: Mapping[str, torch.Tensor]
    ) -> list[dict[str, Any]]:
        batch = self._loaded.batch([example])
        targets = self._loaded.targets(batch, [example])
        found = position_shares(self._collector, batch, directions, (len(tokens),), [example], targets)
        evidence = float(found.evidence_kB[0, 0])
        if not (np.isfinite(evidence) and evidence > 0):
            return []
        shares_T = (found.shares_kBT[0, 0] / evidence).tolist()
        return [
            {
                "component": component,
                "example": example,
                "position": position,
                "start": token.start,
                "stop": token.stop,
                "token": token.text,
                "share": share,
            }
            for position, (token, share) in enumerate(zip(tokens, shares_T, strict=True))
        ]
