"""Paths and options of the worker of the stage `verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npeff.runs.definition import unit_file
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import checksums_of
from npeff.store.shard_records import ShardChecksums


@dataclass(frozen=True)
class VerificationPaths:
    factorization: Path
    directions: Path
    examples: Path
    fishers: Path
    shards: Mapping[int, ShardChecksums]
    """Checksums of the stored shards of the Fishers."""
    results: Path
    """Folder of the files of the finished components, see `file`."""
    checksums: Mapping[int, str] = field(default_factory=dict)
    """Checksums of the directions."""
    lineage: str | None = None
    """What the results are made from, see `npeff.runs.lineage`."""

    @classmethod
    def of(cls, run: RunDirectory, results: Path, **changed: Any) -> VerificationPaths:
        """Return the paths of a run.

        Args:
            run: The run.
            results: See the class.
            changed: Other values of the attributes.

        Raises:
            StoreError: As `checksums_of`.
        """
        paths: dict[str, Any] = {
            "factorization": run.factorization,
            "directions": run.directions,
            "examples": run.table("examples"),
            "fishers": run.fishers,
            "shards": checksums_of(run),
            "results": results,
        }
        return cls(**paths | changed)

    def file(self, table: str, component: int) -> Path:
        """Return the file of a component with its rows of a table."""
        return unit_file(self.results, component, table, first="verification")


@dataclass(frozen=True)
class VerificationOptions:
    """Options of the verification, from the run file."""

    n_top: int
    n_baseline: int
    target_kl: float
    epsilon: float | None
    """Fixed length of the steps, instead of a target KL divergence."""
    n_selectivity: int
    n_correlation: int
    seed: int
    batch_size: int
    exact: bool = False
    """Measure everything by passes through the model, and nothing from the stored sketches."""
    lifted: Sequence[int] | None = None
    """Components that have a direction; all components if None."""
    semi_orthogonal: bool = False
    by_evidence: bool = False
    """Whether the stored evidence chooses the examples, instead of the coefficients."""
    ablation: bool = False
    joint_ablation: int = 0
    """Number of random subsets of the other components that are removed; 0 skips the joint ablation."""
    origin: Path | None = None
    """File of the parameters from which displacements are measured; zero if None."""

    @property
    def joined_tables(self) -> list[str]:
        """The tables that are written besides `verification`."""
        optional = {"ablation": self.ablation, "joint_ablation": self.joint_ablation > 0}
        wanted = [table for table, is_wanted in optional.items() if is_wanted]
        return ["prediction_shifts", "example_shifts", "selectivity", *wanted]
