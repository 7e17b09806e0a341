"""Workers as Ray actors, in one placement group.

Ray does not restart actors here (``max_restarts=0``). This module detects a lost worker, starts another one and retries
its item, so that every recovery is counted and every wait has a timeout.
"""

from __future__ import annotations

import fcntl
import logging
import platform
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from npeff.errors import first_line
from npeff.execution.executor import (
    ATTEMPTS,
    ExecutorError,
    Failures,
    Group,
    WorkerLostError,
    WorkerSpec,
    is_item_error,
    reason_of,
)
from npeff.execution.ray.address import check_is_ray
from npeff.execution.ray.jobs import in_job
from npeff.execution.ray.placement import WorkerPlacement
from npeff.execution.ray.private import PrivateRay

_LOOK_EVERY_S = 1.0
"""Interval at which a wait for workers checks that Ray itself is running."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Role:
    """The worker that an actor runs. One actor can have several roles in turn, because starting an actor is slow."""

    spec: WorkerSpec
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments for the worker's constructor."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class _Failure:
    reason: str


class _Worker:
    """The actor: sets up its process and runs the worker of a role.

    The first call constructs the worker. An error of the worker's constructor, such as a missing data set, is thus
    raised by that call. An error in the constructor of the actor would look like a lost process.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._key: str | None = None
        self._worker: Any = None
        self._lease: Any = None

    def call(self, role: _Role, method: str, *arguments: Any) -> Any:
        self._become(role)
        return getattr(self._worker, method)(*arguments)

    def call_item(self, role: _Role, method: str, item: Any) -> Any:
        """Return an error that may be specific to the item as a `_Failure`; raise errors of the constructor."""
        self._become(role)
        try:
            return getattr(self._worker, method)(item)
        except Exception as error:
            if not is_item_error(error):
                raise
            return _Failure(reason_of(error))

    def _become(self, role: _Role) -> None:
        if self._key != role.key:
            self._worker, self._key = None, None
            if self._lease is not None:
                self._lease.close()
            if role.spec.lease is not None:
                self._lease = open(role.spec.lease, "a")  # noqa: SIM115 - held as long as this process has the role
                _share_lock(self._lease, role.spec.lease)
            self._worker = role.spec.construct(**role.more)
            self._key = role.key


def _share_lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:  # the node may mount the folder in another way than the command
        raise ExecutorError(
            f"the file system of {path.parent} does not support locks on {platform.node()} ({error.strerror})",
            "mount it there with locks (on Lustre, with the option flock), or choose a run_dir on another file system "
            "or in a bucket",
            path=path.parent,
        ) from None


class RayExecutor:
    """Connects to Ray or starts it, and reserves the workers' resources in one placement group.

    Args:
        address: ``local`` starts a private Ray that ends with this executor; any other value is the address of a
            cluster to connect to. Inside a Ray job, the executor always connects to the job's cluster.
        workers: number of workers.
        cpus_per_worker: CPU cores of a worker.
        gpus_per_worker: GPUs of a worker, possibly a fraction.
        timeout_s: timeout in seconds for a placement group, an item, or a method of a group's worker.

    Raises:
        ExecutorError: Ray cannot be reached, or the cluster does not have the resources.
    """

    def __init__(
        self, address: str, *, workers: int, cpus_per_worker: int, gpus_per_worker: float, timeout_s: float
    ) -> None:
        self.workers = workers
        self._cpus, self._gpus, self._timeout_s = cpus_per_worker, gpus_per_worker, timeout_s
        self._started_ray = not ray.is_initialized()
        self._private: PrivateRay | None = None
        self._mappers: dict[int, Any] = {}
        """Actors of `map` by slot. The next call of `map` reuses them."""
        if self._started_ray:
            self._connect(address)
        try:
            self._placement = WorkerPlacement(
                workers,
                cpus=cpus_per_worker,
                gpus=gpus_per_worker,
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
        role, failures = _Role(spec, key=spec.key), Failures(method, split, self.workers)
        waiting = deque((item, 1) for item in items)
        actors = self._mappers
        idle = deque(range(self._places))
        running: dict[ray.ObjectRef[Any], tuple[int, Any, int, float]] = {}
        raised: BaseException | None = None  # an exception of the worker's method, which may be a ConnectionError too

        def retry(ref: ray.ObjectRef[Any], reason: str) -> None:
            slot, item, attempt, _ = running.pop(ref)
            self._end(actors.pop(slot))
            idle.append(slot)
            if keep_going:
                parts = failures.failed(item, attempt, reason)
                _logger.warning("%s %s: %s; attempt %d of %d", method, item, reason, attempt, ATTEMPTS)
                waiting.extend((part, attempt + 1) for part in parts)
                return
            if attempt == ATTEMPTS:
                raise ExecutorError(
                    f"{method} {item} failed after {ATTEMPTS} attempts (last error: {reason}); finished work is kept: "
                    "fix the cause and run the same command again to resume"
                )
            _logger.warning("%s %s: %s; attempt %d of %d follows", method, item, reason, attempt + 1, ATTEMPTS)
            waiting.appendleft((item, attempt + 1))

        try:
            if not actors:
                self._placement.renew()
                idle = deque(range(self._places))
            # start all actors, even for a single item: the others load the modules that the next call needs
            for slot in idle:
                if slot not in actors:
                    actors[slot] = self._start(slot)
            while waiting or running:
                while waiting and idle:
                    slot, (item, attempt) = idle.popleft(), waiting.popleft()
                    if slot not in actors:
                        actors[slot] = self._start(slot)
                    call = actors[slot].call_item if keep_going else actors[slot].call
                    ref = call.remote(role, method, item)
                    running[ref] = (slot, item, attempt, time.monotonic())
                finished = self._wait(list(running), 1)
                for ref in finished:
                    try:
                        result = ray.get(ref, timeout=self._timeout_s)
                    except RayTaskError as error:
                        raised = error.cause or error
                        raise raised from (error if error.cause else None)  # its text is the worker's traceback
                    except RayError as error:
                        retry(ref, f"its worker was lost ({type(error).__name__})")
                        continue
                    if isinstance(result, _Failure):
                        retry(ref, result.reason)
                        continue
                    slot, item, _, _ = running.pop(ref)
                    idle.append(slot)
                    failures.succeeded()
                    yield item, result
                now = time.monotonic()
                for ref in [ref for ref, (*_, since) in running.items() if now - since > self._timeout_s]:
                    retry(ref, f"no answer within {self._timeout_s:.0f} s")
            failures.raise_any()
        except (RayError, ConnectionError) as error:
            if error is raised:
                raise
            raise _ray_is_gone(f"{type(error).__name__}: {first_line(error)}") from None
        finally:
            for slot, *_ in running.values():  # their results are no longer needed
                self._end(actors.pop(slot))

    @contextmanager
    def group(self, spec: WorkerSpec) -> Iterator[Group]:
        self._end_mappers()  # they hold resources that the group needs
        try:
            self._placement.renew()
            size = self._places
            roles = [_Role(spec, {"rank": rank, "size": size}) for rank in range(size)]
            actors = [self._start(slot) for slot in range(size)]
        except (RayError, ConnectionError) as error:
            raise _ray_is_gone(f"{type(error).__name__}: {first_line(error)}") from None
        try:
            yield _RayGroup(actors, roles, self, self._timeout_s)
        finally:
            for actor in actors:
                self._end(actor)

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

    def _end(self, actor: Any) -> None:
        if self._dead_server() is not None:
            return
        try:
            ray.kill(actor)
        except Exception:
            # The actor, or Ray itself, may have ended already.
            _logger.debug("an actor could not be ended", exc_info=True)

    def _end_mappers(self) -> None:
        while self._mappers:
            self._end(self._mappers.popitem()[1])

    def _start(self, slot: int) -> Any:
        actor = ray.remote(_Worker).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy=self._placement.of(slot)
        )
        return actor.remote(self._cpus)

    def _connect(self, address: str) -> None:
        if not in_job():
            check_is_ray(address)
        try:
            with _own_reaction_to_sigterm():
                if address == "local" and not in_job():
                    self._private = PrivateRay(self.workers * self._cpus)
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


class _RayGroup:
    def __init__(self, actors: list[Any], roles: list[_Role], executor: RayExecutor, timeout_s: float) -> None:
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
