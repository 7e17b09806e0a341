"""The error for models that this package does not support."""

from __future__ import annotations

from npeff.errors import NpeffError


class UnsupportedModelError(NpeffError, ValueError):
    """The model, its logits or the selection of its parameters is not supported. The message is one line."""
