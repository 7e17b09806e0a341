"""Rows of the tables of the stage `verify`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from npeff.stages.verify.examples import Candidates, Effects, Groups, with_classes_of
from npeff.stages.verify.steps import Tested
from npeff.statistics.ratio_intervals import Measured, confidence
from npeff.statistics.verdict import is_matched
from npeff.verification import Matches

Row = dict[str, Any]

_OF_CONTROL = ("kl_top", "kl_baseline", "kl_ratio")


def verification_row(tested: Tested, groups: Groups, candidates: Candidates, informative: bool, seed: int) -> Row:
    """Return the columns of the table `verification` that describe one step. A value that was not measured is None."""
    step = tested.step
    row: Row = {
        "informative": informative,
        "target_kl": tested.target_kl,
        "epsilon": step.epsilon,
        "reached_target": step.reached_target,
        "n_top": len(groups.top),
        "n_baseline": len(groups.random),
        "kl_top": step.kl,
        **_matched_columns(tested, groups, candidates, seed),
        **_random_columns(tested, groups, candidates, seed),
        **dict.fromkeys(f"other_{name}" for name in ("epsilon", *_OF_CONTROL, "kl_ratio_checked")),
    }
    for name, control in tested.controls.items():
        kl = control.kl.compared(groups.top, groups.matched)
        row |= _control_columns(name, kl) | {f"{name}_epsilon": _known(control.epsilon)}
        if control.checked is not None:
            row[f"{name}_kl_ratio_checked"] = _known(control.checked.compared(groups.top, groups.matched).ratio)
    if not informative and not step.reached_target:
        # a longer step changes all predictions, and its ratios are noise
        unknown = [name for name in row if "kl_ratio" in name]
        row |= dict.fromkeys(unknown) | {"above_controls": False, "auc": None}
    return row


def _matched_columns(tested: Tested, groups: Groups, candidates: Candidates, seed: int) -> Row:
    """Return the columns about the matched baseline."""
    top, matched = groups.top, groups.matched
    kl = tested.kl.compared(top, matched)
    traces = _of_all(candidates.traces_N, groups, matched)
    controls = [traces, *(control.kl.compared(top, matched) for control in tested.controls.values())]
    sure = confidence(kl, controls, seed)
    examples = tested.after.examples_u
    after, before = tested.after.predictions, tested.before.of(examples)
    changed = Effects(examples, after.changed(before)).compared(top, matched)
    return {
        "matched": is_matched(len(matched.examples_m), traces.ratio),
        "n_matched": len(matched.examples_m),
        "n_by_trace": matched.n_by_trace,
        "trace_ratio": _known(traces.ratio),
        "kl_matched": _known(kl.baseline_mean),
        "kl_ratio_matched": _known(kl.ratio),
        "kl_ratio_matched_low": _known(sure.low),
        "kl_ratio_matched_high": _known(sure.high),
        "above_controls": sure.above_controls,
        "auc": _known(kl.auc),
        "changed_top": _known(changed.top_mean),
        "changed_matched": _known(changed.baseline_mean),
        "small_step_ratio": None if tested.evidence is None else _known(tested.evidence.compared(top, matched).ratio),
    }


def _random_columns(tested: Tested, groups: Groups, candidates: Candidates, seed: int) -> Row:
    """Return the columns about the baselines of random examples, and of examples matched by the trace alone."""
    kl = tested.kl.compared(groups.top, groups.random)
    sure = confidence(kl, [], seed)
    columns: Row = {
        "kl_ratio_trace": _known(tested.kl.compared(groups.top, groups.by_trace).ratio),
        "kl_baseline": _known(kl.baseline_mean),
        "kl_ratio": _known(kl.ratio),
        "kl_ratio_low": _known(sure.low),
        "kl_ratio_high": _known(sure.high),
        "fisher_norm_ratio": _of_all(candidates.norms_N, groups, groups.random).ratio,
    }
    if not np.isin(groups.random, tested.after.examples_u).all():  # only the matched baseline was measured
        columns |= dict.fromkeys(("kl_ratio_trace", "kl_baseline", "kl_ratio", "kl_ratio_low", "kl_ratio_high"))
    return columns | _accuracies(tested, groups)


def _accuracies(tested: Tested, groups: Groups) -> Row:
    columns: Row = {}
    for name, examples in [("top", groups.top), ("baseline", groups.random)]:
        measured = bool(np.isin(examples, tested.after.examples_u).all())
        after = tested.after.of(examples) if measured else None
        before = None if after is None else with_classes_of(tested.before.of(examples), after)
        columns[f"accuracy_{name}_before"] = None if before is None else before.accuracy()
        columns[f"accuracy_{name}_after"] = None if after is None else after.accuracy()
    return columns


def ablation_row(effects: Mapping[str, Tested], along: float, groups: Groups, candidates: Candidates, seed: int) -> Row:
    """Return the columns of the table `ablation` that describe the steps of one component in one split."""
    kls = {name: tested.kl.compared(groups.top, groups.random) for name, tested in effects.items()}
    norms, own = _of_all(candidates.norms_N, groups, groups.random), kls.pop("own")
    sure = confidence(own, [norms, *kls.values()], seed)
    row: Row = {
        **dict.fromkeys(f"other_{name}" for name in _OF_CONTROL),
        "displacement": along,
        "n_top": len(groups.top),
        "n_baseline": len(groups.random),
        "kl_top": own.top_mean,
        "kl_baseline": own.baseline_mean,
        "kl_ratio": own.ratio,
        "kl_ratio_low": sure.low,
        "kl_ratio_high": sure.high,
        "above_controls": sure.above_controls,
        "fisher_norm_ratio": norms.ratio,
        **_accuracies(effects["own"], groups),
    }
    for name, kl in kls.items():
        row |= _control_columns(name, kl)
    return row


def _control_columns(name: str, kl: Measured) -> Row:
    means = (kl.top_mean, kl.baseline_mean, kl.ratio)
    return {f"{name}_{column}": _known(mean) for column, mean in zip(_OF_CONTROL, means, strict=True)}


def _of_all(values_N: np.ndarray, groups: Groups, baseline: Matches | np.ndarray) -> Measured:
    """Return the known values of the top examples and of a baseline."""
    return Effects(np.arange(len(values_N)), values_N).compared(groups.top, baseline)


def _known(value: float) -> float | None:
    """Return None for a value that does not exist, because a group has no example or no example has a value."""
    return None if math.isnan(value) else value
