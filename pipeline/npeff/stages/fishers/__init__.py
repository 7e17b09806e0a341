"""Stage `fishers`: the low-rank Fisher of every example."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from npeff.runs.definition import StageDefinition, Summary, UnitProgress, finished

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory


def _units(run: RunDirectory) -> UnitProgress:
    total = None
    try:
        layout = json.loads((run.fishers / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        total = -(-layout["n_examples"] // layout["shard_size"])
    except (OSError, ValueError, KeyError):
        pass  # not created yet, or damaged, which `check` reports
    return UnitProgress(len(finished(run.shard_records)), total, "shards")


def _details(record: Summary) -> str:
    whose = f", those of {record['from']}" if "from" in record else ""
    return f"{record['n_examples']} examples, {record['n_invalid']} invalid, rank {record['rank']}{whose}"


FISHERS = StageDefinition(
    name="fishers",
    help="Compute and store the low-rank Fisher of every example.",
    function="npeff.stages.fishers.stage:compute_fishers",
    stores=("fishers.zarr", "diagonal_fisher.safetensors"),
    optional={"diagonal_fisher.safetensors": "fishers.diagonal.mean"},
    traces=("fishers.zarr",),
    parts="npeff.stages.fishers.parts:fisher_parts",
    units=_units,
    details=_details,
    settings=lambda config: config.signature("task", "parameters", "fishers", "seed"),
    recomputed=False,
    stands=lambda run, record: len(finished(run.shard_records)) >= record["n_shards"],
)
