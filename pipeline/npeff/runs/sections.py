"""The types of the keys of a run file."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel


def section_of(kind: Any) -> type[BaseModel] | None:
    """Return the section whose values have this type, which may be one that can be absent; None for another type."""
    kinds = [each for each in get_args(kind) or (kind,) if each is not NoneType]
    only = kinds[0] if len(kinds) == 1 else None
    return only if isinstance(only, type) and issubclass(only, BaseModel) else None
