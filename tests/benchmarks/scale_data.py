"""Peak memory of the driver and of a worker, stage by stage, for data sets of two sizes and more.

    python tests/benchmarks/scale_data.py [--examples 20000 100000] [--output runs/benchmarks/scale-data.json]

N texts of 30 words, 32 tokens with the marks, are in one Parquet file. The model is a BERT of one layer of 8 features
with 3 classes, and only its classifier is selected: D = 27 without a sketch, R = 2. All numbers except N are small, so
that what grows with N is what one process holds of all the examples. The slope is the difference between the largest
and the smallest N. A run of `BASE` examples gives the memory of the programs themselves.

The kernel keeps the peak of a process (VmHWM), which is set back before each stage. The worker is one Ray actor.
Private memory, in brackets, leaves out the files that a process has mapped, which the kernel can drop. Linux only.

Legend: N examples, R rank, D sketch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BASE = 256
"""Number of examples of the run that shows what the programs need without data."""
SHARD = 4096
_LOOK_EVERY_S = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")
_MEASURED = ("driver", "worker", "driver_private", "worker_private", "cpu_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/scale-data.json"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        run_stages(arguments.child)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for n_examples in (BASE, *arguments.examples):
            found[n_examples] = measured(Path(folder) / str(n_examples), n_examples)
            show(found)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def measured(folder: Path, n_examples: int) -> dict[str, dict[str, Any]]:
    """Make the data, run the stages in a process, and return, by stage, peaks in bytes and CPU seconds."""
    folder.mkdir()
    make_data(folder, n_examples)
    stage_file = folder / "stage"
    stage_file.write_text("imports")
    command = [sys.executable, __file__, "--child", str(folder)]
    found: dict[str, dict[str, Any]] = {}
    cpu_before: dict[int, float] = {}
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as driver:
        while driver.poll() is None:
            stage = stage_file.read_text() or "imports"
            own = found.setdefault(
                stage, {"driver": 0, "worker": 0, "driver_private": 0, "worker_private": 0, "cpu_s": 0.0}
            )
            for pid in (driver.pid, *descendants(driver.pid)):
                if (used := usage(pid)) is None:
                    continue
                own["cpu_s"] += used["cpu_s"] - cpu_before.get(pid, 0.0)
                cpu_before[pid] = used["cpu_s"]
                role = "driver" if pid == driver.pid else "worker" if used["is_worker"] else None
                if role is not None:
                    own[role] = max(own[role], used["peak"])
                    own[f"{role}_private"] = max(own[f"{role}_private"], used["private"])
            time.sleep(_LOOK_EVERY_S)
    if driver.returncode:
        raise SystemExit((folder / "log").read_text()[-3000:])
    files = [file for file in (folder / "run").rglob("*") if file.is_file()]
    found["files"] = {"number": len(files), "bytes": sum(file.stat().st_size for file in files)}
    return found


def usage(pid: int) -> dict[str, Any] | None:
    """Return the peak and the private memory of a process in bytes, and its CPU seconds; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    sizes = {line.partition(":")[0]: line.split()[1] for line in status if line.endswith("kB")}
    if "VmHWM" not in sizes:
        return None
    return {
        "peak": int(sizes["VmHWM"]) * 1024,
        "private": int(sizes["RssAnon"]) * 1024,
        "cpu_s": sum(map(int, times)) / _TICKS,
        "is_worker": title.startswith(b"ray::") and b"IDLE" not in title,
    }


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, directly or indirectly."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        children += [
            c
            for t in os.listdir(f"/proc/{pid}/task")
            if int(t) != pid
            for c in Path(f"/proc/{pid}/task/{t}/children").read_text().split()
        ]
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def run_stages(folder: Path) -> None:
    """Run the stages in this process, with one worker in another, and name each in the file ``stage``."""
    import npeff
    from npeff.stages.registry import STAGES
    from npeff.stages.worker_specs import executor_for

    config = npeff.RunConfig.model_validate(json.loads((folder / "run.json").read_text()))
    run = npeff.RunDirectory.create(config)
    with run.lock(), executor_for(run, None) as executor:
        for stage in STAGES:
            if stage.in_run(config):
                begin(folder, stage.name)
                stage(run, executor=executor, progress="none")
    begin(folder, "report")
    npeff.report(run)


def begin(folder: Path, stage: str) -> None:
    """Set the peaks of this process and of the worker back to what they hold, and name the stage that begins."""
    for pid in (os.getpid(), *descendants(os.getpid())):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")
    write_text(folder / "stage", stage)


def write_text(path: Path, text: str) -> None:
    """Replace the text of a file that another process reads."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def make_data(folder: Path, n_examples: int) -> None:
    """Write the texts, the model and the run file."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tasks import tiny
    from transformers import AutoModelForSequenceClassification, BertConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(max_position_embeddings=32, num_labels=3, **sizes, **tiny.SIZE)
    tiny.save_tokenizer(folder / "model", types=True)
    tiny.save_model(folder / "model", AutoModelForSequenceClassification, config)
    words = np.array([word for word in tiny.WORDS if not word.startswith("#")])
    rng = np.random.default_rng(0)
    schema = pa.schema({"key": pa.string(), "text": pa.string(), "class": pa.int64(), "source": pa.string()})
    with pq.ParquetWriter(folder / "texts.parquet", schema) as writer:
        for start in range(0, n_examples, 10_000):
            numbers = range(start, min(start + 10_000, n_examples))
            chosen = rng.integers(0, len(words), (len(numbers), 30))
            columns = {
                "key": [f"document-{number}" for number in numbers],
                "text": [" ".join(words[row]) for row in chosen],
                "class": rng.integers(0, 3, len(numbers)),
                "source": [f"source {number % 7}" for number in numbers],
            }
            writer.write_table(pa.table(columns, schema))
    options = {"data": str(folder / "texts.parquet"), "text_columns": ["text"], "label_column": "class"}
    settings = {
        "run_dir": str(folder / "run"),
        "task": {
            "name": "huggingface-sequence-classification",
            "options": {"model": str(folder / "model"), "id_column": "key", "max_length": 32, **options},
        },
        "parameters": {"include": ["classifier*"]},
        "fishers": {"sketch": {"kind": "identity"}, "shard_size": SHARD, "batch_size": 512},
        "factorization": {"n_components": 4, "max_iterations": 5},
        "verification": {"top_examples": 16, "baseline_examples": 64},
        "executor": {"kind": "ray", "workers": 1},
    }
    (folder / "run.json").write_text(json.dumps(settings))


def show(found: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Print the peaks in MiB, and the slope in bytes per example."""
    sizes = [size for size in found if size != BASE] or [BASE]
    first, last = sizes[0], sizes[-1]
    stages = [stage for stage in found[last] if stage != "files"]
    print(f"\n{'MiB':>14}" + "".join(f"{size:>18,}" for size in found) + f"{'bytes/example':>18}{'CPU s':>8}")
    for role in ("driver", "worker"):
        for stage in stages:
            row = f"{role} {stage}".rjust(14)
            for size in found:
                each = found[size].get(stage, {})
                row += f"{each.get(role, 0) / 2**20:>9.0f} ({each.get(f'{role}_private', 0) / 2**20:>5.0f})"
            base = BASE if first == last else first
            slope = (found[last][stage][role] - found[base].get(stage, {}).get(role, 0)) / max(1, last - base)
            print(row + f"{slope:>18.0f}" + f"{found[last][stage]['cpu_s']:>8.0f}" * (role == "driver"))
    print("files", {size: each["files"] for size, each in found.items()}, flush=True)


if __name__ == "__main__":
    main()
