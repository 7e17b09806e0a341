"""The resources of workers on a Ray cluster: one placement group, which is replaced when nodes are lost or added."""

from __future__ import annotations

import logging
import time

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from npeff.errors import tell
from npeff.execution.executor import ExecutorError
from npeff.execution.ray.growth import nodes_may_come
from npeff.execution.ray.jobs import in_job

_TOO_SMALL_S = 30.0
"""Timeout in seconds for a placement group that the cluster cannot hold, even if it is empty or grows."""

_LOOK_EVERY_S = 1.0
_TELL_AFTER_S, _TELL_EVERY_S = 5.0, 60.0
"""Time in seconds of waiting after which a line tells what is waited for, and after which it is repeated."""
_ROUNDING = 1e-6  # ten tenths of a GPU are a whole one
_logger = logging.getLogger(__name__)


class WorkerPlacement:
    """One place with the resources of a worker for each of `workers`. After `renew` there can be fewer places.

    Args:
        workers: number of places.
        cpus: CPU cores of a process.
        gpus: GPUs of a process.
        processes: number of processes of a worker. They are on one node if a node that is alive can hold them.
        one_node: whether the cluster is this machine only, so that no single node can be lost.
        timeout_s: timeout in seconds for resources that other programs may release or an autoscaler may start.

    Raises:
        ExecutorError: the cluster does not have the resources.
    """

    def __init__(
        self, workers: int, *, cpus: int, gpus: float, one_node: bool, timeout_s: float, processes: int = 1
    ) -> None:
        self._workers, self._processes = workers, processes
        self._one_node, self._timeout_s = one_node, timeout_s
        one = {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})
        self._bundle, self._bundles = {name: processes * amount for name, amount in one.items()}, 1
        """The resources of a part of a worker that must be on one node, and the number of these parts."""
        if processes > 1 and not self._room():
            self._bundle, self._bundles = one, processes
        group = self._reserve(workers, timeout_s)
        if group is None:
            raise self._too_small()
        self._group = group
        self._wish: PlacementGroup | None = None
        """A pending placement group of the missing places. It makes an autoscaler start nodes; nothing waits for it."""

    @property
    def count(self) -> int:
        return int(self._group.bundle_count) // self._bundles

    def of(self, slot: int, rank: int = 0) -> PlacementGroupSchedulingStrategy:
        """Return the place of a process of a worker."""
        place = slot * self._bundles + rank % self._bundles
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)

    def is_whole(self) -> bool:
        """Return whether every place is on a node that is alive."""
        if self._one_node:
            return True
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        table = placement_group_table(self._group)
        return table["state"] == "CREATED" and alive.issuperset(table["bundles_to_node_id"].values())

    def can_be_larger(self) -> bool:
        """Return whether places are missing and the cluster has the resources for at least one of them."""
        if self.count >= self._workers or self._room() <= self.count:
            return False
        if self._wish is not None and placement_group_table(self._wish)["state"] == "CREATED":
            return True
        free = ray.available_resources()
        return all(free.get(name, 0.0) >= amount for name, amount in self._bundle.items())

    def renew(self) -> None:
        """After nodes were lost or added, reserve as many of the requested places as the cluster has room for.

        Raises:
            ExecutorError: there is no room for a single place within the timeout.
        """
        if self.is_whole() and not self.can_be_larger():
            return
        self.remove()
        began = time.monotonic()
        until, told = began + self._timeout_s, False
        while True:
            room = min(self._workers, self._room())
            if room > 0:
                self._withdraw()
            for count in range(room, 0, -1):
                if (group := self._reserve(count, _TOO_SMALL_S)) is not None:
                    self._group = group
                    self._ask_for(self._workers - count)
                    return
            self._ask_for(self._workers)
            if time.monotonic() >= until:
                self._withdraw()
                raise ExecutorError(
                    f"the cluster has no room for a worker, and no node was added within {self._timeout_s:.0f} s; "
                    "finished work is kept: run the same command again when the cluster has more nodes"
                )
            if not told and time.monotonic() - began >= _TELL_AFTER_S:
                told = True
                self._tell(1, time.monotonic() - began, self._timeout_s)
            time.sleep(_LOOK_EVERY_S)

    def remove(self) -> None:
        _remove(self._group)
        self._withdraw()

    def _ask_for(self, places: int) -> None:
        if places > 0 and self._wish is None and not self._one_node:
            self._wish = placement_group([self._bundle] * (places * self._bundles), strategy="PACK")

    def _withdraw(self) -> None:
        if self._wish is not None:
            _remove(self._wish)
            self._wish = None

    def _reserve(self, count: int, patience_s: float) -> PlacementGroup | None:
        group: PlacementGroup = placement_group([self._bundle] * (count * self._bundles), strategy="PACK")
        ready, began, told = group.ready(), time.monotonic(), -_TELL_EVERY_S
        while True:
            waited, limit_s = time.monotonic() - began, self._limit_s(group, patience_s)
            if waited >= _TELL_AFTER_S and waited >= told + _TELL_EVERY_S:
                told = waited
                self._tell(count, waited, limit_s)
            try:
                ray.get(ready, timeout=min(_TELL_AFTER_S, max(0.0, limit_s - waited)))
                return group
            except GetTimeoutError:
                if time.monotonic() - began >= limit_s:
                    remove_placement_group(group)
                    return None

    def _limit_s(self, group: PlacementGroup, patience_s: float) -> float:
        """Return how long to wait for a pending group: not long if no program can release, or add, the resources."""
        if self._room() >= self._workers:
            return patience_s
        if self._one_node:
            return 0.0
        may_come = nodes_may_come(group)
        if may_come is None:
            may_come = in_job()  # a cluster for jobs has an autoscaler more often than not
        return patience_s if may_come else min(patience_s, _TOO_SMALL_S)

    def _too_small(self) -> ExecutorError:
        wanted = self._wanted(self._workers)
        counts = "cpus_per_worker, gpus_per_worker or devices_per_model"
        if self._processes == 1:
            counts = "cpus_per_worker or gpus_per_worker"
        lower = f"lower executor.workers, {counts}"
        free, have = self._free_and_total()
        if (room := self._room()) >= self._workers:
            return ExecutorError(
                f"other programs use the cluster, and it has no room for {wanted} ({free} of {have} are free): wait "
                f"until they have ended, or {lower}"
            )
        return ExecutorError(
            f"the cluster has no room for {wanted} (it has {have} in total, room for {room}, and did not grow): {lower}"
        )

    def _tell(self, count: int, waited: float, patience_s: float) -> None:
        free, have = self._free_and_total()
        tell(
            f"waiting for room for {self._wanted(count)}: {free} of {have} in the cluster are free "
            f"({waited:.0f} s of at most {patience_s:.0f} s)"
        )

    def _wanted(self, count: int) -> str:
        one = {name: self._bundles * amount for name, amount in self._bundle.items()}
        return f"{count} worker{'s' if count > 1 else ''} with {_resources(one)} each"

    def _room(self) -> int:
        """Return how many workers the alive nodes could hold if no other program used them."""
        parts = sum(
            int(min(node["Resources"].get(name, 0.0) / amount for name, amount in self._bundle.items()) + _ROUNDING)
            for node in ray.nodes()
            if node["Alive"]
        )
        return parts // self._bundles

    def _free_and_total(self) -> tuple[str, str]:
        """Return the resources of the cluster that no program uses, and all of them, of the kinds that workers need."""
        free, have = ray.available_resources(), ray.cluster_resources()
        left, all_ = ({name: found.get(name, 0.0) for name in self._bundle} for found in (free, have))
        return _resources(left), _resources(all_)


def _remove(group: PlacementGroup) -> None:
    try:
        remove_placement_group(group)
    except Exception:
        # Ray may have stopped already. An error here must not hide the cause.
        _logger.debug("the placement group could not be removed", exc_info=True)


def _resources(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def node_address() -> str:
    """Return the address of this node that the other nodes of the cluster can reach."""
    address: str = ray.util.get_node_ip_address()
    return address
