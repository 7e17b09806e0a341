"""Does `npeff select` find the number of components that was planted?

    python tests/benchmarks/selection.py [--planted 16 48] [--data-seeds 100 101 102] [--components 12,24,36,60]
                                         [--seeds 2] [--noise 0.2] [--output FILE]

Every problem is a run of its own with Fishers of `tests/planted.py`, searched by the command's own stage. The range of
numbers tried at first must not contain the planted ones. Seeds from 100 on were kept for this: the rule was made on
others. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quickstart import machine

sys.path.insert(0, str(Path(__file__).parents[1]))

from npeff.runs.progress import LogProgress, SilentProgress
from npeff.stages.select.stage import select
from npeff.store.tables import read_table
from planted import planted_fishers
from planted_run import planted_run

SIZES = {"small": {"n_examples": 1500, "dim": 128}, "large": {"n_examples": 2400, "dim": 256}}
"""Of problems with up to 24 components, and of those with more."""


def recommended(n_components: int, data_seed: int, selection: dict[str, Any], *, noise: float, verbose: bool) -> dict:
    """One problem: what was planted, what was found, and the table."""
    size = SIZES["small" if n_components <= 24 else "large"]
    planted = planted_fishers(rank=3, n_components=n_components, noise=noise, seed=data_seed, **size)
    with tempfile.TemporaryDirectory() as folder:
        run = planted_run(Path(folder) / "run", planted, selection=selection)
        began, cpu_began = time.monotonic(), time.process_time()
        found = select(run, progress=LogProgress() if verbose else SilentProgress())
        table = read_table(run.table("selection"), "selection").to_pylist()
    return {
        "planted": n_components,
        "data_seed": data_seed,
        "noise": noise,
        **size,
        "found": found["n_components"],
        "sharp": found["sharp"],
        "reason": found["reason"],
        "n_fits": found["n_fits"],
        "cpu_seconds": time.process_time() - cpu_began,
        "seconds": time.monotonic() - began,
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planted", type=int, nargs="+", default=[16, 48])
    parser.add_argument("--data-seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--components", default="12,24,36,60")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--verbose", action="store_true", help="show the progress of every search")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/selection.json"))
    arguments = parser.parse_args()
    selection = {"components": arguments.components, "seeds": arguments.seeds}
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    about, results = machine(), []
    print(f"{'planted':>8}{'data seed':>10}{'found':>7}{'sharp':>7}{'fits':>6}{'CPU s':>8}")
    for n_components in arguments.planted:
        for data_seed in arguments.data_seeds:
            row = recommended(n_components, data_seed, selection, noise=arguments.noise, verbose=arguments.verbose)
            results.append(row)
            print(
                f"{row['planted']:>8}{row['data_seed']:>10}{row['found']:>7}{row['sharp']!s:>7}{row['n_fits']:>6}"
                f"{row['cpu_seconds']:>8.0f}",
                flush=True,
            )
            output.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")
    near = sum(abs(row["found"] - row["planted"]) <= 1 for row in results)
    print(f"{near} of {len(results)} within 1 of what was planted")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
