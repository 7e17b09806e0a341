"""Options for the sketch of gradient rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from npeff.options.bounds import COUNT, OptionError, check_bounds

SketchKind = Literal["identity", "tensorsketch", "kronecker", "topk"]


@dataclass(frozen=True)
class SketchSpec:
    """Options that, together with a seed and the names and shapes of the parameters, determine the sketch.

    This is the section ``fishers.sketch`` of the run file. The run file sets the seed with a separate key.

    Raises:
        OptionError: The kind is unknown, a required option is missing, an option does not apply to the kind, or a
            number is not positive.
    """

    kind: SketchKind = "tensorsketch"
    """``identity`` keeps every coordinate (for small models). ``tensorsketch`` hashes the coordinates into ``dim``
    buckets. Two kinds are for comparison: ``kronecker`` projects every weight from both sides to ``size`` × ``size``
    coordinates, and ``topk`` keeps the ``size`` largest entries of each example (for small models)."""
    dim: int | None = None
    """Number of sketch coordinates D. Only for ``tensorsketch``; the default is 4096."""
    size: int | None = None
    """For ``kronecker``, the number of rows and of columns kept of each weight. For ``topk``, the number of entries
    kept of each example. Not for the other kinds."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(SketchKind):
            raise OptionError(f"the sketch kind must be one of {', '.join(get_args(SketchKind))}, not {self.kind!r}")
        check_bounds(self, dim=COUNT, size=COUNT)
        if self.dim is not None and self.kind != "tensorsketch":
            what = "keeps every coordinate and takes no dim" if self.kind == "identity" else "takes a size and no dim"
            raise OptionError(f"the {self.kind} sketch {what}: remove dim")
        if self.size is not None and self.kind not in ("kronecker", "topk"):
            raise OptionError(f"the {self.kind} sketch takes no size: remove size, or set kind to kronecker or topk")
        if self.size is None and self.kind in ("kronecker", "topk"):
            value = 16 if self.kind == "kronecker" else 16384
            raise OptionError(f"the {self.kind} sketch needs a size: set, for example, size: {value}")
        if self.kind == "tensorsketch" and self.dim is None:
            object.__setattr__(self, "dim", 4096)

    def to_json(self, seed: int) -> dict[str, Any]:
        """Return the options and the seed as plain values, for a JSON attribute."""
        return {"kind": self.kind, "dim": self.dim, "seed": seed, "size": self.size}
