"""The solver's history during the run: JSON lines, TensorBoard events, Weights & Biases, or MLflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npeff.runs.config_reading import ConfigError
from npeff.storage.location import is_remote
from npeff.storage.objects import download_files, files, upload_files

if TYPE_CHECKING:  # both import their packages on use
    from npeff.stages.factorize.trackers import MLflow, WandB

Metrics = Callable[[dict[str, Any]], None]
"""Called with each new row of the history. When an iteration is repeated after a crash, its row replaces the former row
of the iteration and all later rows."""


Kind = Literal["none", "jsonl", "tensorboard", "wandb", "mlflow"]
"""The values of the run file's ``factorization.metrics``."""


@contextmanager
def history_written(folder: Path, kind: Kind, name: str) -> Iterator[Metrics]:
    """Yield the writer for the run file's ``factorization.metrics``, and close it at the end.

    Args:
        folder: The folder ``metrics`` of the factorization.
        kind: What is written.
        name: Name of the run in Weights & Biases and in MLflow.

    Raises:
        ConfigError: A package is not installed, or the program does not start.
    """
    if kind != "wandb" and kind != "mlflow":
        yield metrics_writer(folder, kind)
        return
    with _tracker(folder, kind, name) as tracker:
        yield tracker


def write_summary(folder: Path, kind: Kind, name: str, numbers: Mapping[str, float]) -> None:
    """Add final numbers, such as those of the verification, to the run of Weights & Biases or MLflow.

    The other kinds have no place for them. Arguments and errors are those of `history_written`.
    """
    if kind == "wandb" or kind == "mlflow":
        with _tracker(folder, kind, name) as tracker:
            tracker.summarize(numbers)


@contextmanager
def _tracker(folder: Path, kind: Literal["wandb", "mlflow"], name: str) -> Iterator[WandB | MLflow]:
    from npeff.stages.factorize.trackers import MLflow, WandB

    tracker = WandB(folder, name) if kind == "wandb" else MLflow(folder, name)
    try:
        yield tracker
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close()


def metrics_writer(folder: Path, kind: Literal["none", "jsonl", "tensorboard"]) -> Metrics:
    """Return the writer of files in the folder ``metrics``.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if kind == "none":
        return lambda _: None
    if is_remote(folder):
        return _Uploaded(folder, kind)
    return _JsonLines(folder / "factorize.jsonl") if kind == "jsonl" else _TensorBoard(folder)


class _Uploaded:
    """Writes to a local folder and uploads it after every row, because objects cannot be appended to."""

    def __init__(self, folder: Path, kind: Literal["jsonl", "tensorboard"]) -> None:
        self._folder, self._local = folder, tempfile.TemporaryDirectory(prefix="npeff-")
        local = Path(self._local.name)
        download_files(folder, local, list(files(folder)))
        self._stamps = _stamps(local)
        self._write = metrics_writer(local, kind)

    def __call__(self, row: dict[str, Any]) -> None:
        self._write(row)
        stamps = _stamps(Path(self._local.name))
        changed = [name for name, stamp in stamps.items() if self._stamps.get(name) != stamp]
        upload_files(Path(self._local.name), self._folder, changed)
        self._stamps = stamps


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir()}


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._path, self._last = path, float("inf")

    def __call__(self, row: dict[str, Any]) -> None:
        if row["iteration"] <= self._last:
            self._rewind(row["iteration"])
        self._last = row["iteration"]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _rewind(self, iteration: int) -> None:
        """Keep only the complete lines of earlier iterations. A crash can leave an incomplete line."""
        self._path.parent.mkdir(exist_ok=True)
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] < iteration]
        self._path.write_text("".join(kept), encoding="utf-8")


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "factorization.metrics: tensorboard needs TensorBoard: pip install tensorboard, or choose jsonl"
            ) from None
        self._make = lambda iteration: SummaryWriter(str(folder), purge_step=iteration)
        self._writer: Any = None
        self._last = float("inf")

    def __call__(self, row: dict[str, Any]) -> None:
        if row["iteration"] <= self._last:
            self._writer = self._make(row["iteration"])  # type: ignore[no-untyped-call]
        self._last = row["iteration"]
        for name, value in row.items():
            if name != "iteration":
                self._writer.add_scalar(f"factorize/{name}", float(value), row["iteration"])
        self._writer.flush()
