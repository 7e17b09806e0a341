"""What an edit of the model does on the held-out examples: the record, and its text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from npeff.statistics.mcnemar import mcnemar

_LEVEL = 0.05


def held_out_record(before: list[bool], after: list[bool]) -> dict[str, Any]:
    """Return the comparison of the predictions before and after the edit: the fields of `McNemar`, and the accuracy."""
    return {**asdict(mcnemar(np.array(before), np.array(after))), "accuracy_before": float(np.mean(before))}


def held_out_text(found: dict[str, Any]) -> str:
    """Return the text of a record of `held_out_record`."""
    return (
        f"held-out accuracy {found['accuracy_before']:.2%} → {found['accuracy_before'] + found['change']:.2%} "
        f"({found['mended']} corrected, {found['broken']} broken of {found['n']}; change {found['low']:+.2%} to "
        f"{found['high']:+.2%}, p = {found['p_value']:.2g}): {_meaning(found)}"
    )


def _meaning(found: dict[str, Any]) -> str:
    if found["p_value"] >= _LEVEL:
        return "no change of the accuracy is shown"
    return "the accuracy rises" if found["change"] > 0 else "the accuracy falls"
