"""Options of the sketch of gradient rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from npeff.options.bounds import POSITIVE, OptionError, check_bounds

SketchKind = Literal["identity", "tensorsketch", "kronecker", "topk"]


@dataclass(frozen=True)
class SketchSpec:
    """What determines the sketch, together with a seed and the names and shapes of the parameters.

    This is the section ``fishers.sketch`` of the run file. The seed of a run is a key of its own.

    Raises:
        OptionError: the kind is unknown, or has no such option, or lacks one, or a number is not positive.
    """

    kind: SketchKind = "tensorsketch"
    """``identity`` keeps every coordinate (small models); ``tensorsketch`` hashes them into ``dim`` buckets. For
    comparison: ``kronecker`` projects every weight from both sides to ``size`` × ``size`` coordinates; ``topk`` keeps
    the ``size`` largest entries of each example (small models)."""
    dim: int | None = None
    """Number of sketch coordinates D; ``tensorsketch`` only, 4096 unless given."""
    size: int | None = None
    """Rows and columns kept of each weight by ``kronecker``, entries kept of each example by ``topk``; of these two
    only."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(SketchKind):
            raise OptionError(f"kind of a sketch must be one of {', '.join(get_args(SketchKind))}, not {self.kind!r}")
        check_bounds(self, dim=POSITIVE, size=POSITIVE)
        if self.dim is not None and self.kind != "tensorsketch":
            what = "keeps every coordinate and takes no dim" if self.kind == "identity" else "takes a size and no dim"
            raise OptionError(f"the {self.kind} sketch {what}: remove it")
        if self.size is not None and self.kind not in ("kronecker", "topk"):
            raise OptionError(f"the {self.kind} sketch takes no size: remove it, or choose kind: kronecker or topk")
        if self.size is None and self.kind in ("kronecker", "topk"):
            what = "16, say" if self.kind == "kronecker" else "16384, say"
            raise OptionError(f"the {self.kind} sketch needs a size: set size: {what}")
        if self.kind == "tensorsketch" and self.dim is None:
            object.__setattr__(self, "dim", 4096)

    def to_json(self, seed: int) -> dict[str, Any]:
        """Plain values of these options and the seed, for a JSON attribute."""
        return {"kind": self.kind, "dim": self.dim, "seed": seed, "size": self.size}
