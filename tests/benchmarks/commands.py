"""CPU seconds of commands that only read, beside the imports that they cannot do without.

    python tests/benchmarks/commands.py [RUN_DIR] [--rounds N]

Each command runs in a process of its own, interleaved with the floor: importing duckdb, pyarrow.parquet, typer and
rich.console. Prints the median over the rounds and its ratio to the floor's median, and writes JSON. Without RUN_DIR
the run is a synthetic one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from quickstart import machine
from rich.console import Console
from rich.table import Table
from synthetic_run import write_run

RESULTS = Path("runs/benchmarks/commands.json")
FLOOR = ["-c", "import duckdb, pyarrow.parquet, typer, rich.console"]
LIMITS = {"--help": 1.5, "query top": 2.5, "status": 2.0}
"""Wanted ratios to the floor."""


def commands(run: str) -> dict[str, list[str]]:
    query = ["-m", "npeff", "query", run]
    return {
        "floor": FLOOR,
        "--help": ["-m", "npeff", "--help"],
        "--version": ["-m", "npeff", "--version"],
        "completion": ["-m", "npeff", "--show-completion", "bash"],
        "status": ["-m", "npeff", "status", run],
        "query top": [*query, "top", "--component", "3"],
        "query components": [*query, "components"],
        "query energy": [*query, "energy", "--component", "3"],
        "query sql": [*query, "sql", "select count(*) from examples"],
        "query example": [*query, "example", "--example", "0"],
        "query similar": [*query, "similar", "--component", "3"],
        "query enriched": [*query, "enriched", "--where", "not correct"],
    }


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def synthetic(folder: Path) -> str:
    run = write_run(folder / "run")
    (run.path / "run.yaml").write_text(
        f"run_dir: {run.path}\ntask: {{name: digits}}\nfactorization: {{n_components: 12}}\n", encoding="utf-8"
    )
    return str(run.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="?", help="a finished run")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        asked = commands(options.run_dir or synthetic(Path(scratch)))
        for arguments in asked.values():
            cpu_seconds(arguments)  # reads what is on disk into memory, and compiles modules
        rounds = [{name: cpu_seconds(arguments) for name, arguments in asked.items()} for _ in range(options.rounds)]
    seconds = {name: statistics.median(each[name] for each in rounds) for name in asked}
    table = Table("command", "CPU seconds", "over the floor", "wanted")
    for name, median in seconds.items():
        wanted = f"≤ {LIMITS[name]}" if name in LIMITS else ""
        table.add_row(name, f"{median:.3f}", f"{median / seconds['floor']:.2f}", wanted)
    Console().print(table)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "rounds": rounds, "median": seconds}, indent=1))


if __name__ == "__main__":
    main()
