"""Sketches of gradient rows: identity, TensorSketch, Kronecker and top-k."""

from __future__ import annotations

from npeff.options.sketch import SketchSpec
from npeff.sketches.sketch import Sketch, make_sketch

__all__ = [
    "Sketch",
    "SketchSpec",
    "make_sketch",
]
