"""Reading of run files: YAML, environment variables, and one-line error messages."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from npeff.errors import NpeffError, as_one_line
from npeff.options.bounds import OutOfBoundsError

_VARIABLE = re.compile(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class ConfigError(NpeffError, ValueError):
    """A run file is missing, unreadable or invalid. The message names the file or the key, and the remedy."""


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the mapping of a run file, with ``${NAME}`` replaced by environment variables.

    Raises:
        ConfigError: The file is missing, is not YAML, is not a mapping, or refers to an environment variable that is
            not set.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"no run file at {path}: give the path of a run file (YAML)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} is not a run file: it must contain the keys run_dir, task and factorization.n_components"
        )
    try:
        resolved: dict[str, Any] = _map_texts(document, _with_variables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return resolved


def with_variables_escaped(document: dict[str, Any]) -> dict[str, Any]:
    """Return ``document`` with ``${NAME}`` escaped as ``$${NAME}``, so that it is read back unchanged."""
    escaped: dict[str, Any] = _map_texts(document, lambda text, _: _VARIABLE.sub(r"$\g<0>", text))
    return escaped


def _map_texts(tree: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Return ``tree`` with every string replaced by ``change(string, dotted key)``."""
    match tree:
        case str():
            return change(tree, key)
        case dict():
            return {name: _map_texts(value, change, f"{key}.{name}".removeprefix(".")) for name, value in tree.items()}
        case list():
            return [_map_texts(value, change, key) for value in tree]
    return tree


def _with_variables(text: str, key: str) -> str:
    """Return ``text`` with ``${NAME}`` replaced by environment variables."""

    def value(found: re.Match[str]) -> str:
        escaped, name = found.groups()
        if escaped:
            return found[0][1:]
        if name not in os.environ:
            raise ConfigError(f"{key} needs the environment variable {name}, which is not set: export {name}=…")
        return os.environ[name]

    return _VARIABLE.sub(value, text)


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return as_one_line(error)
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


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
    "float_parsing": "must be a number",
    "string_type": "must be a string",
    "string_too_short": "must be given",
    "string_pattern_mismatch": "must be a path",
}
"""Messages for pydantic's error types in terms of YAML, instead of pydantic's messages in terms of Python."""


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """Return pydantic's errors on a ``model`` as one line, with the nearest known key for an unknown key."""
    parts = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            near = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(model, problem["loc"][:-1]), n=1)
            parts.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else " (remove it)"))
        elif problem["type"] == "missing":
            parts.append(f"missing key {key!r}")
        elif problem["type"] == "value_error":
            parts += _refused_values(key, problem["ctx"]["error"], problem["input"])
        else:
            message = _PLAIN.get(problem["type"], problem["msg"].replace("Input should", "must", 1))
            parts.append(f"{key or 'run file'} {message}, not {problem['input']!r:.80}")
    return "; ".join(parts)


def _refused_values(section: str, error: ValueError, given: Any) -> list[str]:
    """Return the messages of a section's own validation; numbers out of bounds are described as pydantic does."""
    if isinstance(error, OutOfBoundsError):
        problems = {f"{section}.{key}".lstrip("."): (bound, given[key]) for key, (bound, _) in error.problems.items()}
        return [f"{key} {bound}, not {value!r:.80}" for key, (bound, value) in problems.items()]
    return [f"{section}: {error}" if section else str(error)]


def _known_keys(model: type[BaseModel], section: tuple[int | str, ...]) -> list[str]:
    for name in section:
        inner = model.model_fields[str(name)].annotation
        if is_dataclass(inner):
            return [field.name for field in fields(inner)]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]
