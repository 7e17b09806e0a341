"""Seeded linear maps of gradient rows: identity, TensorSketch, Kronecker, top-k."""

from __future__ import annotations

from npeff.sketches.sketch import Sketch, SketchSpec, make_sketch

__all__ = [
    "Sketch",
    "SketchSpec",
    "make_sketch",
]
