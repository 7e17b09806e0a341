"""Workers as Ray actors, in one placement group.

Ray does not restart actors here (``max_restarts=0``). This module detects a lost worker, starts another one and retries
its item, so that every recovery is counted and every wait has a timeout.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from npeff.errors import first_line
from npeff.execution.executor import (
    ATTEMPTS,
    ExecutorError,
    Failures,
    Group,
    WorkerLostError,
    WorkerSpec,
)
from npeff.execution.ray.actor import Failure, Role, WorkerActor
from npeff.execution.ray.address import check_is_ray
from npeff.execution.ray.jobs import in_job
from npeff.execution.ray.messages import shorten_messages
from npeff.execution.ray.placement import WorkerPlacement
from npeff.execution.ray.private import PrivateRay
from npeff.execution.team import TeamMember

_LOOK_EVERY_S = 1.0
"""Interval at which a wait for workers checks that Ray itself is running."""

_logger = logging.getLogger(__name__)


@dataclass
class _Call:
    """A call of all actors of a worker."""

    slot: int
    item: Any
    attempt: int
    refs: list[ray.ObjectRef[Any]]
    """The calls of the actors, of which the first one returns the result."""
    since: float = field(default_factory=time.monotonic)
    result: Any = None


class RayExecutor:
    """Connects to Ray or starts it, and reserves the workers' resources in one placement group.

    Args:
        address: ``local`` starts a private Ray that ends with this executor; any other value is the address of a
            cluster to connect to. Inside a Ray job, the executor always connects to the job's cluster.
        workers: number of workers.
        cpus_per_worker: CPU cores of a worker.
        gpus_per_worker: GPUs of a worker, possibly a fraction.
        devices_per_model: number of processes of a worker, each with the CPU cores and GPUs above.
        timeout_s: timeout in seconds for a placement group, an item, or a method of a group's worker.

    Raises:
        ExecutorError: Ray cannot be reached, or the cluster does not have the resources.
    """

    def __init__(
        self,
        address: str,
        *,
        workers: int,
        cpus_per_worker: int,
        gpus_per_worker: float,
        timeout_s: float,
        devices_per_model: int = 1,
    ) -> None:
        self.workers, self._processes = workers, devices_per_model
        self._cpus, self._gpus, self._timeout_s = cpus_per_worker, gpus_per_worker, timeout_s
        self._started_ray = not ray.is_initialized()
        self._private: PrivateRay | None = None
        self._mappers: dict[int, list[Any]] = {}
        """Actors of `map` by slot. The next call of `map` reuses them."""
        if self._started_ray:
            self._connect(address)
        try:
            self._placement = WorkerPlacement(
                workers,
                cpus=cpus_per_worker,
                gpus=gpus_per_worker,
                processes=devices_per_model,
                one_node=self._private is not None,
                timeout_s=timeout_s,
            )
        except BaseException:
            self._disconnect()
            raise

    def map(
        self,
        spec: WorkerSpec,
        method: str,
        items: Iterable[Any],
        *,
        keep_going: bool = False,
        split: Callable[[Any], Sequence[Any]] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        mapping = _Mapping(self, Role(spec, key=spec.key), method, Failures(method, split, self.workers), keep_going)
        try:
            if not self._mappers:
                self._placement.renew()
            yield from mapping.results(items, self._places)
        except (RayError, ConnectionError) as error:
            if error is mapping.raised:
                raise
            raise _ray_is_gone(f"{type(error).__name__}: {first_line(error)}") from None
        finally:
            mapping.end()

    @contextmanager
    def group(self, spec: WorkerSpec) -> Iterator[Group]:
        self._end_mappers()  # they hold resources that the group needs
        try:
            self._placement.renew()
            size = self._places
            roles = [Role(spec, {"rank": rank, "size": size}) for rank in range(size)]
            actors = [self._start_one(slot) for slot in range(size)]
        except (RayError, ConnectionError) as error:
            raise _ray_is_gone(f"{type(error).__name__}: {first_line(error)}") from None
        try:
            yield _RayGroup(actors, roles, self, self._timeout_s)
        finally:
            self._end(actors)

    def wait_in_group(self, refs: list[ray.ObjectRef[Any]], until: float) -> list[ray.ObjectRef[Any]]:
        """Wait until a call is finished or until the time ``until``, and return the finished calls.

        Raises:
            WorkerLostError: a node with a worker of the group is lost. Ray may never report this for a call.
        """
        while True:
            finished = self._wait(refs, 1, min(until, time.monotonic() + _LOOK_EVERY_S))
            if finished or time.monotonic() >= until:
                return finished
            if not self._placement.is_whole():
                raise WorkerLostError("a node was lost")

    def can_place_more(self) -> bool:
        """Return whether a new group would be larger."""
        return self._places < self.workers and self._placement.can_be_larger()

    def close(self) -> None:
        if self._dead_server() is None:
            self._end_mappers()
            self._placement.remove()
        self._disconnect()

    def _wait(self, refs: list[ray.ObjectRef[Any]], count: int, until: float | None = None) -> list[ray.ObjectRef[Any]]:
        """Wait until ``count`` calls are finished or until the time ``until``, and return the finished calls.

        Without ``until``, the wait ends after `_LOOK_EVERY_S` seconds.

        Raises:
            ExecutorError: a server of the private Ray ended. Ray itself would end this process a minute later.
        """
        while True:
            left = _LOOK_EVERY_S if until is None else min(_LOOK_EVERY_S, until - time.monotonic())
            finished: list[Any] = ray.wait(refs, num_returns=count, timeout=max(0.0, left))[0]
            if (dead := self._dead_server()) is not None:
                raise _ray_is_gone(f"its {dead} ended")
            if len(finished) == count or until is None or time.monotonic() >= until:
                return finished

    def _dead_server(self) -> str | None:
        return None if self._private is None else self._private.dead_server()

    def _end(self, actors: list[Any]) -> None:
        if self._dead_server() is not None:
            return
        for actor in actors:
            try:
                ray.kill(actor)
            except Exception:
                # The actor, or Ray itself, may have ended already.
                _logger.debug("an actor could not be ended", exc_info=True)

    def _mapper(self, slot: int) -> list[Any]:
        """Return the actors of a worker of `map`, which are started if they do not run."""
        if slot not in self._mappers:
            self._mappers[slot] = self._start(slot)
        return self._mappers[slot]

    def _end_mapper(self, slot: int) -> None:
        """End the actors of a worker of `map`."""
        self._end(self._mappers.pop(slot))

    def _end_mappers(self) -> None:
        for slot in list(self._mappers):
            self._end_mapper(slot)

    def _start(self, slot: int) -> list[Any]:
        """Start the actors of a worker, by rank."""
        size, device = self._processes, "cuda" if self._gpus else "cpu"
        if size == 1:
            return [self._start_one(slot)]
        members = [TeamMember(rank, size, device, self._timeout_s) for rank in range(size)]
        actors = [self._start_one(slot, rank, member) for rank, member in enumerate(members)]
        address = actors[0].open_rendezvous.remote()
        for actor in actors:
            actor.connect.remote(address)  # before the next call; if it fails, that call says so
        return actors

    def _start_one(self, slot: int, rank: int = 0, member: TeamMember | None = None) -> Any:
        actor = ray.remote(WorkerActor).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy=self._placement.of(slot, rank)
        )
        return actor.remote(self._cpus, member, rank)

    def _connect(self, address: str) -> None:
        if not in_job():
            check_is_ray(address)
        shorten_messages()
        try:
            with _own_reaction_to_sigterm():
                if address == "local" and not in_job():
                    self._private = PrivateRay(self.workers * self._processes * self._cpus)
                else:
                    ray.init(address="auto" if in_job() else address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises a bare Exception when its servers start too late
            if address == "local" and not in_job():
                raise ExecutorError(
                    f"cannot start Ray on this machine ({first_line(error)}): run the same command again when the "
                    "machine is less busy, or set executor.workers: 1 and executor.kind: serial"
                ) from None
            raise ExecutorError(
                f"cannot reach Ray at {address!r} ({first_line(error)}): start it with `ray start --head`, give this "
                "machine the authentication token of the cluster, or set executor.address: local"
            ) from None

    @property
    def _places(self) -> int:
        return min(self.workers, self._placement.count)

    def _disconnect(self) -> None:
        if self._private is not None:
            self._private.close()
        elif self._started_ray:
            ray.shutdown()


class _Mapping:
    """One call of `RayExecutor.map`: which items wait, and which worker computes which item."""

    def __init__(self, executor: RayExecutor, role: Role, method: str, failures: Failures, keep_going: bool) -> None:
        self._executor, self._role, self._method = executor, role, method
        self._failures, self._keep_going = failures, keep_going
        self._waiting: deque[tuple[Any, int]] = deque()
        self._idle: deque[int] = deque()
        self._running: dict[ray.ObjectRef[Any], _Call] = {}
        """The calls by the references that are not finished."""
        self.raised: BaseException | None = None
        """An exception of the worker's method, which may be a ConnectionError, as those of Ray may."""

    def results(self, items: Iterable[Any], places: int) -> Iterator[tuple[Any, Any]]:
        """Yield the items with their results as they are finished."""
        self._waiting.extend((item, 1) for item in items)
        self._idle.extend(range(places))
        # start all actors, even for a single item: the others load the modules that the next call needs
        for slot in self._idle:
            self._executor._mapper(slot)
        while self._waiting or self._running:
            while self._waiting and self._idle:
                self._begin(self._idle.popleft(), *self._waiting.popleft())
            for ref in self._executor._wait(list(self._running), 1):
                call = self._running.get(ref)
                if call is not None and self._has_finished(call, ref):
                    self._idle.append(call.slot)
                    self._failures.succeeded()
                    yield call.item, call.result
            self._retry_late()
        self._failures.raise_any()

    def end(self) -> None:
        """End the actors whose results are no longer needed."""
        for slot in {call.slot for call in self._running.values()}:
            self._executor._end_mapper(slot)

    def _begin(self, slot: int, item: Any, attempt: int) -> None:
        calls = [actor.call_item if self._keep_going else actor.call for actor in self._executor._mapper(slot)]
        refs = [call.remote(self._role, self._method, item) for call in calls]
        self._running |= dict.fromkeys(refs, _Call(slot, item, attempt, refs))

    def _has_finished(self, call: _Call, ref: ray.ObjectRef[Any]) -> bool:
        """Take the result of one process. Return whether all processes of the worker have finished the item."""
        try:
            result = ray.get(ref, timeout=self._executor._timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, WorkerLostError):
                self._retry(call, f"a process of its worker was lost ({error.cause})")
                return False
            self.raised = error.cause or error
            raise self.raised from (error if error.cause else None)  # its text is the worker's traceback
        except RayError as error:
            self._retry(call, f"its worker was lost ({type(error).__name__})")
            return False
        if isinstance(result, Failure):
            self._retry(call, result.reason)
            return False
        del self._running[ref]
        if ref == call.refs[0]:
            call.result = result
        return self._running.keys().isdisjoint(call.refs)

    def _retry_late(self) -> None:
        timeout_s = self._executor._timeout_s
        calls = {id(call): call for call in self._running.values()}
        for call in calls.values():
            if time.monotonic() - call.since > timeout_s:
                self._retry(call, f"no answer within {timeout_s:.0f} s")

    def _retry(self, call: _Call, reason: str) -> None:
        method, item, attempt = self._method, call.item, call.attempt
        for ref in call.refs:
            self._running.pop(ref, None)
        self._executor._end_mapper(call.slot)
        self._idle.append(call.slot)
        if self._keep_going:
            parts = self._failures.failed(item, attempt, reason)
            _logger.warning("%s %s: %s; attempt %d of %d", method, item, reason, attempt, ATTEMPTS)
            self._waiting.extend((part, attempt + 1) for part in parts)
            return
        if attempt == ATTEMPTS:
            raise ExecutorError(
                f"{method} {item} failed after {ATTEMPTS} attempts (last error: {reason}); finished work is kept: "
                "fix the cause and run the same command again to resume"
            )
        _logger.warning("%s %s: %s; attempt %d of %d follows", method, item, reason, attempt + 1, ATTEMPTS)
        self._waiting.appendleft((item, attempt + 1))


class _RayGroup:
    def __init__(self, actors: list[Any], roles: list[Role], executor: RayExecutor, timeout_s: float) -> None:
        self.size = len(actors)
        self._actors, self._roles, self._executor = actors, roles, executor
        self._timeout_s = timeout_s

    def call(self, method: str, *arguments: Any) -> list[Any]:
        members = zip(self._actors, self._roles, strict=True)
        return self._results([actor.call.remote(role, method, *arguments) for actor, role in members], method)

    def call_one(self, rank: int, method: str, *arguments: Any) -> Any:
        return self._results([self._actors[rank].call.remote(self._roles[rank], method, *arguments)], method)[0]

    def can_be_larger(self) -> bool:
        return self._executor.can_place_more()

    def _results(self, refs: list[ray.ObjectRef[Any]], method: str) -> list[Any]:
        """Return the results by rank. An error or the loss of one worker is raised at once, without further waiting."""
        deadline, waiting = time.monotonic() + self._timeout_s, refs
        results: dict[ray.ObjectRef[Any], Any] = {}
        try:
            while waiting:
                finished = self._executor.wait_in_group(waiting, deadline)
                if not finished:
                    raise WorkerLostError(f"{method}: no answer within {self._timeout_s:.0f} s")
                results |= {ref: ray.get(ref, timeout=self._timeout_s) for ref in finished}
                waiting = [ref for ref in waiting if ref not in results]
        except RayTaskError as error:
            raise error.cause or error from (error if error.cause else None)
        except (RayError, ConnectionError) as error:
            raise WorkerLostError(f"{method}: a worker was lost ({type(error).__name__})") from None
        return [results[ref] for ref in refs]


@contextmanager
def _own_reaction_to_sigterm() -> Iterator[None]:
    """Keep this program's handler of SIGTERM. Connecting to Ray replaces it by a handler that aborts the process."""
    chosen = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(chosen) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, chosen)


def _ray_is_gone(why: str) -> ExecutorError:
    return ExecutorError(f"Ray stopped working ({why}); finished work is kept: run the same command again to resume")
