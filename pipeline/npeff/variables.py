"""Environment variables in the texts of a run file: ``${NAME}`` stands for the value of the variable NAME.

A configuration contains the texts of the run file, with the names. `resolved` returns the value of a text. It is called
only where the value is used, and the value is not stored. Values may be secrets: in every message, `npeff.errors`
replaces the values of all variables that a process has read in a run file or resolved by their names. ``$${NAME}`` is
the text ``${NAME}``.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from typing import Any

from npeff.errors import NpeffError, hide_value_of, printable

_REFERENCE = re.compile(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class VariableError(NpeffError, ValueError):
    """An environment variable that is not set where its value is needed."""


def resolved(tree: Any, key: str, read: Callable[[str], Any] = str) -> Any:
    """Return ``tree``, a value of the run file, with environment variables in place of ``${NAME}``.

    Args:
        tree: A text, or lists and mappings of texts and other values. Keys of mappings are not changed.
        key: The dotted key of the run file, for the error message.
        read: Function that is applied to the value of every text with a reference.

    Raises:
        VariableError: A variable is not set in this process.
    """

    def change(text: str, key: str) -> Any:
        value = _resolved_text(text, key)
        return read(value) if has_references(text) else value

    return _map_texts(tree, change, key)


def literal(tree: Any) -> Any:
    """Return ``tree`` with ``${NAME}`` escaped as ``$${NAME}``: `resolved` of the result is ``tree``."""
    return _map_texts(tree, lambda text, _: _REFERENCE.sub(r"$\g<0>", text), "")


def has_references(text: str) -> bool:
    """Return whether a text refers to an environment variable."""
    return any(not found[1] for found in _REFERENCE.finditer(text))


def hide_values_of(tree: Any) -> None:
    """Hide the values of all variables to which ``tree`` refers in the messages of this process."""

    def hide(text: str, _: str) -> str:
        for escaped, name in _REFERENCE.findall(text):
            if not escaped:
                hide_value_of(name)
        return text

    _map_texts(tree, hide, "")


def for_hash(tree: Any) -> Any:
    """Return ``tree`` for a hash of settings: with the names of variables, and without their values.

    A text without references is hashed as its value. References are marked, so that ``${NAME}`` and ``$${NAME}`` have
    different hashes.
    """
    return _map_texts(tree, lambda text, _: _REFERENCE.sub(_marked, text), "")


def _marked(found: re.Match[str]) -> str:
    return found[0][1:] if found[1] else "\0" + found[0]


def _resolved_text(text: str, key: str) -> str:
    def value(found: re.Match[str]) -> str:
        escaped, name = found.groups()
        if escaped:
            return found[0][1:]
        if name not in os.environ:
            raise VariableError(
                f"{printable(key):.300} needs the environment variable {name}, which is not set on {platform.node()}",
                f"export {name}=… there, or give a submitted job --env {name}",
            )
        hide_value_of(name)
        return os.environ[name]

    return _REFERENCE.sub(value, text)


def _map_texts(tree: Any, change: Callable[[str, str], Any], key: str) -> Any:
    """Return ``tree`` with every string replaced by ``change(string, dotted key)``."""
    match tree:
        case str():
            return change(tree, key)
        case dict():
            return {name: _map_texts(value, change, f"{key}.{name}".removeprefix(".")) for name, value in tree.items()}
        case list():
            return [_map_texts(value, change, key) for value in tree]
        case tuple():
            return tuple(_map_texts(value, change, key) for value in tree)
    return tree
