"""Stage 3 on a worker: move the model along one component's direction and measure what changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.runtime.model import ModelSpec, Predictions
from pipeline.store import SCHEMAS, DirectionStore, open_factorization, read_table, write_table
from pipeline.verification import (
    baseline_examples,
    find_step_size,
    fisher_norm_ratio,
    moved,
    parameter_norm,
    random_direction,
    top_examples,
)

SPLITS = ("fit", "held_out")

_KL_ROUNDING = 1e-12
"""Mean KL that rounding of float32 logits can cause; a baseline below it counts as this much."""


@dataclass(frozen=True)
class VerificationPaths:
    factorization: Path
    directions: Path
    examples: Path
    results: Path
    """Folder of one Parquet file per finished component."""


@dataclass(frozen=True)
class Effect:
    """What a step of size ``epsilon`` did; predictions are those after it."""

    epsilon: float
    reached_target: bool
    kl_top: float
    kl_baseline: float
    top: Predictions
    baseline: Predictions

    @property
    def kl_ratio(self) -> float:
        return self.kl_top / max(self.kl_baseline, _KL_ROUNDING)


class VerificationWorker:
    """Verifies components, one call each."""

    def __init__(
        self,
        model: ModelSpec,
        paths: VerificationPaths,
        *,
        n_top: int,
        n_baseline: int,
        target_kl: float,
        seed: int,
        batch_size: int,
    ) -> None:
        self._loaded = model.load()
        self._paths, self._n_top, self._n_baseline = paths, n_top, n_baseline
        self._target_kl, self._seed, self._batch_size = target_kl, seed, batch_size
        table = read_table(paths.examples, "examples")
        self._norms_N = table["fisher_norm"].to_numpy()
        valid_N = table["valid"].to_numpy()
        split_N = np.asarray(table["split"].to_pylist())
        self._members = {split: valid_N & (split_N == split) for split in SPLITS}
        self._coefficients_NK = open_factorization(paths.factorization).read_coefficients()
        self._directions = DirectionStore.open(paths.directions)

    def verify(self, component: int) -> list[dict[str, Any]]:
        """The component's rows of the verification table, one per split and sign; also left in a file."""
        direction = {name: torch.from_numpy(array) for name, array in self._directions.read(component).items()}
        controls = random_direction(direction, seed=_seed(self._seed, component, "random direction"))
        rows = []
        for split, members_N in self._members.items():
            top = top_examples(self._coefficients_NK[:, component], members_N, self._n_top)
            baseline = baseline_examples(
                members_N, top, self._n_baseline, _seed(self._seed, component, f"baseline {split}")
            )
            if len(top) == 0 or len(baseline) == 0:
                continue
            for sign in (1, -1):
                rows.append(
                    {"component": component, "examples": split, "sign": sign}
                    | self._compare(direction, controls, sign, top, baseline)
                )
        columns = {name: [row[name] for row in rows] for name in SCHEMAS["verification"].names}
        write_table(self._paths.results / f"{component:05d}.parquet", "verification", columns)
        return rows

    def _compare(
        self,
        direction: Mapping[str, Tensor],
        random: Mapping[str, Tensor],
        sign: int,
        top: NDArray[np.int64],
        baseline: NDArray[np.int64],
    ) -> dict[str, Any]:
        before = self._loaded.predict(np.concatenate([top, baseline]).tolist(), self._batch_size)
        effect = self._step(direction, sign, top, baseline, before)
        control = self._step(random, sign, top, baseline, before)
        return {
            "epsilon": effect.epsilon,
            "n_top": len(top),
            "n_baseline": len(baseline),
            "kl_top": effect.kl_top,
            "kl_baseline": effect.kl_baseline,
            "kl_ratio": effect.kl_ratio,
            "fisher_norm_ratio": fisher_norm_ratio(self._norms_N, top, baseline),
            "random_epsilon": control.epsilon,
            "random_kl_top": control.kl_top,
            "random_kl_baseline": control.kl_baseline,
            "random_kl_ratio": control.kl_ratio,
            "accuracy_top_before": before[: len(top)].accuracy(),
            "accuracy_top_after": effect.top.accuracy(),
            "accuracy_baseline_before": before[len(top) :].accuracy(),
            "accuracy_baseline_after": effect.baseline.accuracy(),
            "reached_target": effect.reached_target,
        }

    def _step(
        self,
        direction: Mapping[str, Tensor],
        sign: int,
        top: NDArray[np.int64],
        baseline: NDArray[np.int64],
        before: Predictions,
    ) -> Effect:
        """The effect of the step that moves the top examples by the target KL."""

        def at(epsilon: float) -> Predictions:
            with moved(self._loaded.model, direction, sign * epsilon):
                return self._loaded.predict(top.tolist(), self._batch_size)

        step = find_step_size(
            lambda epsilon: at(epsilon).mean_kl(before[: len(top)]),
            self._target_kl,
            longest=parameter_norm(self._loaded.model, direction),
        )
        with moved(self._loaded.model, direction, sign * step.epsilon):
            after = self._loaded.predict(baseline.tolist(), self._batch_size)
        return Effect(
            epsilon=step.epsilon,
            reached_target=step.reached_target,
            kl_top=step.kl,
            kl_baseline=after.mean_kl(before[len(top) :]),
            top=at(step.epsilon),
            baseline=after,
        )


def _seed(seed: int, component: int, purpose: str) -> int:
    words = np.frombuffer(purpose.encode().ljust(-len(purpose) % 4 + len(purpose), b" "), dtype=np.uint32)
    return int(np.random.SeedSequence([seed, component, *words.tolist()]).generate_state(1, np.uint64)[0] >> 1)
