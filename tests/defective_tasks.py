"""A small sound task, and tasks each with one defect that a user's own task may have.

They are named in run files by import path, ``defective_tasks:EmptyTask``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from npeff.tasks import Examples, Task
from torch import Tensor, nn


class Points(Examples):
    def __init__(self, n: int, class_names: Sequence[str], labels: Sequence[int | None] | None = None) -> None:
        self.class_names = class_names
        self._points = torch.randn(n, 5, generator=torch.Generator().manual_seed(3))
        self._labels = [i % 3 for i in range(n)] if labels is None else labels

    def __len__(self) -> int:
        return len(self._points)

    def batch(self, indices: Sequence[int]) -> Any:
        return self._points[list(indices)]

    def table(self) -> pa.Table:
        ids = [f"point-{i}" for i in range(len(self))]
        return pa.table({"id": ids, "label": pa.array(self._labels, pa.int64())})


class SoundTask(Task):
    """Three classes of points in five dimensions."""

    n_classes = 3
    class_names: Sequence[str] = ("a", "b", "c")

    def __init__(self, n: int = 40) -> None:
        self._n = n

    def model(self, cache: Path) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, self.n_classes))

    def examples(self, cache: Path) -> Examples:
        return Points(self._n, self.class_names)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch)


class EmptyTask(SoundTask):
    def __init__(self) -> None:
        super().__init__(n=0)


class LogitsPerTokenTask(SoundTask):
    """(B, T, C)"""

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch)[:, None].expand(-1, 4, -1)


class NoBatchAxisTask(SoundTask):
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch).sum(0, keepdim=True)


class ModelOutputTask(SoundTask):
    """Returns what a Hugging Face model returns, not its logits."""

    def logits(self, model: nn.Module, batch: Any) -> Any:
        return {"logits": model(batch)}


class DetachedTask(SoundTask):
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            return model(batch)


class OneLogitTask(SoundTask):
    n_classes = 1
    class_names = ("a",)


class TooFewNamesTask(SoundTask):
    class_names = ("a", "b")


class NoNamesTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        examples = Points(self._n, ())
        del examples.class_names
        return examples


class NanWeightsTask(SoundTask):
    def model(self, cache: Path) -> nn.Module:
        model = super().model(cache)
        model.get_parameter("0.weight").data[0, 0] = torch.nan
        return model


class LaterInvalidTask(SoundTask):
    """Every example but the first two has a NaN in it."""

    def examples(self, cache: Path) -> Examples:
        examples = super().examples(cache)
        examples._points[2:, 0] = torch.nan  # type: ignore[attr-defined]
        return examples


class FirstInvalidTask(SoundTask):
    """Only the first example has a NaN in it."""

    def examples(self, cache: Path) -> Examples:
        examples = super().examples(cache)
        examples._points[0, 0] = torch.nan  # type: ignore[attr-defined]
        return examples


class AllInvalidTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        examples = super().examples(cache)
        examples._points[:, 0] = torch.nan  # type: ignore[attr-defined]
        return examples


class LabelOutOfRangeTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        return Points(self._n, self.class_names, [7] * self._n)


class TableWithoutLabelTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        class Unlabelled(Points):
            def table(self) -> pa.Table:
                return super().table().select(["id"])

        return Unlabelled(self._n, self.class_names)


class StringLabelsTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        class Named(Points):
            def table(self) -> pa.Table:
                return pa.table({"id": [str(i) for i in range(len(self))], "label": ["a"] * len(self)})

        return Named(self._n, self.class_names)


class IntegerIdsTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        class Numbered(Points):
            def table(self) -> pa.Table:
                return pa.table({"id": list(range(len(self))), "label": pa.array([0] * len(self), pa.int64())})

        return Numbered(self._n, self.class_names)


class TableIsAListTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        class Listed(Points):
            def table(self) -> Any:
                return super().table().to_pylist()

        return Listed(self._n, self.class_names)


class ShortTableTask(SoundTask):
    def examples(self, cache: Path) -> Examples:
        class Short(Points):
            def table(self) -> pa.Table:
                return super().table().slice(1)

        return Short(self._n, self.class_names)


class RaisingConstructorTask(SoundTask):
    def __init__(self) -> None:
        Path("/no/such/file.csv").read_text()


class RaisingModelTask(SoundTask):
    def model(self, cache: Path) -> nn.Module:
        raise RuntimeError("Error(s) in loading state_dict for Net:\n\tMissing key(s) in state_dict: 'w'")


class RaisingLogitsTask(SoundTask):
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch @ torch.ones(3, 3))


class RaisingBatchTask(SoundTask):
    """The 31st example cannot be read."""

    def examples(self, cache: Path) -> Examples:
        class Broken(Points):
            def batch(self, indices: Sequence[int]) -> Any:
                if 30 in indices:
                    raise KeyError("image_30.png")
                return super().batch(indices)

        return Broken(self._n, self.class_names)


class UnpicklableError(Exception):
    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"code {code} at {where}")


class UnpicklableErrorTask(SoundTask):
    def model(self, cache: Path) -> nn.Module:
        raise UnpicklableError(3, "here")


class ModelIsNoModuleTask(SoundTask):
    def model(self, cache: Path) -> Any:
        return {"state_dict": {}}


class NoModelTask(SoundTask):
    def model(self, cache: Path) -> Any:
        return None


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.linear(x, self.inner.weight, self.inner.bias).tanh())


class FunctionalUseTask(SoundTask):
    """Uses a layer's weight without calling the layer."""

    def model(self, cache: Path) -> nn.Module:
        torch.manual_seed(0)
        return _Functional()


class NoParametersTask(SoundTask):
    n_classes = 5
    class_names = ("a", "b", "c", "d", "e")

    def model(self, cache: Path) -> nn.Module:
        return nn.Tanh()


class AbstractTask(Task):
    """Forgets `logits`."""

    def model(self, cache: Path) -> nn.Module:
        return nn.Linear(5, 3)

    def examples(self, cache: Path) -> Examples:
        return Points(4, ("a", "b", "c"))


class ExitingTask(SoundTask):
    def model(self, cache: Path) -> nn.Module:
        sys.exit("model not found")


class DyingTask(SoundTask):
    def model(self, cache: Path) -> nn.Module:
        os._exit(7)


class GreedyTask(SoundTask):
    def model(self, cache: Path) -> nn.Module:
        raise MemoryError("Unable to allocate 3.00 TiB for an array")


class ChangingTask(SoundTask):
    """Has other examples each time it is constructed."""

    def examples(self, cache: Path) -> Examples:
        counter = cache / "count"
        count = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(count + 1))
        return Points(self._n - count, self.class_names)


class ConstantModelTask(SoundTask):
    """All gradients are zero: the logits do not depend on the parameters."""

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return 0 * model(batch)


not_a_task = 3


class NotATask:
    pass


class GatedTask(SoundTask):
    """Waits, in the second half of the examples, until a file is there."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self._gate = Path(gate)

    def examples(self, cache: Path) -> Examples:
        gate = self._gate

        class Gated(Points):
            def batch(self, indices: Sequence[int]) -> Any:
                deadline = time.monotonic() + 60
                while max(indices) >= 20 and not gate.exists():
                    if time.monotonic() > deadline:
                        raise TimeoutError(gate)
                    time.sleep(0.02)
                return super().batch(indices)

        return Gated(self._n, self.class_names)
