"""Options for the expectation over labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from npeff.options.bounds import COUNT, OptionError, check_bounds

Labels = Literal["exact", "truncated", "sampled", "empirical"]
MOST_CLASSES = 4096
"""Largest number of classes for ``exact`` and ``truncated`` labels, whose cost grows with it."""


@dataclass(frozen=True)
class LabelSpec:
    """How the expectation over labels is computed.

    The run file sets these options with the keys ``labels``, ``rank`` and ``kept_trace`` of the section ``fishers``.

    Raises:
        OptionError: The kind is unknown, a required option is missing, an option does not apply to the kind, or a
            number is out of bounds.
    """

    kind: Labels = "exact"
    rank: int | None = None
    """Number of rows of an example's factor: the maximum for `truncated`, the number of draws for `sampled`. None for
    the other kinds."""
    kept_trace: float = 1.0
    """For `truncated`: stop adding rows once they cover this fraction of the trace of S."""
    seed: int = 0
    """Seed of the draws. Each example's draws depend on this seed and on the example's number."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Labels):
            raise OptionError(f"labels must be one of {', '.join(get_args(Labels))}, not {self.kind!r}")
        check_bounds(self, rank=COUNT, kept_trace={"greater than": 0, "less than or equal to": 1})
        if self.kind in ("truncated", "sampled") and self.rank is None:
            raise OptionError(f"labels: {self.kind} needs a rank (rows per example): set, for example, rank: 4")
        if self.kind in ("exact", "empirical") and self.rank is not None:
            raise OptionError(f"labels: {self.kind} takes no rank: remove rank, or set labels to truncated or sampled")
        if self.kept_trace < 1 and self.kind != "truncated":
            raise OptionError("kept_trace applies only to labels: truncated; remove kept_trace")

    def max_rank(self, n_classes: int) -> int:
        """Return the maximum number of rows of an example's factor."""
        if self.kind == "exact":
            return n_classes - 1
        if self.kind == "truncated":
            assert self.rank is not None
            return min(self.rank, n_classes - 1)
        return self.rank or 1

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain values, for a JSON attribute."""
        return {"kind": self.kind, "rank": self.rank, "kept_trace": self.kept_trace, "seed": self.seed}
