"""A run's progress as metrics on the Prometheus endpoints of the Ray cluster, in addition to Ray's own metrics."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

_METRICS = {
    "npeff_stage_done": "Units of a stage (shards, steps, directions, components) that are finished.",
    "npeff_stage_total": "Units of a stage in total.",
    "npeff_loss": "Loss of the solver: squared distance of the normalized Fishers from their approximations.",
    "npeff_explained": "Fraction of the squared norms of the normalized Fishers that the components explain.",
}


_REPEAT_S = 2.0
"""Interval at which values are set again. Ray drops a value after its export, so that a value that is set once is
visible for seconds only and most scrapers miss it."""


class RunMetrics:
    """Gauges with the tags ``run`` (the run directory) and ``stage``. Ray adds the prefix ``ray_`` to their names.

    A thread sets the last values repeatedly for the lifetime of this process. If this process does not use Ray, the
    class does nothing and does not import Ray.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self._repeating: threading.Thread | None = None

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Set the metrics of a stage's progress, and those entries of ``numbers`` with a metric (loss, explained)."""
        if not _uses_ray():
            return
        values = {"stage_done": done, "stage_total": total, **numbers}
        named = {f"npeff_{name}": value for name, value in values.items()}
        known = {(name, stage): value for name, value in named.items() if name in _METRICS}
        with self._lock:
            self._values |= known
            self._set(known)
        if self._repeating is None:
            self._repeating = threading.Thread(target=self._repeat, name="metrics", daemon=True)
            self._repeating.start()

    def _repeat(self) -> None:
        while True:
            time.sleep(_REPEAT_S)
            with self._lock:
                if _uses_ray():
                    self._set(self._values)

    def _set(self, values: Mapping[tuple[str, str], float]) -> None:
        from ray.util.metrics import Gauge

        for (name, stage), value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=_METRICS[name], tag_keys=("run", "stage"))
            self._gauges[name].set(value, tags={"run": self._run, "stage": stage})


def _uses_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
