"""Memory that is freed is kept for the next batch."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from npeff.models.heap import keep_freed_memory

def batch():  # sixteen tensors of 8 MiB: as small as glibc takes from the heap, larger together than it likes to keep
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2 << 20) for _ in range(16)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
assert keep_freed_memory()
print([batch() for _ in range(8)][-1])
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
def test_a_further_batch_of_the_same_size_asks_the_system_for_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True)
    pages = 16 * (8 << 20) // 4096
    assert int(done.stdout) < pages // 20
