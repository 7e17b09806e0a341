"""A Ray of this process alone: on this machine, behind loopback, with an authentication token of its own.

Ray's own habit is one token for all that a user starts, in ``~/.ray/auth_token``, made by whoever finds none there. Two
processes may find none and each write one; the servers of the first then read what the second wrote, and refuse the
process that started them for as long as it lives. A private Ray needs no token that anybody else could know: a random
one is handed to its servers in their environment, and no file holds it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from npeff.execution.ray.authentication import Authentication

_STARTS = 2
"""Where the machine is busy, the servers of a first try may come too late."""

_OBJECT_STORE_BYTES = 256 * 2**20  # components and records pass through it, never Fishers


class PrivateRay:
    """Started by its constructor; `ray` is connected to it until it is closed.

    Raises:
        RayError, RuntimeError, ConnectionError: it does not start.
    """

    def __init__(self, cpus: int) -> None:
        self._before = Authentication.current()
        Authentication("token", secrets.token_hex(32)).use()
        try:
            _start(cpus)
        except BaseException:
            self._before.use()
            raise

    def dead_server(self) -> str | None:
        """Which of its servers is dead; None while all is well."""
        if (node := _node()) is None:
            return None
        return next((name for name, _ in node.dead_processes() if name in ("gcs_server", "raylet")), None)

    def close(self) -> None:
        """End it. Where a server is dead already, nothing may be asked of the others: an answer would not come."""
        if self.dead_server() is not None and (node := _node()) is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        ray.shutdown()
        self._before.use()


def _node() -> Any:
    return ray._private.worker._global_node


def _start(cpus: int) -> None:
    for starts_left in reversed(range(_STARTS)):
        try:
            with on_loopback():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except (RayError, RuntimeError, ConnectionError):
            ray.shutdown()
            if not starts_left:
                raise


@contextmanager
def on_loopback() -> Iterator[None]:
    """Nothing outside this machine may reach a Ray that is started meanwhile. Ray takes 127.0.0.1 for the machine's
    outward address, and listens on all, unless its switch for machines that are no cluster nodes (laptops) is set."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
