"""Workers as Ray actors, in one placement group.

Ray restarts no actor here (``max_restarts=0``): a lost worker is seen, replaced and given its item again by this file,
so that every recovery is counted and every wait has an end.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.runtime.executor import ExecutorError, Group, WorkerLostError, WorkerSpec

ATTEMPTS = 3
"""How often an item is given to a worker before it is given up."""

_OBJECT_STORE_BYTES = 256 * 2**20  # a private Ray passes components and records through it, never Fishers
_logger = logging.getLogger(__name__)


class _Worker:
    """The actor: sets this process up, then is the worker that was asked for.

    The worker is constructed by its first call: what its constructor raises (a data set that is gone) then comes back
    as that call's exception, where a failing constructor of an actor would look like a lost process.
    """

    def __init__(self, spec: WorkerSpec, threads: int, more: dict[str, Any]) -> None:
        self._spec, self._threads, self._more = spec, threads, more
        self._worker: Any = None

    def call(self, method: str, *arguments: Any) -> Any:
        if self._worker is None:
            torch.set_num_threads(self._threads)
            self._worker = self._spec.construct(**self._more)
        return getattr(self._worker, method)(*arguments)


class RayExecutor:
    """Joins or starts Ray, and reserves the workers' resources in one placement group.

    Args:
        address: ``local`` starts a private Ray that ends with this executor; anything else is an address to join.
            Inside a Ray job the job's cluster is joined whatever is said here.
        timeout_s: wait for a placement group, an item, or a method of a group's worker.
    """

    def __init__(
        self, address: str, *, workers: int, cpus_per_worker: int, gpus_per_worker: float, timeout_s: float
    ) -> None:
        self.workers = workers
        self._cpus, self._gpus, self._timeout_s = cpus_per_worker, gpus_per_worker, timeout_s
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            self._connect(address)
        try:
            self._placement = self._reserve()
        except BaseException:
            self._disconnect()
            raise

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        waiting = deque((item, 1) for item in items)
        idle = deque(range(self.workers))
        actors: dict[int, Any] = {}
        running: dict[ray.ObjectRef, tuple[int, Any, int, float]] = {}

        def give_again(ref: ray.ObjectRef, reason: str) -> None:
            slot, item, attempt, _ = running.pop(ref)
            _end(actors.pop(slot))
            idle.append(slot)
            if attempt == ATTEMPTS:
                raise ExecutorError(
                    f"{method} {item} was given up after {ATTEMPTS} attempts (the last: {reason}); what is finished "
                    "is kept: mend the cause and run the same command again"
                )
            _logger.warning("%s %s: %s; attempt %d of %d follows", method, item, reason, attempt + 1, ATTEMPTS)
            waiting.appendleft((item, attempt + 1))

        try:
            while waiting or running:
                while waiting and idle:
                    slot, (item, attempt) = idle.popleft(), waiting.popleft()
                    if slot not in actors:
                        actors[slot] = self._start(spec, slot)
                    ref = actors[slot].call.remote(method, item)
                    running[ref] = (slot, item, attempt, time.monotonic())
                finished, _ = ray.wait(list(running), timeout=1.0)
                for ref in finished:
                    try:
                        result = ray.get(ref, timeout=self._timeout_s)
                    except RayTaskError as error:
                        raise error.cause from None
                    except RayError as error:
                        give_again(ref, f"its worker was lost ({type(error).__name__})")
                        continue
                    slot, item, _, _ = running.pop(ref)
                    idle.append(slot)
                    yield item, result
                now = time.monotonic()
                for ref in [ref for ref, (*_, since) in running.items() if now - since > self._timeout_s]:
                    give_again(ref, f"no answer within {self._timeout_s:.0f} s")
        except (RayError, ConnectionError) as error:
            raise _ray_is_gone(error) from None
        finally:
            for actor in actors.values():
                _end(actor)

    @contextmanager
    def group(self, spec: WorkerSpec) -> Iterator[Group]:
        try:
            actors = [self._start(spec, slot, rank=slot, size=self.workers) for slot in range(self.workers)]
        except (RayError, ConnectionError) as error:
            raise _ray_is_gone(error) from None
        try:
            yield _RayGroup(actors, self._timeout_s)
        finally:
            for actor in actors:
                _end(actor)

    def close(self) -> None:
        try:
            remove_placement_group(self._placement)
        except Exception:
            # Ray may be gone already; ending must not hide why.
            _logger.debug("the placement group could not be removed", exc_info=True)
        self._disconnect()

    def _start(self, spec: WorkerSpec, slot: int, **more: Any) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=slot)
        actor = ray.remote(_Worker).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy=strategy
        )
        return actor.remote(spec, self._cpus, more)

    def _connect(self, address: str) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        try:
            if address == "local" and not in_job:
                ray.init(
                    address="local",
                    num_cpus=self.workers * self._cpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",  # nothing outside this machine may reach it
                    object_store_memory=_OBJECT_STORE_BYTES,
                    **quiet,
                )
            else:
                ray.init(address="auto" if in_job else address, **quiet)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            raise ExecutorError(
                f"cannot reach Ray at {address!r} ({str(error).splitlines()[0]}): start it with `ray start --head`, "
                "or set executor.address: local"
            ) from None

    def _reserve(self) -> Any:
        bundle = {"CPU": float(self._cpus)} | ({"GPU": self._gpus} if self._gpus else {})
        group = placement_group([bundle] * self.workers, strategy="PACK")
        try:
            ray.get(group.ready(), timeout=self._timeout_s if self._can_grow() else 30.0)
        except GetTimeoutError:
            remove_placement_group(group)
            have = {name: ray.cluster_resources().get(name, 0.0) for name in bundle}
            raise ExecutorError(
                f"the cluster does not give {self.workers} workers with {_resources(bundle)} each (it has "
                f"{_resources(have)} in all): lower executor.workers, cpus_per_worker or gpus_per_worker"
            ) from None
        return group

    def _can_grow(self) -> bool:
        """Whether waiting may help: others may give back what the cluster has, or it may start nodes (autoscaling)."""
        have = ray.cluster_resources()
        enough = have.get("CPU", 0) >= self.workers * self._cpus and have.get("GPU", 0) >= self.workers * self._gpus
        return enough or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ

    def _disconnect(self) -> None:
        if self._started_ray:
            ray.shutdown()


class _RayGroup:
    def __init__(self, actors: list[Any], timeout_s: float) -> None:
        self.size = len(actors)
        self._actors, self._timeout_s = actors, timeout_s

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait([actor.call.remote(method, *arguments) for actor in self._actors], method)

    def call_one(self, rank: int, method: str, *arguments: Any) -> Any:
        return self._wait([self._actors[rank].call.remote(method, *arguments)], method)[0]

    def _wait(self, refs: list[ray.ObjectRef], method: str) -> list[Any]:
        try:
            return ray.get(refs, timeout=self._timeout_s)
        except RayTaskError as error:
            raise error.cause from None
        except GetTimeoutError:
            raise WorkerLostError(f"{method}: no answer within {self._timeout_s:.0f} s") from None
        except (RayError, ConnectionError) as error:
            raise WorkerLostError(f"{method}: a worker was lost ({type(error).__name__})") from None


def _end(actor: Any) -> None:
    try:
        ray.kill(actor)
    except Exception:
        # It may be dead already, and Ray with it.
        _logger.debug("an actor could not be ended", exc_info=True)


def _ray_is_gone(error: Exception) -> ExecutorError:
    return ExecutorError(
        f"Ray stopped working ({type(error).__name__}: {str(error).splitlines()[0]}); what is finished is kept: "
        "run the same command again to go on"
    )


def _resources(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
