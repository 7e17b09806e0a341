"""A run's progress as metrics of the Ray cluster it runs on, beside Ray's own, on its Prometheus endpoints."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

_METRICS = {
    "npeff_stage_done": "Units of a stage (shards, steps, directions, components) that are finished.",
    "npeff_stage_total": "Units that the stage has.",
    "npeff_loss": "The solver's loss: squared distance of the normalised Fishers from the components' sums.",
    "npeff_explained": "Share of the normalised Fishers' squared norms that the components explain.",
}


_REPEAT_S = 2.0
"""Ray forgets a value that it has exported: one that is set once is there for seconds, and most scrapers miss it."""


class RunMetrics:
    """Gauges with the tags ``run`` (its directory) and ``stage``; Ray puts ``ray_`` before their names.

    What was told last is told again and again, by a thread, as long as this process lives. Where it uses no Ray,
    nothing happens, and Ray is not imported.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self._repeating: threading.Thread | None = None

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Tell how far a stage is; of ``numbers``, those that there is a metric for (``loss``, ``explained``)."""
        if not _uses_ray():
            return
        values = {"stage_done": done, "stage_total": total, **numbers}
        named = {f"npeff_{name}": value for name, value in values.items()}
        told = {(name, stage): value for name, value in named.items() if name in _METRICS}
        with self._lock:
            self._values |= told
            self._set(told)
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
