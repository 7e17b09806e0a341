"""A private Ray instance of this process: on this machine, on the loopback address, with its own authentication token.

By default, Ray uses one token per user, in ``~/.ray/auth_token``. The first process that finds no file creates it. If
two processes do this at the same time, the servers of the first process may read the token of the second and then
refuse all requests of the process that started them. A private Ray therefore uses a random token, which is passed to
its servers in their environment and never written to a file.

By default, Ray writes its logs and sockets to ``/tmp/ray``, where they stay, and where the link ``session_latest``
names the last session of any user. A private Ray has a folder of its own instead, which only this user can read, and
which is removed when Ray ends.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants

from npeff.execution.ray.authentication import Authentication

_STARTS = 2
"""Number of attempts to start Ray. On a busy machine, the servers of the first attempt may start too late."""

_LONGEST_FOLDER = 40
"""Largest length of the path of the folder. Ray adds up to 65 characters, and the path of a socket has at most 107."""

_REMOVALS = 20
"""Number of attempts to remove the folder, 0.1 s apart. Ray's agents may write to it after its servers have ended."""

_OBJECT_STORE_BYTES = 256 * 2**20  # components and records pass through it, never Fishers


class PrivateRay:
    """A private Ray instance. The constructor starts it, and `ray` is connected to it until `close`.

    Raises:
        Exception: Ray does not start. Ray has no common class for these errors.
    """

    def __init__(self, cpus: int) -> None:
        self._before = Authentication.current()
        self._folder = _new_folder()
        Authentication("token", secrets.token_hex(32)).use()
        try:
            _start(cpus, os.path.join(self._folder.name, "ray"))
        except BaseException:
            self._end()
            raise

    def dead_server(self) -> str | None:
        """Return the name of a server that has ended, or None if all servers are running."""
        if (node := _node()) is None:
            return None
        return next((name for name, _ in node.dead_processes() if name in ("gcs_server", "raylet")), None)

    def close(self) -> None:
        """Stop Ray. If a server has ended, kill the others without sending requests, which would never be answered."""
        if self.dead_server() is not None and (node := _node()) is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        self._end()

    def _end(self) -> None:
        ray.shutdown()
        self._before.use()
        for _ in range(_REMOVALS):
            self._folder.cleanup()
            if not os.path.exists(self._folder.name):
                return
            time.sleep(0.1)


def _new_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a folder that is removed at the latest when this process exits."""
    for parent in (os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "/tmp"):  # noqa: S108
        os.makedirs(parent, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir=parent, ignore_cleanup_errors=True)
        if len(folder.name) + len("/ray") <= _LONGEST_FOLDER:
            break
        folder.cleanup()
    return folder


def _node() -> Any:
    return ray._private.worker._global_node


def _start(cpus: int, folder: str) -> None:
    for starts_left in reversed(range(_STARTS)):
        try:
            with on_loopback():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=folder,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception:  # Ray raises a bare Exception when its servers start too late
            ray.shutdown()
            if not starts_left:
                raise


@contextmanager
def on_loopback() -> Iterator[None]:
    """Make a Ray that is started in this context listen on the loopback address only.

    Ray replaces 127.0.0.1 by the machine's external address and listens on all addresses, unless its switch for
    machines that are not cluster nodes (laptops) is set.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
