"""Cost of the checks of the rows, as a fraction of the stage `fishers`.

    python tests/benchmarks/row_checks.py [digits minilm] [--batches N] [--rounds N]

`minilm` needs NPEFF_SHARED_DATA. Computes the same batches with the checks (what parameters and modules do in each
batch, and the comparison with an ordinary backward pass for new behaviour and by chance) and without, in turns batch by
batch, in this process, on one thread. Prints the median ratio of the CPU time over the rounds. The first batch is
measured, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import LabelSpec, frozen
from npeff.gradients.collector import GradientCollector
from npeff.gradients.parameter_uses import ParameterUses
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.runs.config import RunConfig
from npeff.sketches import SketchSpec, make_sketch
from rich.console import Console
from rich.table import Table

RESULTS = Path("runs/benchmarks/row_checks.json")
ROOT = Path(__file__).parents[2]
RUN_FILES = {"digits": ROOT / "jobs/quickstart.yaml", "minilm": ROOT / "jobs/minilm-sick.yaml"}


def loaded_model(name: str, folder: Path) -> tuple[LoadedModel, SketchSpec, LabelSpec]:
    config = RunConfig.from_yaml(RUN_FILES[name])
    task, chosen = config.task, config.parameters
    spec = ModelSpec(task.name, task.options, folder, tuple(chosen.include), tuple(chosen.exclude), "cpu")
    spec.prepare()
    return spec.load(), config.fishers.sketch, config.fishers.label_spec(config.seed)


def cpu_seconds(loaded: LoadedModel, sketch: Any, labels: LabelSpec, batches: list[list[int]]) -> tuple[float, float]:
    """CPU seconds of the Fishers of all batches by two new collectors, without and with checks, batch by batch."""
    linear_map, seconds = make_sketch(sketch, loaded.layout, 0), [0.0, 0.0]
    both = [
        PerExampleFishers(loaded.model, loaded.logits, loaded.layout, linear_map, labels, loaded.one) for _ in range(2)
    ]
    with frozen(loaded.model):
        for place, examples in enumerate(batches):
            batch = loaded.batch(examples)
            targets = loaded.targets(batch, examples)
            for checked in (False, True) if place % 2 else (True, False):
                with ExitStack() as stack:
                    if not checked:
                        stack.enter_context(patch.object(GradientCollector, "_check", lambda *_: None))
                        stack.enter_context(patch.object(ParameterUses, "following", lambda *_: nullcontext()))
                    began = time.process_time()
                    both[checked](batch, examples, targets)
                    seconds[checked] += time.process_time() - began
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["digits"])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "batches", "s without", "s with", "ratio", title="checks of the rows, CPU seconds")
    results = {}
    for name in arguments.names:
        folder = Path("runs/benchmarks") / f"row_checks-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        loaded, sketch, labels = loaded_model(name, folder)
        plan = loaded.batches(range(len(loaded.examples)), arguments.batch_size)
        batches = [plan[place % len(plan)] for place in range(arguments.batches)]
        rounds: list[tuple[float, float]] = []
        for _ in range(arguments.rounds):
            rounds.append(cpu_seconds(loaded, sketch, labels, batches))
        plain, checked = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratio = statistics.median(checked / plain for plain, checked in rounds)
        table.add_row(name, str(len(batches)), f"{plain:.1f}", f"{checked:.1f}", f"{ratio:.3f}")
        results[name] = {"batches": len(batches), "without_s": plain, "with_s": checked, "ratio": ratio}
    Console().print(table)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results | {"cores": os.cpu_count()}, indent=1) + "\n")
    print(RESULTS, file=sys.stderr)


if __name__ == "__main__":
    main()
