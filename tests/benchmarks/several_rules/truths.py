"""Examples whose active rules are known, as the methods see them (sketched Fishers) and as the scores need them.

Legend: N examples, O predictions of an example, R rank, D sketch, P parameters, r rules, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import exact_label_factor, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor
from verify_stage.baselines import Data

BATCH = 100


@dataclass(frozen=True)
class SketchedData(Data):
    """`Data` of examples with one or several predictions: the gradients are those of the predicted classes' log p."""

    gradient_weights_NR: Tensor
    """Weights of the factor rows whose sum is the gradient."""

    def gradients_ND(self) -> np.ndarray:
        gradients_ND = torch.einsum("nr,nrd->nd", self.gradient_weights_NR, self.factors_NRD.double())
        return torch.nn.functional.normalize(gradients_ND).numpy()


@dataclass(frozen=True)
class Truth:
    """One draw of a task."""

    data: SketchedData
    rows_FRP: Tensor
    """Rows of the normalised Fisher factors of the fitted examples in all parameters."""
    rules: Sequence[str]
    active_Nr: np.ndarray
    strengths_Nr: np.ndarray
    masks_rP: Tensor
    """The weights that only one rule uses."""

    @property
    def counts_N(self) -> np.ndarray:
        """Number of active rules of each example."""
        return np.asarray(self.active_Nr.sum(1))

    def ceilings(self) -> np.ndarray:
        """Return the share of the trace of a rule's Fishers that lies in its own weights (r,), over the fitted
        examples on which it is active."""
        energy_FP = self.rows_FRP.square().sum(1)
        energy_FP = energy_FP / energy_FP.sum(1, keepdim=True).clamp(min=1e-300)
        own_Fr = (energy_FP @ self.masks_rP.to(energy_FP).T).numpy()
        active_Fr = self.active_Nr[self.data.fit_N]
        return np.asarray((own_Fr * active_Fr).sum(0) / active_Fr.sum(0).clip(1))


def drawn(task: Any, cache: Path, sketch_dim: int, seed: int) -> Truth:
    """Compute the Fishers of a task whose table has ``rule_NAME`` and ``strength_NAME``; two thirds are fitted.

    Args:
        task: Has `rule_masks`. Logits (B, O, C) are O independent predictions.
        cache: Folder in which the task is prepared.
        sketch_dim: D.
        seed: Of the sketch.
    """
    task.prepare(cache)
    model, examples, masks = task.model(cache), task.examples(cache), task.rule_masks()
    layout = select_parameters(model)
    sketch = make_sketch(SketchSpec("tensorsketch", sketch_dim), layout, seed)
    exact = make_sketch(SketchSpec("identity"), layout, 0)
    n_fitted = 2 * len(examples) // 3
    n_outputs = _n_outputs(task.logits(model, examples.batch([0])))
    sketched, rows, weights = [], [], []
    for output in range(n_outputs):
        fishers = [PerExampleFishers(model, _one_output(task.logits, output), layout, kind) for kind in (sketch, exact)]
        parts_B = []
        for start in range(0, len(examples), BATCH):
            batch = examples.batch(range(start, min(start + BATCH, len(examples))))
            parts_B.append(fishers[0](batch))
            if start < n_fitted:
                rows_BRP = fishers[1](batch).factors_BRD[: n_fitted - start]
                rows.append((output, start, rows_BRP))
        logits_NC = torch.cat([part.logits for part in parts_B]).double()
        sketched.append(torch.cat([part.factors_BRD for part in parts_B]))
        weights.append(_gradient_weights(logits_NC))
    factors_NRD = torch.cat(sketched, 1)
    roots_N11 = (
        torch.linalg.matrix_norm((factors_NRD @ factors_NRD.mT).double()).clamp(min=1e-300).sqrt()[:, None, None]
    )
    by_output = [torch.cat([part for of, _, part in rows if of == output]) for output in range(n_outputs)]
    table = examples.table()
    columns = {
        kind: np.stack([table[f"{kind}_{name}"].to_numpy(zero_copy_only=False) for name in masks], 1)
        for kind in ("rule", "strength")
    }
    return Truth(
        SketchedData(
            (factors_NRD / roots_N11).float(),
            np.arange(len(examples)) < n_fitted,
            lambda: np.zeros((0, 0)),
            torch.cat(weights, 1),
        ),
        torch.cat(by_output, 1) / roots_N11[:n_fitted].float(),
        list(masks),
        columns["rule"].astype(bool),
        columns["strength"],
        torch.stack([torch.cat([mask[name].flatten() for name in layout.names]) for mask in masks.values()]),
    )


def _n_outputs(logits: Tensor) -> int:
    return logits.shape[1] if logits.dim() == 3 else 1


def _one_output(logits: Callable[[Any, Any], Tensor], output: int) -> Callable[[Any, Any], Tensor]:
    def of_output(model: Any, batch: Any) -> Tensor:
        found = logits(model, batch)
        return found[:, output] if found.dim() == 3 else found

    return of_output


def _gradient_weights(logits_NC: Tensor) -> Tensor:
    """(N, R): with rows LᵀJ, the gradient (e_y − p)ᵀJ of the predicted class y is cᵀLᵀJ with L c = e_y − p."""
    p_NC = logits_NC.softmax(-1)
    errors_NC = torch.nn.functional.one_hot(p_NC.argmax(-1), p_NC.shape[1]) - p_NC
    return (torch.linalg.pinv(exact_label_factor(logits_NC)) @ errors_NC[:, :, None])[:, :, 0]
