"""Calls in a process of their own, with limits on time, memory, processors and the size of the result.

A limit that the caller's process sets for itself would not hold: a library that computes in C cannot be interrupted at
every point, and allocates memory that its own limit does not count. A process can be ended at any point, and the
operating system counts all of its memory.

The processes are copies of a process that has imported the modules of the live view and has no threads (Python's
"forkserver"), so that a call starts in a few milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from npeff.errors import printable_traceback
from npeff.query.errors import QueryError

PROCESSES = multiprocessing.get_context("forkserver")
_CORES = 2
"""Number of processors that a call may use, so that a machine remains usable for others."""


@dataclass(frozen=True)
class CallLimits:
    """Limits of a call."""

    seconds: float
    memory_bytes: int
    result_bytes: int


class LimitExceededError(QueryError):
    """The call needed more time or memory than allowed, or its result is too large. The problem says which."""


def prepare(modules: Sequence[str]) -> None:
    """Start the process from which the others are copied, with these modules imported. Call it in the main thread."""
    # Arrow's default allocator reserves a GiB of addresses, which would count as memory.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    PROCESSES.set_forkserver_preload(["__main__", *modules])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, but is for the server only
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def call_limited(
    function: Callable[..., bytes], arguments: tuple[Any, ...], limits: CallLimits, client: socket.socket
) -> bytes:
    """Call a function in another process, which is ended with this call.

    Args:
        function: A function of a module.
        arguments: Its arguments.
        limits: Limits of the call.
        client: The connection to the client who waits for the result.

    Returns:
        The result of the function. It is empty if the function raised an exception, whose traceback is then printed.

    Raises:
        LimitExceededError: The function exceeded a limit.
        ConnectionAbortedError: The client has closed the connection.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_run, args=(sender, function, arguments, limits), daemon=True)
    try:
        process.start()
        sender.close()
        _wait_for(receiver, client, limits.seconds)
        return receiver.recv_bytes(limits.result_bytes)
    except EOFError:
        raise LimitExceededError(f"needs more than {limits.memory_bytes / 2**30:.3g} GiB of memory") from None
    except ConnectionError:
        raise
    except OSError:  # of recv_bytes
        raise LimitExceededError(f"has a result of more than {limits.result_bytes / 2**20:.3g} MiB") from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _wait_for(receiver: Connection, client: socket.socket, seconds: float) -> None:
    """Wait until there is a result, or the end of the process. Nobody reads what the client may have sent since."""
    watched = select.poll()
    watched.register(receiver, select.POLLIN)
    # the client has closed the connection, whatever it has sent before; poll always reports an error of the connection
    watched.register(client, getattr(select, "POLLRDHUP", 0))  # Linux only
    ready = [number for number, _ in watched.poll(1000 * seconds)]
    if not ready:
        raise LimitExceededError(f"takes more than {seconds:g} s")
    if receiver.fileno() not in ready:
        raise ConnectionAbortedError("the client has closed the connection")


def _run(sender: Connection, function: Callable[..., bytes], arguments: tuple[Any, ...], limits: CallLimits) -> None:
    """Run the function in this process and send its result."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    processor_s = int(_CORES * limits.seconds) + 1  # for the case that the server is killed
    resource.setrlimit(resource.RLIMIT_CPU, (processor_s, processor_s))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, random.sample(cores, min(_CORES, len(cores))))
    try:
        result = function(*arguments)
    except MemoryError:
        return  # the caller finds a closed connection, as if the process were killed
    except Exception as error:
        print(printable_traceback(error), end="", file=sys.stderr)
        result = b""
    sender.send_bytes(result)
