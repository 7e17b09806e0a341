"""The configuration of a run: frozen pydantic models that are read from YAML and refuse unknown keys.

A run file is a mapping. Every key has a default except ``run_dir``, ``task`` and ``factorization.n_components``.
`RunConfig.from_yaml` reads a run file. `RunConfig.to_yaml` writes the resolved configuration with all defaults.

``${NAME}`` in any value of a run file is replaced by the environment variable NAME, which must be set; for example,
``data: ${DATA}/pairs.parquet``. ``$${NAME}`` is the text ``${NAME}``. Variables are resolved when the run file is read,
on the machine that reads it. The run directory stores the resolved values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from npeff.runs.config_reading import ConfigError, one_line, read_run_file, with_variables_escaped
from npeff.runs.config_sections import (
    ExecutorConfig,
    FactorizationConfig,
    FishersConfig,
    LiftConfig,
    ParametersConfig,
    RepairConfig,
    ReportConfig,
    Section,
    SelectionConfig,
    TaskConfig,
    VerificationConfig,
)
from npeff.storage.location import location

_MAX_ITERATIONS = "factorization.max_iterations"


_FREE: dict[str, Any] = {
    **dict.fromkeys(("run_dir", "executor", "selection", "repair", "report"), True),
    "lift": {"memory_limit_mb", "components"},
    "factorization": {"name", "memory_limit_mb", "checkpoint_every", "metrics"},
}
"""Keys that do not change any result."""

_NOT_HASHED: dict[str, Any] = _FREE | {"fishers": {"from_"}}

FACTORIZATION_SECTIONS = ("factorization", "lift", "verification", "repair", "report")
"""The sections of a factorization. The others belong to the run, and all factorizations of the run share them."""

FISHER_SECTIONS = ("task", "parameters", "fishers", "seed")
"""The sections that the stored Fishers depend on."""


class RunConfig(Section):
    """The configuration of a run: one model, one data set, and the settings of every stage."""

    run_dir: Annotated[str, Field(min_length=1, pattern="^[^\\x00]*$")]
    """Directory, or URI ``s3://bucket/prefix``, of all results."""
    task: TaskConfig
    factorization: FactorizationConfig
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the sketch, the split into fit and held-out examples, the initialization and the random controls."""
    parameters: ParametersConfig = ParametersConfig()
    fishers: FishersConfig = FishersConfig()
    selection: SelectionConfig = SelectionConfig()
    lift: LiftConfig = LiftConfig()
    verification: VerificationConfig = VerificationConfig()
    repair: RepairConfig = RepairConfig()
    report: ReportConfig = ReportConfig()
    executor: ExecutorConfig = ExecutorConfig()

    @model_validator(mode="after")
    def _check_factorized_is_stored(self) -> Self:
        kind, stored = self.factorization.kind, self.fishers.diagonal
        if kind != "fishers" and self.lift.polish_steps:
            raise ValueError(
                "lift.polish_steps needs factorization.kind: fishers; remove lift.polish_steps, or change the kind"
            )
        if kind == "diagonal_groups" and not stored.groups:
            raise ValueError("factorization.kind: diagonal_groups needs fishers.diagonal.groups: true; add this key")
        if kind == "diagonal_entries" and stored.top_entries is None:
            raise ValueError(
                "factorization.kind: diagonal_entries needs fishers.diagonal.top_entries; add this key, such as 1024"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a run file.

        Args:
            path: The run file.

        Raises:
            ConfigError: The file is missing, is not YAML, or refers to an environment variable that is not set; or a
                key is missing, is unknown or has an invalid value.
        """
        path = Path(path) if isinstance(path, str) else path  # a path may be on an object store
        try:
            return cls.model_validate(_with_other_fishers(read_run_file(path)))
        except ValidationError as error:
            raise ConfigError(f"{path}: {one_line(error, cls)}") from None

    @classmethod
    def stored(cls, path: Path, settings: Path | None, name: str) -> RunConfig:
        """Read the configuration that a run directory holds.

        Args:
            path: The file ``run.yaml`` of the run.
            settings: The file ``factorization.yaml`` of the factorization, if there is one.
            name: The name of the factorization.

        Raises:
            ConfigError: As in `from_yaml`.
        """
        document = read_run_file(path)
        try:
            if settings is not None:
                document |= read_run_file(settings)
            own = document.setdefault("factorization", {"n_components": 1})  # a run without factorizations
            if isinstance(own, dict):
                own["name"] = name
            return cls.model_validate(document)
        except ValidationError as error:
            raise ConfigError(f"{settings or path}: {one_line(error, cls)}") from None

    def to_yaml(self, sections: Collection[str] | None = None) -> str:
        """Return the configuration, or some of its sections, as the text of a run file with all defaults."""
        document = self.model_dump(mode="json", include=None if sections is None else set(sections))
        return yaml.safe_dump(with_variables_escaped(document), sort_keys=False)

    def with_executor(self, **changes: Any) -> RunConfig:
        """Return this configuration with some values of ``executor`` replaced."""
        return self._with_section("executor", changes)

    def with_selection(self, **changes: Any) -> RunConfig:
        """Return this configuration with some values of ``selection`` replaced."""
        return self._with_section("selection", changes)

    def with_factorization(self, **changes: Any) -> RunConfig:
        """Return this configuration with some values of ``factorization`` replaced."""
        return self._with_section("factorization", changes)

    def with_lift(self, **changes: Any) -> RunConfig:
        """Return this configuration with some values of ``lift`` replaced."""
        return self._with_section("lift", changes)

    def _with_section(self, name: str, changes: dict[str, Any]) -> RunConfig:
        section: Section = getattr(self, name)
        try:
            changed = type(section).model_validate(section.model_dump() | changes)
        except ValidationError as error:
            raise ConfigError(f"{name}: {one_line(error, type(section))}") from None
        return self.model_copy(update={name: changed})

    def differences(self, other: RunConfig) -> list[str]:
        """Return the dotted names of the keys whose values differ from an earlier configuration.

        Keys that do not change any result are ignored, and so is ``factorization.max_iterations``, which
        `npeff.runs.settings` compares with the number of steps. A run may therefore be resumed on another machine, with
        other workers, another memory limit or more iterations.
        """
        mine, theirs = (_flatten(config.model_dump(mode="json", exclude=_FREE)) for config in (self, other))
        return sorted(
            key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key) and key != _MAX_ITERATIONS
        )

    def with_max_iterations(self, max_iterations: int) -> RunConfig:
        """Return this configuration with another limit on the iterations of the solver."""
        factorization = self.factorization.model_copy(update={"max_iterations": max_iterations})
        return self.model_copy(update={"factorization": factorization})

    def factorization_signature(self) -> str:
        """Return a hash of the settings that the solver's checkpoints depend on, besides the Fishers.

        The iteration limit is not among these settings.
        """
        wanted = self.factorization.model_dump(mode="json", exclude=_FREE["factorization"] | {"max_iterations"})
        return hashlib.sha256(json.dumps([wanted, self.seed], sort_keys=True).encode()).hexdigest()[:16]

    def signature(self, *sections: str) -> str:
        """Return a hash of the named top-level sections, on which the stored results of a stage depend."""
        content = self.model_dump(mode="json", include=set(sections), exclude=_NOT_HASHED)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _with_other_fishers(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document of a run file with the settings of the run that ``fishers.from`` names, if there is one.

    Keys that are given stay, and are compared when the run directory is created.
    """
    fishers = document.get("fishers")
    other = fishers.get("from") if isinstance(fishers, dict) else None
    if not isinstance(other, str) or not other:
        return document
    path = location(other).expanduser().absolute()
    theirs = read_run_file(path / "run.yaml")
    theirs = {name: theirs[name] for name in FISHER_SECTIONS if name in theirs}
    merged = _merged(theirs, document)
    merged["fishers"]["from"] = theirs.get("fishers", {}).get("from") or str(path)
    return merged


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return nested mappings with the keys of both. A value of ``second`` replaces that of ``first``."""
    both = {
        name: _merged(first[name], value) if isinstance(value, dict) and isinstance(first.get(name), dict) else value
        for name, value in second.items()
    }
    return first | both


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
