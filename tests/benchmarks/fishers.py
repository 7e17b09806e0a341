"""What the Fishers' stage costs and how exact it is, next to what it could cost and to what others do.

    python tests/benchmarks/fishers.py [accuracy speed actors bergson start gpu experts] [--rounds 5] [--output FILE]
                                       [--bergson-python PYTHON] [--tiny]

Each section prints a table and has its place in one JSON file. Those that need something that is not here say so:

    accuracy  how well stored Fishers keep inner products, beside top-k and two-sided projections; exactness of norms
    speed     time per example over one forward and R input-gradient backward passes, and what the rest goes to
    actors    throughput of two Ray actors over that of one
    bergson   a gradient index of a causal language model, beside bergson's
    start     the whole command on a tiny language model, beside bergson's: CPU seconds, memory, processes
    gpu       speed on a GPU, of this model and of a decoder of 1.3 billion parameters; --tiny tries it on the CPU
    experts   speed of mixtures of experts, CPU time; --tiny tries it with tiny sizes

bergson 2.5.1 has an environment of its own, which pip makes in runs/benchmarks/bergson unless --bergson-python names
the Python of one. All but the last four need NPEFF_SHARED_DATA, a folder with models/minilm-sick and
data/sick/SICK_test_annotated.txt.
`README.md` beside this file keeps results and what was learnt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import environment
from fisher_stage.accuracy import accuracy
from fisher_stage.actors import actors
from fisher_stage.experts import experts
from fisher_stage.gpu import gpu
from fisher_stage.gradient_index import bergson
from fisher_stage.speed import speed
from fisher_stage.start import start
from quickstart import machine

BERGSON = ["bergson==2.5.1", "torch==2.13.0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="the sections; all unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/fishers.json"))
    parser.add_argument("--bergson-python", type=Path, help="Python of an environment with bergson 2.5.1")
    parser.add_argument("--tiny", action="store_true", help="the sections gpu and experts with tiny sizes, on the CPU")
    arguments = parser.parse_args()
    output: Path = arguments.output

    def bergson_python() -> Path | None:
        """Built for CUDA, torchvision and torchaudio break a CPU build of torch."""
        made = output.parent / "bergson"
        return arguments.bergson_python or environment(made, BERGSON, ["torchvision", "torchaudio"])

    sections: dict[str, Callable[[], dict[str, Any] | None]] = {
        "accuracy": accuracy,
        "speed": lambda: speed(arguments.rounds),
        "actors": lambda: actors(arguments.rounds),
        "bergson": lambda: bergson(bergson_python(), arguments.rounds),
        "start": lambda: start(bergson_python(), arguments.rounds),
        "gpu": lambda: gpu(arguments.rounds, arguments.tiny),
        "experts": lambda: experts(arguments.rounds, arguments.tiny),
    }
    if unknown := set(arguments.sections) - set(sections):
        parser.error(f"no section {sorted(unknown)[0]!r}: choose from {', '.join(sections)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections or sections:
        about = machine()
        found = sections[name]()
        if found is not None:
            everything = json.loads(output.read_text()) if output.exists() else {}
            everything[name] = {"machine": about, **found}
            output.write_text(json.dumps(everything, indent=2) + "\n")
        print()
    print(f"written to {output}")


if __name__ == "__main__":
    main()
