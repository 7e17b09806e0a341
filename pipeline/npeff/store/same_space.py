"""Whether components of one run mean anything in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAME_SPACE = {
    "sketch": "sketch or seed",
    "parameter_layout": "parameters",
    "model_fingerprint": "model",
}
"""Attributes of a Fisher store that must agree where components of one run are used in another, in a user's words."""


def differences_in_space(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two runs, by the attributes of their Fisher stores, so that their components do not compare;
    none where they do."""
    return [words for name, words in _SAME_SPACE.items() if mine.get(name) != theirs.get(name)]
