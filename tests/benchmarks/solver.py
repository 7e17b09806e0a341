"""What the solver costs and how good it is, next to the updates of the method's published implementation.

    python tests/benchmarks/solver.py [planted minilm pass scale faults model] [--seeds 5] [--rounds 5]
                                      [--cache FOLDER] [--output FILE] [--tiny]

Each section prints a table and has its place in one JSON file:

    planted  four kinds of planted problems: CPU time and passes to the reference's loss, components and loss reached
    minilm   the same race on Fishers of MiniLM/SICK; needs NPEFF_SHARED_DATA, and some minutes of CPU the first time
    pass     one pass over the data beside its two matrix products
    scale    100,000 examples by Ray workers: time per pass, workers, streaming, memory, bytes sent (6 GB of disk)
    faults   what a killed and a stopped worker, and a lost node, cost
    model    a model of cost with this machine's constants, and what it says of a million examples on a GPU node

Fishers and synthetic stores are kept in the cache folder, which should be outside any repository. Races are in CPU time
of one thread. `--tiny` tries every section in a minute or two. `README.md` beside this file keeps results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quickstart import machine

sys.path.append(str(Path(__file__).parents[1]))  # planted problems, faults
from solver_stage.cost_model import model
from solver_stage.faults import faults
from solver_stage.race import minilm, planted
from solver_stage.scale import one_pass, scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="planted, minilm, pass, scale, faults, model; all unless given")
    parser.add_argument("--seeds", type=int, default=5, help="of each planted problem")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "npeff-benchmarks")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/solver.json"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    arguments = parser.parse_args()
    tiny, output = arguments.tiny, arguments.output
    everything: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    sections: dict[str, Callable[[], dict[str, Any] | None]] = {
        "planted": lambda: planted(1 if tiny else arguments.seeds, tiny),
        "minilm": lambda: minilm(arguments.cache, tiny),
        "pass": lambda: one_pass(arguments.rounds, tiny),
        "scale": lambda: scale(arguments.cache, tiny),
        "faults": faults,
        "model": lambda: model(everything.get("pass"), tiny),
    }
    if unknown := set(arguments.sections) - set(sections):
        parser.error(f"no section {sorted(unknown)[0]!r}: choose from {', '.join(sections)}")
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections or sections:
        about = machine()
        found = sections[name]()
        if found is not None:
            everything[name] = {"machine": about, "tiny": tiny, **found}
            output.write_text(json.dumps(everything, indent=2) + "\n")
        print(flush=True)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
