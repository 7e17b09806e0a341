"""The batch size of the limit on a worker's memory, and the refusal of a limit that no batch keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from npeff.errors import NpeffError
from npeff.models import batch_size
from npeff.models.batch_size import largest_batch_size

MIB = 2**20


class Loaded:
    """Of a `LoadedModel`, what the search looks at."""

    device = torch.device("cpu")
    examples = range(40)

    def batches(self, examples: Sequence[int], size: int) -> Iterator[list[int]]:
        return ([example] for example in examples)

    def with_targets(self, examples: Sequence[int]) -> tuple[Sequence[int], None]:
        return examples, None


class Process:
    """A process that holds 100 MiB, in which an example of a batch takes 10 MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak: int = 100 * MIB, streams: int = 1) -> None:
        self.peak, self.sizes = peak, list[int]()
        monkeypatch.setattr(batch_size, "peak_bytes", lambda device: self.peak)
        monkeypatch.setattr(batch_size, "_held_bytes", lambda device: 100 * MIB)
        monkeypatch.setattr(batch_size, "n_streams", lambda device: streams)

    def __call__(self, batch: Any, examples: Sequence[int], targets: Any) -> None:
        self.sizes.append(len(examples))
        self.peak = max(self.peak, (100 + 10 * len(examples)) * MIB)

    def largest(self, limit_mib: int) -> int:
        return largest_batch_size(Loaded(), self, limit_mib * MIB)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "streams", "size"), [(10, 1, 1), (19, 1, 1), (20, 1, 2), (2048, 1, 32), (80, 4, 2), (79, 4, 1)]
)
def test_the_batch_size_is_the_largest_power_of_two_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int, streams: int, size: int
) -> None:
    assert Process(monkeypatch, streams=streams).largest(limit) == size


def test_a_limit_below_one_example_is_refused_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NpeffError, match=r"one example takes 40 MiB.*set fishers\.memory_limit_mb to this or more"):
        Process(monkeypatch, streams=4).largest(39)


def test_a_former_peak_of_the_process_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, peak=500 * MIB)
    assert process.largest(39) == 1
    assert process.sizes == [1]
