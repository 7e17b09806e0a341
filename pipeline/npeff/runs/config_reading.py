"""Reading of run files: YAML, environment variables in settings, and one-line error messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from npeff.errors import NpeffError, as_one_line, did_you_mean, printable, without_values
from npeff.options.bounds import OutOfBoundsError, shown
from npeff.runs import union_errors, yaml_text
from npeff.runs.sections import section_of
from npeff.runs.yaml_text import plain_value
from npeff.variables import resolved


class ConfigError(NpeffError, ValueError):
    """A run file is missing, unreadable or invalid. The message names the file or the key, and the remedy."""


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the mapping of a run file as it is written, with the names of environment variables.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(yaml_text.LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"no run file at {path}: give the path of a run file (YAML)") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a null character
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > yaml_text.LARGEST_FILE:
        raise ConfigError(f"{path} is not a run file: it is larger than {yaml_text.LARGEST_FILE} bytes")
    try:
        document = yaml_text.parse(content)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} is not a run file: it must contain the keys run_dir, task and factorization.n_components"
        )
    return document


def with_settings_resolved(document: dict[str, Any], model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the mapping of a run file with environment variables replaced in the values that are not texts.

    These values are numbers, switches and words of a fixed list, by the types of the keys of ``model``. The value of a
    variable is read as YAML: ``true`` is a boolean. All other values are returned unchanged.

    Raises:
        VariableError: A variable is not set.
    """
    found = {}
    for name, value in document.items():
        field = model.model_fields.get(name)
        kind = None if field is None else field.annotation
        if (section := section_of(kind)) is not None:
            given = isinstance(value, dict)
            found[name] = with_settings_resolved(value, section, f"{prefix}{name}.") if given else value
        else:
            found[name] = (
                value if kind is None or _holds_texts(kind) else resolved(value, f"{prefix}{name}", plain_value)
            )
    return found


def _holds_texts(kind: Any) -> bool:
    """Return whether a value of this type, or a part of it, is any text."""
    return kind in (str, Any) or (get_origin(kind) is not Literal and any(map(_holds_texts, get_args(kind))))


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{place}{error.problem or error.context}"


_MAPPING = "must be a mapping, such as {key: value}"


_PLAIN = {
    "model_type": _MAPPING,
    "dataclass_type": _MAPPING,
    "dict_type": _MAPPING,
    "tuple_type": 'must be a list, such as ["*"]',
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "string_type": "must be a string",
    "string_too_short": "must be given",
    "string_pattern_mismatch": "must be a path",
}
"""Messages for pydantic's error types in terms of YAML, instead of pydantic's messages in terms of Python."""


_MOST_SHOWN = 5
"""Largest number of errors in a message."""


def one_line(error: ValidationError, model: type[BaseModel], document: dict[str, Any] | None = None) -> str:
    """Return pydantic's errors on a ``model`` as one line, with the nearest known key for an unknown key.

    Args:
        error: The errors.
        model: The type of the validated values.
        document: The mapping of the run file. Values are shown as they are written there.
    """
    problems = union_errors.merged(error.errors(), model)
    parts = [part for problem in problems[:_MOST_SHOWN] for part in _described(problem, model, document)]
    if len(problems) > _MOST_SHOWN:
        parts.append(f"and {len(problems) - _MOST_SHOWN} more")
    return without_values("; ".join(parts))


def _described(problem: Mapping[str, Any], model: type[BaseModel], document: dict[str, Any] | None) -> list[str]:
    """Return the messages of one of pydantic's errors."""
    key = ".".join(map(_shown_key, problem["loc"]))
    given = _written_at(document, problem["loc"], problem["input"])
    match problem["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            hint = did_you_mean(str(problem["loc"][-1]), _known_keys(model, problem["loc"][:-1]))
            return [f"unknown key '{key}'{hint or ' (remove it)'}"]
        case "missing":
            return [f"missing key '{key}'"]
        case "value_error":
            return _refused_values(key, problem["ctx"]["error"], given)
        case union_errors.NONE_OF_THESE:
            return [f"{key} {problem['msg']}, not {shown(given)}"]
    message = _PLAIN.get(problem["type"], problem["msg"].replace("Input should", "must", 1))
    return [f"{key or 'run file'} {message}, not {shown(given)}"]


def _shown_key(part: int | str) -> str:
    return printable(str(part)[:80])


def _written_at(document: Any, keys: tuple[int | str, ...], found: Any) -> Any:
    """Return the value at ``keys`` of a run file, with the names of variables; ``found`` if there is no such key."""
    if document is None:
        return found
    for key in keys:
        if isinstance(document, str):  # the other keys name a type of the value
            return document
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return found
    return document


def _refused_values(section: str, error: ValueError, given: Any) -> list[str]:
    """Return the messages of a section's own validation; numbers out of bounds are described as pydantic does."""
    if isinstance(error, OutOfBoundsError):
        problems = {f"{section}.{key}".lstrip("."): (bound, given[key]) for key, (bound, _) in error.problems.items()}
        return [f"{key} {bound}, not {shown(value)}" for key, (bound, value) in problems.items()]
    said = as_one_line(error)
    return [f"{section}: {said}" if section else said]


def _known_keys(model: type[BaseModel], section: tuple[int | str, ...]) -> list[str]:
    for name in section:
        inner = model.model_fields[str(name)].annotation
        if is_dataclass(inner):
            return [field.name for field in fields(inner)]
        if (found := section_of(inner)) is None:
            return []
        model = found
    return [field.alias or name for name, field in model.model_fields.items()]
