"""pydantic's errors on a key whose value may have several types, as one error that says what is allowed.

pydantic refuses such a value once for each type, and names the types in terms of Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter

from npeff.runs.sections import section_of

NONE_OF_THESE = "none_of_these"
"""Type of the merged error. Its message says what the value must be."""

_SHOULD_BE = "Input should be "
_OF_NUMBERS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "a list",
}


def merged(problems: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> list[Mapping[str, Any]]:
    """Return pydantic's errors on a ``model`` with one error for each key whose value may have several types.

    The keys of the merged errors do not name these types.
    """
    found: list[Mapping[str, Any]] = []
    for (depth, key), group in groupby(problems, lambda problem: _key_of_union(problem["loc"], model)):
        same = list(group)
        inside = [problem for problem in same if len(problem["loc"]) > depth + 1]
        if not depth:
            found += same
        elif inside:  # the value has one of the types, and a part of it is wrong
            found += [{**problem, "loc": (*key, *problem["loc"][depth + 1 :])} for problem in inside]
        else:
            bounds = [problem["msg"] for problem in same if problem["type"] in _OF_NUMBERS]
            message = _allowed(_kind_at(key, model), bounds[0].removeprefix(_SHOULD_BE) if bounds else None)
            found.append({**same[0], "type": NONE_OF_THESE, "loc": key, "msg": f"must be {message}"})
    return found


def _key_of_union(keys: tuple[int | str, ...], model: type[BaseModel]) -> tuple[int, tuple[int | str, ...]]:
    """Return the number of keys that lead to a value of several types, and these keys; 0 and none if there is none.

    The last of pydantic's keys then names one of the types.
    """
    section: type[BaseModel] | None = model
    for depth, name in enumerate(keys[:-1], 1):
        if section is None or str(name) not in section.model_fields:
            break
        kind = section.model_fields[str(name)].annotation
        if get_origin(kind) in (Union, UnionType) and len([each for each in get_args(kind) if each != NoneType]) > 1:
            return depth, keys[:depth]
        section = section_of(kind)
    return 0, ()


def _kind_at(keys: Sequence[int | str], model: type[BaseModel]) -> Any:
    kind: Any = model
    for name in keys:
        section = section_of(kind)
        assert section is not None
        kind = section.model_fields[str(name)].annotation
    return kind


def _allowed(kind: Any, bound: str | None) -> str:
    """Return a list of the allowed values.

    Args:
        kind: The union of types.
        bound: The bound that a number violates; None if the value is no number.
    """
    schema = TypeAdapter(kind).json_schema()
    parts = [part for each in schema["anyOf"] for part in _described(each, bound)]
    return " or ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _described(schema: Mapping[str, Any], bound: str | None) -> list[str]:
    words = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    kind = schema.get("type")
    if words or kind == "null":
        return [repr(word) for word in words]
    name = _TYPES.get(str(kind), "a mapping")
    if kind not in ("integer", "number"):
        return [name]
    lowest = {"exclusiveMinimum": "greater than", "minimum": "greater than or equal to"}
    bounds = [f"{relation} {schema[key]:g}" for key, relation in lowest.items() if key in schema]
    return [" ".join([name, *([bound] if bound else bounds)])]
