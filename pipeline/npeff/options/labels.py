"""Options of the expectation over labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from npeff.options.bounds import POSITIVE, OptionError, check_bounds

Labels = Literal["exact", "truncated", "sampled", "empirical"]


@dataclass(frozen=True)
class LabelSpec:
    """How the expectation over labels is taken.

    In the run file these are the keys ``labels``, ``rank`` and ``kept_trace`` of the section ``fishers``.

    Raises:
        OptionError: the kind is unknown, or has no such option, or lacks one, or a number is out of its bounds.
    """

    kind: Labels = "exact"
    rank: int | None = None
    """Rows of an example's factor: at most so many of `truncated`, the draws of `sampled`; None for the others."""
    kept_trace: float = 1.0
    """`truncated`: the share of the trace of S at which an example has enough rows."""
    seed: int = 0
    """Of the draws, together with the number of the example."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Labels):
            raise OptionError(f"labels must be one of {', '.join(get_args(Labels))}, not {self.kind!r}")
        check_bounds(self, rank=POSITIVE, kept_trace={"greater than": 0, "less than or equal to": 1})
        if self.kind in ("truncated", "sampled") and self.rank is None:
            raise OptionError(f"labels: {self.kind} need a rank, the number of rows of an example: set rank: 4, say")
        if self.kind in ("exact", "empirical") and self.rank is not None:
            raise OptionError(f"labels: {self.kind} take no rank: remove it, or choose truncated or sampled labels")
        if self.kept_trace < 1 and self.kind != "truncated":
            raise OptionError("kept_trace is for labels: truncated: remove it")

    def max_rank(self, n_classes: int) -> int:
        """Rows that an example's factor has at most."""
        if self.kind == "exact":
            return n_classes - 1
        if self.kind == "truncated":
            assert self.rank is not None
            return min(self.rank, n_classes - 1)
        return self.rank or 1

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON attribute."""
        return {"kind": self.kind, "rank": self.rank, "kept_trace": self.kept_trace, "seed": self.seed}
