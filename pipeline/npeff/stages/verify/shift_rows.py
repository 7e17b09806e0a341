"""Rows about what a step does to the predictions on the top examples of a component."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.models.loaded import LoadedModel
from npeff.stages.verify.steps import Tested
from npeff.verification import Shifts, shifts

Row = dict[str, Any]

NO_SHIFTS: Row = dict.fromkeys(
    ("flip_from", "flip_to", "flip_share", "raised_class", "raised", "lowered_class", "lowered")
)
"""The columns of the table `verification` for a step that tells nothing about the predictions."""


class ShiftRows:
    """The changes of the predictions on the top examples by one step.

    Args:
        tested: The step.
        top: The top examples, in descending order of the coefficient.
        loaded: The model, for the names of the classes.
    """

    def __init__(self, tested: Tested, top: NDArray[np.int64], loaded: LoadedModel) -> None:
        self._top, self._kl_n = top, tested.kl.of(top)
        self._shifts: Shifts = shifts(tested.before.of(top).logits, tested.after.of(top).logits)
        examples = [each for each in self._shifts.examples if each is not None]
        seen = {shift.number for shift in self._shifts.classes}
        numbers = sorted(seen.union(*({each.class_before, each.class_after} for each in examples)))
        self._names = dict(zip(numbers, loaded.class_texts(numbers), strict=True))
        self._loaded = loaded

    def columns(self) -> Row:
        """Return the columns of the table `verification`."""
        found = dict(NO_SHIFTS)
        if self._shifts.classes:
            changes = {shift.number: shift.p_after - shift.p_before for shift in self._shifts.classes}
            raised, lowered = max(changes, key=lambda c: changes[c]), min(changes, key=lambda c: changes[c])
            found |= {"raised_class": raised, "raised": changes[raised]}
            found |= {"lowered_class": lowered, "lowered": changes[lowered], "flip_share": 0.0}
        for (old, new), share in list(self._shifts.flips.items())[:1]:
            found |= {"flip_from": old, "flip_to": new, "flip_share": share}
        return found

    def classes(self) -> Iterator[Row]:
        """Yield the rows of the table `prediction_shifts`."""
        for shift in self._shifts.classes:
            row = asdict(shift)
            number = row.pop("number")
            yield {"class": number, "name": self._names[number], **row}

    def examples(self) -> Iterator[Row]:
        """Yield the rows of the table `example_shifts`."""
        pairs = zip(self._top.tolist(), self._shifts.examples, strict=True)
        made = [(rank, example, shift) for rank, (example, shift) in enumerate(pairs) if shift is not None]
        contexts = self._loaded.prediction_texts([(example, shift.place) for _, example, shift in made])
        for (rank, example, shift), context in zip(made, contexts, strict=True):
            names = {"before": self._names[shift.class_before], "after": self._names[shift.class_after]}
            place = {"rank": rank, "example": example, "kl": float(self._kl_n[rank]), "context": context}
            yield place | asdict(shift) | {f"name_{when}": name for when, name in names.items()}
