"""What a command takes, with all processes that it starts: CPU and wall-clock seconds, memory, number of processes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

_MARK = "NPEFF_BENCHMARK_PROCESS"
_LOOK_EVERY_S = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    wall_s: float
    peak_memory_bytes: int
    """Of all processes at one time; memory that several share counts once (proportional set sizes)."""
    processes: int
    """At one time."""


def measured(command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> Cost:
    """Run a command to its end. Its processes are known by a variable in their environments, which they inherit, so
    that those count too whose parents have ended. Linux only.

    Args:
        environment: variables for the command, besides this process's own.
        folder: where the command runs.

    Raises:
        RuntimeError: the command fails; the message has the end of what it wrote.
    """
    mark = f"{_MARK}={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    variables = os.environ | {name: value} | (environment or {})
    began = time.perf_counter()
    cpu_s: dict[str, float] = {}
    memory, processes = 0, 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=output, stderr=output)
        others: set[str] = set()
        while process.poll() is None:
            found = {
                pid: used for pid in os.listdir("/proc") if pid.isdigit() and pid not in others and (used := _used(pid))
            }
            for pid in [pid for pid in found if pid not in cpu_s]:
                if not _has_mark(pid, mark):
                    others.add(pid)
                    del found[pid]
            cpu_s |= {pid: seconds for pid, (seconds, _) in found.items()}
            memory, processes = max(memory, sum(size for _, size in found.values())), max(processes, len(found))
            time.sleep(_LOOK_EVERY_S)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read()[-4000:]}")
    return Cost(sum(cpu_s.values()), time.perf_counter() - began, memory, processes)


def own_memory_of(pid: str) -> int:
    """Bytes of a process now without pages of files, which the system can drop. 0 where it has ended."""
    try:
        sizes = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) * 1024 for line in sizes if line.startswith(kinds))


def _has_mark(pid: str, mark: str) -> bool:
    try:
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _used(pid: str) -> tuple[float, int] | None:
    """CPU seconds so far and bytes of memory now; None where the process has ended or is not ours to look at."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        sizes = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    size = sum(int(line.split()[1]) * 1024 for line in sizes if line.startswith("Pss:"))
    return sum(map(int, times)) / _TICKS, size
