"""Write ``docs/run-file.md`` from the models of the run file. ``tests/test_site.py`` holds the page to them.

python docs/site/run_file.py
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from npeff.runs.config import RunConfig
from pydantic import BaseModel

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "run-file.md"
_WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    NoneType: "none",
    dict: "mapping",
}
_ELSEWHERE = {"task": "tasks.md", "parameters": "fishers.md"}
"""Pages that describe a section without a table of its keys."""

_TOP = """\
# Keys of the run file

All keys of a run file, with their types and defaults. Unknown keys are errors. The page that is named below a heading
tells what the keys mean. A key with a dot is a key of a mapping: `sketch.dim` is `sketch: {dim: 4096}`.

This page is made from the code: `python docs/site/run_file.py`. `RunConfig.model_json_schema()` returns the same as a
JSON schema, for editors and other programs.
"""


def page() -> str:
    """Return the text of the page."""
    parts = [_TOP, "## Top level\n", _table([row for row in _rows(RunConfig) if not row[3]])]
    for name, section in _sections().items():
        parts += [f"## `{name}`\n\nDescribed in {_described_in(name)}.\n", _table(_rows(section))]
    return "\n".join(parts)


def _sections() -> dict[str, Any]:
    found = {name: _models(field.annotation) for name, field in RunConfig.model_fields.items()}
    return {name: models[0] for name, models in found.items() if models}


def _rows(model: Any, prefix: str = "") -> list[tuple[str, str, str, bool]]:
    """Return the key, type and default of each key, and whether it is a section."""
    rows = []
    for name, annotation, default in _keys(model):
        inner = _models(annotation)
        if inner and prefix == "" and model is RunConfig:
            rows.append((name, "", "", True))
        elif inner:
            rows += _rows(inner[0], f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _type(annotation), _default(default), False))
    return rows


def _keys(model: Any) -> list[tuple[str, Any, Any]]:
    if is_dataclass(model):
        hints = get_type_hints(model, include_extras=True)
        return [(each.name, hints[each.name], each.default) for each in fields(model)]
    return [
        (field.alias or name, field.annotation, MISSING if field.is_required() else field.get_default())
        for name, field in model.model_fields.items()
    ]


def _models(annotation: Any) -> list[Any]:
    """Return the models of mappings that a type contains, but not those inside lists."""
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [model for each in get_args(annotation) for model in _models(each)]
    is_model = isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation))
    return [annotation] if is_model else []


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(each) for each in arguments))
    if origin in (tuple, list):
        return "list of " + " or ".join(
            dict.fromkeys(_plural(_type(each)) for each in arguments if each is not Ellipsis)
        )
    return _WORDS.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _plural(kind: str) -> str:
    return kind.replace("list of", "lists of") if kind.startswith("list of") else f"{kind}s"


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if isinstance(value, float):
        return f"`{value:.6g}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return "empty" if value in ("", {}) else f"`{value}`"


def _described_in(section: str) -> str:
    pages = sorted(path for path in (ROOT / "docs").glob("*.md") if path != PAGE)
    head = re.compile(rf"^\| key of `{section}` \|", re.MULTILINE)
    found = [path.name for path in pages if head.search(path.read_text(encoding="utf-8"))] or [_ELSEWHERE[section]]
    return ", ".join(f"[{name}]({name})" for name in found)


def _table(rows: list[tuple[str, str, str, bool]]) -> str:
    lines = [f"| `{name}` | {kind} | {default} |" for name, kind, default, _ in rows]
    return "\n".join(["| key | type | default |", "|---|---|---|", *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
