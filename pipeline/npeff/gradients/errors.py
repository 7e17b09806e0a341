"""The one error of this package that a user's model can cause."""

from __future__ import annotations

from npeff.errors import NpeffError


class UnsupportedModelError(NpeffError, ValueError):
    """The model, its logits or the selection of its parameters cannot be used; the message is one line saying why."""
