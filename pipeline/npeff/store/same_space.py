"""Check whether the components of two runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAME_SPACE = {
    "sketch": "sketch or seed",
    "parameter_layout": "parameters",
    "model_fingerprint": "model",
}
"""Attributes of a Fisher store that must agree if one run uses components of another, with names for messages."""


def differences_in_space(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the differences between two runs that prevent a comparison of their components; empty if comparable.

    Args:
        mine: Attributes of the Fisher store of one run.
        theirs: Attributes of the Fisher store of the other run.
    """
    return [words for name, words in _SAME_SPACE.items() if mine.get(name) != theirs.get(name)]
