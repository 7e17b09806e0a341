"""The configuration of a run: frozen pydantic models that are read from YAML and refuse unknown keys.

A run file is a mapping. Every key has a default except ``run_dir``, ``task`` and ``factorization.n_components``.
`RunConfig.from_yaml` reads a run file. `RunConfig.to_yaml` writes the configuration with all defaults.

``${NAME}`` in a value of a run file stands for the value of the environment variable NAME; for example,
``data: ${DATA}/pairs.parquet``. ``$${NAME}`` is the text ``${NAME}``. The value may be a secret or differ between
machines. Therefore:

- A configuration contains the text with the name, and so does everything that is written: ``run.yaml``, the report,
  a job's command. Error messages show the name too.
- The value is read from the environment where it is used: that of ``task.name`` and ``task.options`` by every worker
  (`npeff.models.loaded`), that of all other keys by the command (`RunConfig.resolved`). A command does not need the
  variables of values that it does not use.
- Hashes of settings contain the name. Another value of the variable is not another configuration.
- Numbers, switches and words of a fixed list, such as ``seed`` and ``fishers.labels``, are not texts. The results
  contain these settings. Variables in them are replaced when the run file is read, and ``run.yaml`` contains the value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from html import escape
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from npeff import variables
from npeff.errors import printable
from npeff.runs import yaml_text
from npeff.runs.config_edit_sections import RepairConfig, StepConfig
from npeff.runs.config_input_sections import InputsConfig, ScaleConfig
from npeff.runs.config_reading import ConfigError, one_line, read_run_file, with_settings_resolved
from npeff.runs.config_report_section import ReportConfig
from npeff.runs.config_sections import (
    ExecutorConfig,
    FactorizationConfig,
    FishersConfig,
    LiftConfig,
    ParametersConfig,
    Section,
    SelectionConfig,
    TaskConfig,
    VerificationConfig,
)
from npeff.storage.atomic import is_committed
from npeff.storage.commands import DEFAULT
from npeff.storage.errors import StoreError
from npeff.storage.location import absolute_location
from npeff.store.run_files import SETTINGS, home_of

_MAX_ITERATIONS = "factorization.max_iterations"


_FREE: dict[str, Any] = {
    **dict.fromkeys(("run_dir", "executor", "selection", "inputs", "step", "repair", "scale", "report"), True),
    "lift": {"memory_limit_mb", "components"},
    "factorization": {"name", "memory_limit_mb", "checkpoint_every", "metrics"},
}
"""Keys that do not change any result."""

_NOT_HASHED: dict[str, Any] = _FREE | {"fishers": {"from_"}}

FACTORIZATION_SECTIONS = ("factorization", "lift", "verification", "inputs", "repair", "scale", "report")
"""The sections of a factorization. The others belong to the run, and all factorizations of the run share them."""

OPTIONAL_SECTIONS = ("inputs", "scale")
"""Sections whose stages `npeff run` includes only if the section is given. The results depend on these sections."""

FISHER_SECTIONS = ("task", "parameters", "fishers", "seed")
"""The sections that the stored Fishers depend on."""


class RunConfig(Section):
    """The configuration of a run: one model, one data set, and the settings of every stage.

    Texts may contain references to environment variables. `resolved` returns the value of a key.
    """

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
    inputs: InputsConfig | None = None
    """None: ``npeff run`` does not compute the information of the inputs, and ``npeff inputs`` uses the defaults."""
    step: StepConfig = StepConfig()
    repair: RepairConfig = RepairConfig()
    scale: ScaleConfig | None = None
    """If it is given, ``npeff run`` includes the stage `scale`."""
    report: ReportConfig = ReportConfig()
    executor: ExecutorConfig = ExecutorConfig()

    @model_validator(mode="after")
    def _check_factorized_is_stored(self) -> Self:
        kind, stored, labels = self.factorization.kind, self.fishers.diagonal, self.fishers.labels
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
        if kind in ("gradients", "kmeans") and labels not in ("exact", "empirical"):
            raise ValueError(
                f"factorization.kind: {kind} needs fishers.labels: exact or empirical, not {labels}: the rows of other "
                "labels do not determine the gradient of the prediction; change one of them"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a run file.

        The ``run.yaml`` of a run directory is read with the settings of the factorization ``default``.

        Args:
            path: The run file.

        Raises:
            ConfigError: The file is missing or is not YAML; a key is missing, is unknown or has an invalid value; or
                a number, a switch or a word refers to an environment variable that is not set.
        """
        path = Path(path) if isinstance(path, str) else path  # a path may be on an object store
        document = read_run_file(path)
        if path.name == "run.yaml" and "factorization" not in document:
            settings = home_of(path.parent, DEFAULT) / SETTINGS
            document |= read_run_file(settings) if is_committed(settings) else {}
        variables.hide_values_of(document)
        try:
            document = _with_other_fishers(document)
        except variables.VariableError as error:
            raise ConfigError(f"{path}: {error}") from None
        except (StoreError, ConfigError) as error:
            raise ConfigError(f"{path}: fishers.from: {printable(str(error))}") from None
        return cls._validated(document, path)

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
        if settings is not None:
            document |= read_run_file(settings)
        former = document.get("factorization")
        own = document.setdefault("factorization", {"n_components": 1})  # a run without factorizations
        if isinstance(own, dict):
            own["name"] = name
        if isinstance(former, dict) and former.get("kind", "fishers") == "fishers":
            lift = document.setdefault("lift", {})  # earlier releases have no key direction and compute own directions
            if isinstance(lift, dict):
                lift.setdefault("direction", "own")
        variables.hide_values_of(document)
        return cls._validated(document, settings or path)

    @classmethod
    def _validated(cls, document: dict[str, Any], path: Path) -> RunConfig:
        """Return the configuration of a document that was read from ``path``. Raises ConfigError."""
        document |= {name: {} for name in OPTIONAL_SECTIONS if name in document and document[name] is None}
        try:
            return cls.model_validate(with_settings_resolved(document, cls))
        except variables.VariableError as error:
            raise ConfigError(f"{path}: {error}") from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {one_line(error, cls, document)}") from None

    def to_yaml(self, sections: Collection[str] | None = None) -> str:
        """Return the configuration, or some of its sections, as the text of a run file with all defaults."""
        document = self.model_dump(mode="json", include=None if sections is None else set(sections))
        document = {name: value for name, value in document.items() if value is not None}  # sections that are not given
        return yaml_text.write(document)

    def _repr_html_(self) -> str:
        name = escape(f"{self.task.name}, {self.factorization.n_components} components")
        summary = f"<summary><code>RunConfig</code> {name}</summary>"
        return f'<details style="font-size: 13px">{summary}<pre>{escape(self.to_yaml())}</pre></details>'

    def resolved(self, key: str) -> Any:
        """Return the value of a dotted key with environment variables in place of ``${NAME}``.

        Raises:
            VariableError: A variable is not set in this process.
            ConfigError: The value of ``run_dir`` is empty.
        """
        value = variables.resolved(attrgetter(key)(self), key)
        if key == "run_dir" and not value:
            raise ConfigError(f"run_dir must be given: {self.run_dir} is empty")
        return value

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

    def with_step(self, **changes: Any) -> RunConfig:
        """Return this configuration with some values of ``step`` replaced."""
        return self._with_section("step", changes)

    @property
    def inputs_or_default(self) -> InputsConfig:
        """The options of the stage `inputs`: the defaults if the run file does not have the section."""
        return self.inputs or InputsConfig()

    @property
    def scale_or_default(self) -> ScaleConfig:
        """The options of the stage `scale`: the defaults if the run file does not have the section."""
        return self.scale or ScaleConfig()

    def with_scale(self, **changes: Any) -> RunConfig:
        """Return this configuration with some values of ``scale`` replaced, in the defaults if it has no section."""
        return self.model_copy(update={"scale": self.scale_or_default})._with_section("scale", changes)

    def _with_section(self, name: str, changes: dict[str, Any]) -> RunConfig:
        section: Section = getattr(self, name)
        try:
            changed = type(section).model_validate(section.model_dump() | changes)
        except ValidationError as error:
            raise ConfigError(f"{name}: {one_line(error, type(section))}") from None
        config = self.model_copy(update={name: changed})
        try:
            type(self).model_validate(config.model_dump())  # sections are also compared with each other
        except ValidationError as error:
            raise ConfigError(one_line(error, type(self))) from None
        return config

    def differences(self, other: RunConfig) -> list[str]:
        """Return the dotted names of the keys whose values differ from an earlier configuration.

        Texts are compared as they are written, with names of variables (see `with_texts_of`).

        Keys that do not change any result are ignored, and so is ``factorization.max_iterations``, which
        `npeff.runs.settings` compares with the number of steps. A run may therefore be resumed on another machine, with
        other workers, another memory limit or more iterations.
        """
        mine, theirs = (_flatten(config.model_dump(mode="json", exclude=_FREE)) for config in (self, other))
        return sorted(
            key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key) and key != _MAX_ITERATIONS
        )

    def with_texts_of(self, stored: RunConfig) -> RunConfig:
        """Return this configuration with the texts of an earlier one for which both have the same value.

        The values of variables are compared only for keys whose texts differ and on which results depend. The hashes
        are then those of the stored results, for example if an earlier release has stored values instead of names.

        Raises:
            VariableError: A variable of such a key is not set in this process.
        """
        mine, theirs = (config.model_dump(mode="json", exclude=_FREE) for config in (self, stored))
        shared = _with_texts_of(mine, theirs, "")
        if shared == mine:
            return self
        return type(self).model_validate(_merged(self.model_dump(mode="json"), shared))

    def with_sections_of(self, stored: RunConfig) -> RunConfig:
        """Return this configuration with the optional sections of an earlier one that this one lacks."""
        lacking = [name for name in OPTIONAL_SECTIONS if getattr(self, name) is None]
        return self.model_copy(update={name: getattr(stored, name) for name in lacking})

    def with_max_iterations(self, max_iterations: int) -> RunConfig:
        """Return this configuration with another limit on the iterations of the solver."""
        factorization = self.factorization.model_copy(update={"max_iterations": max_iterations})
        return self.model_copy(update={"factorization": factorization})

    def factorization_signature(self) -> str:
        """Return a hash of the settings that the solver's checkpoints depend on, besides the Fishers.

        The iteration limit is not among these settings.
        """
        wanted = self.factorization.model_dump(mode="json", exclude=_FREE["factorization"] | {"max_iterations"})
        if self.factorization.max_probability is None:
            del wanted["max_probability"]  # earlier versions have no such key, and their results stay valid
        return _hash([wanted, self.seed])

    def signature(self, *sections: str) -> str:
        """Return a hash of the named top-level sections, on which the stored results of a stage depend."""
        content = self.model_dump(mode="json", include=set(sections), exclude=_NOT_HASHED)
        return _hash(content)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(variables.for_hash(content), sort_keys=True).encode()).hexdigest()[:16]


def _with_texts_of(mine: Any, theirs: Any, key: str) -> Any:
    """Return ``mine`` with those texts of ``theirs`` that have the same value."""
    match mine, theirs:
        case dict(), dict():
            return {
                name: _with_texts_of(value, theirs[name], f"{key}.{name}".lstrip(".")) if name in theirs else value
                for name, value in mine.items()
            }
        case list(), list() if len(mine) == len(theirs):
            return [_with_texts_of(*pair, key) for pair in zip(mine, theirs, strict=True)]
        case str(), str() if mine != theirs and _same_value(mine, theirs, key):
            return theirs
    return mine


def _same_value(mine: str, theirs: str, key: str) -> bool:
    try:
        return bool(variables.resolved(mine, key) == variables.resolved(theirs, key))
    except variables.VariableError:
        if variables.has_references(mine) and variables.has_references(theirs):
            return False  # the text was edited, or the variable has another name
        raise


def _with_other_fishers(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document of a run file with the settings of the run that ``fishers.from`` names, if there is one.

    Keys that are given stay, and are compared when the run directory is created.
    """
    fishers = document.get("fishers")
    other = fishers.get("from") if isinstance(fishers, dict) else None
    if not isinstance(other, str) or not other:
        return document
    path = absolute_location(variables.resolved(other, "fishers.from"))
    theirs = read_run_file(path / "run.yaml")
    theirs = {name: theirs[name] for name in FISHER_SECTIONS if name in theirs}
    merged = _merged(theirs, document)
    merged["fishers"]["from"] = theirs.get("fishers", {}).get("from") or (
        other if variables.has_references(other) else variables.literal(str(path))
    )
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
