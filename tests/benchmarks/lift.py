"""What lifting components to parameter space takes, next to computing the Fishers that they are components of.

    python tests/benchmarks/lift.py [--examples 1024] [--components 32] [--output FILE]

MiniLM on SICK, one thread, in CPU time: the stages themselves, with what they read and write. Fishers are of all
examples, the lift is over the two thirds that the components were fitted on; all components are lifted in one pass.
Needs NPEFF_SHARED_DATA, a folder with models/minilm-sick and data/sick/SICK_test_annotated.txt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import npeff
import torch
from fisher_stage import minilm
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from quickstart import machine

MEMORY_LIMIT_MB = 2048
"""Of the directions: 32 of 10.8 million parameters take 1,317."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1024, help="the first so many pairs; there are 4,927")
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/lift.json"))
    arguments = parser.parse_args()
    if not minilm.available():
        print("lift: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
        return
    about = machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        document = minilm.config(Path(folder) / "run").model_dump()
        document["task"]["options"] |= {"limit": arguments.examples}
        document["factorization"] |= {"n_components": arguments.components, "stability_examples": 0}
        document["lift"] = {"memory_limit_mb": MEMORY_LIMIT_MB}
        document["executor"] = {"kind": "serial"}
        run = RunDirectory.create(RunConfig.model_validate(document))
        minilm.model_spec(run.config).load()  # libraries are imported once, before anything is measured
        seconds = {}
        for name, stage in {
            "fishers": npeff.compute_fishers,
            "factorize": npeff.factorize,
            "lift": npeff.lift,
        }.items():
            began = time.process_time()
            summary = stage(run)
            seconds[name] = time.process_time() - began
    ratio = seconds["lift"] / seconds["fishers"]
    print(f"lift, {arguments.examples} pairs, {arguments.components} components, one thread")
    print(f"  Fishers {seconds['fishers']:8.1f} s of CPU time")
    print(f"  lift    {seconds['lift']:8.1f} s, {ratio:.2f} × (at most 1.5)")
    print(f"  median cosine of the sketched direction to the component {summary['median_cosine']:.4f} (at least 0.98)")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": about, "seconds": seconds, "ratio": ratio, "median_cosine": summary["median_cosine"]}
    arguments.output.write_text(json.dumps(result | {"n_examples": arguments.examples}, indent=2) + "\n")


if __name__ == "__main__":
    main()
