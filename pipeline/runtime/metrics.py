"""A run's progress as metrics of the Ray cluster it runs on, beside Ray's own, on its Prometheus endpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_METRICS = {
    "npeff_stage_done": "Units of a stage (shards, steps, directions, components) that are finished.",
    "npeff_stage_total": "Units that the stage has.",
    "npeff_loss": "The solver's loss: squared distance of the normalised Fishers from the components' sums.",
    "npeff_explained": "Share of the normalised Fishers' squared norms that the components explain.",
}


class RunMetrics:
    """Gauges with the tags ``run`` (its directory) and ``stage``; Ray puts ``ray_`` before their names.

    Where this process uses no Ray, nothing happens, and Ray is not imported.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Tell how far a stage is; of ``numbers``, those that there is a metric for (``loss``, ``explained``)."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        values = {"stage_done": done, "stage_total": total, **numbers}
        for name, value in ((f"npeff_{name}", value) for name, value in values.items()):
            if name in _METRICS:
                self._gauge(name).set(value, tags={"run": self._run, "stage": stage})

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[name] = Gauge(name, description=_METRICS[name], tag_keys=("run", "stage"))
        return self._gauges[name]
