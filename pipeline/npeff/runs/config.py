"""What a run is: frozen pydantic models, read from YAML, with unknown keys refused.

A run file is a mapping; every key has a default except ``run_dir``, ``task`` and ``factorization.n_components``.
`RunConfig.from_yaml` reads one, `RunConfig.to_yaml` writes the resolved configuration, with every default filled in.

``${NAME}`` in any text of a run file stands for the environment variable NAME, which must be set: a run file that is
shared says ``data: ${DATA}/pairs.parquet``. ``$${NAME}`` stands for the text ``${NAME}`` itself. Variables are resolved
where the run file is read, before anything is sent elsewhere, and what a run keeps in its folder has their values.
"""

from __future__ import annotations

import hashlib
import json
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

MAX_ITERATIONS = "factorization.max_iterations"


_FREE: dict[str, Any] = {
    **dict.fromkeys(("run_dir", "executor", "selection", "repair", "report"), True),
    "lift": {"memory_limit_mb", "components"},
    "factorization": {"memory_limit_mb", "checkpoint_every", "metrics"},
}
"""Keys that change no result."""


class RunConfig(Section):
    run_dir: Annotated[str, Field(min_length=1, pattern="^[^\\x00]*$")]
    """Folder that everything is written to."""
    task: TaskConfig
    factorization: FactorizationConfig
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the sketch, the split into fitted and held-out examples, the initialization and the random controls."""
    parameters: ParametersConfig = ParametersConfig()
    fishers: FishersConfig = FishersConfig()
    selection: SelectionConfig = SelectionConfig()
    lift: LiftConfig = LiftConfig()
    verification: VerificationConfig = VerificationConfig()
    repair: RepairConfig = RepairConfig()
    report: ReportConfig = ReportConfig()
    executor: ExecutorConfig = ExecutorConfig()

    @model_validator(mode="after")
    def _what_is_factorized_is_stored(self) -> Self:
        kind, stored = self.factorization.kind, self.fishers.diagonal
        if kind != "fishers" and self.lift.polish_steps:
            raise ValueError("lift.polish_steps is for factorization.kind: fishers: remove it")
        if kind == "diagonal_groups" and not stored.groups:
            raise ValueError("factorization.kind: diagonal_groups needs fishers.diagonal.groups: true")
        if kind == "diagonal_entries" and stored.top_entries is None:
            raise ValueError("factorization.kind: diagonal_entries needs fishers.diagonal.top_entries: 1024, say")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a run file.

        Raises:
            ConfigError: the file is missing, is not YAML, names an environment variable that is not set, or a key is
                missing, unknown or has a value that is refused.
        """
        path = Path(path) if isinstance(path, str) else path  # it may be on an object store
        try:
            return cls.model_validate(read_run_file(path))
        except ValidationError as error:
            raise ConfigError(f"{path}: {one_line(error, cls)}") from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(with_variables_escaped(self.model_dump(mode="json")), sort_keys=False)

    def with_executor(self, **changes: Any) -> RunConfig:
        """This configuration with some of ``executor``'s values replaced."""
        return self._with_section("executor", changes)

    def with_selection(self, **changes: Any) -> RunConfig:
        """This configuration with some of ``selection``'s values replaced."""
        return self._with_section("selection", changes)

    def with_lift(self, **changes: Any) -> RunConfig:
        """This configuration with some of ``lift``'s values replaced."""
        return self._with_section("lift", changes)

    def _with_section(self, name: str, changes: dict[str, Any]) -> RunConfig:
        section: Section = getattr(self, name)
        try:
            changed = type(section).model_validate(section.model_dump() | changes)
        except ValidationError as error:
            raise ConfigError(f"{name}: {one_line(error, type(section))}") from None
        return self.model_copy(update={name: changed})

    def differences(self, other: RunConfig) -> list[str]:
        """Dotted names of the keys whose values differ from an earlier configuration's, those apart that change no
        result, and a larger ``factorization.max_iterations``: the same run may go on elsewhere, with other workers or
        another memory limit, or for longer."""
        mine, theirs = (_flatten(config.model_dump(mode="json", exclude=_FREE)) for config in (self, other))
        different = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
        if self.factorization.max_iterations >= other.factorization.max_iterations:
            different.discard(MAX_ITERATIONS)
        return sorted(different)

    def with_max_iterations(self, max_iterations: int) -> RunConfig:
        """This configuration with another limit on the solver's passes."""
        factorization = self.factorization.model_copy(update={"max_iterations": max_iterations})
        return self.model_copy(update={"factorization": factorization})

    def factorization_signature(self) -> str:
        """Short hash of what the solver's checkpoints depend on, besides the Fishers: not on when it stops."""
        wanted = self.factorization.model_dump(mode="json", exclude=_FREE["factorization"] | {"max_iterations"})
        return hashlib.sha256(json.dumps([wanted, self.seed], sort_keys=True).encode()).hexdigest()[:16]

    def signature(self, *sections: str) -> str:
        """Short hash of the named top-level sections: what a stage's stored results depend on."""
        content = self.model_dump(mode="json", include=set(sections), exclude=_FREE)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
