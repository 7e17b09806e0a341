"""Faithfulness of input attributions: functional Fisher information beside the published attributions.

    python tests/benchmarks/inputs.py [digits breast-cancer wine minilm captum cost stage]
        [--folder FOLDER] [--output FILE]

Every method gives an attribution of each input of an example. They are compared by deletion, insertion and information
(`npeff.input_fisher.faithfulness`) on examples that the model was not trained on. All methods with noise have the same
number of draws, and a spread of 0.15 or 1, which the validation examples choose for each method, score and model.
Covariance, mean and the other examples that replace inputs come from examples that are not tested. `minilm` needs
NPEFF_SHARED_DATA. Shapley values are estimated by captum in an environment of its own in the folder, and left out if
pip cannot make it. `captum` compares the attributions themselves.
`cost` divides the CPU time of our attribution by that of the passes that it needs, and `stage` that of the whole stage;
it compares two workers with one as well. The folder keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from inputs_stage.captum_agreement import agreement
from inputs_stage.cost import costs
from inputs_stage.problems import problems
from inputs_stage.stage import stage_costs
from inputs_stage.tables import summary
from inputs_stage.trials import record
from quickstart import machine


def main() -> None:
    known = [*problems(), "captum", "cost", "stage"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"{', '.join(known)}; all unless given")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/inputs"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/inputs.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(arguments.sections) - {*known, "minilm"}:
        parser.error(f"no section {sorted(unknown)[0]!r}: choose from {', '.join(known)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for section in arguments.sections or [*known, *({"minilm"} - set(known))]:
        if section not in known:
            print("minilm: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
            continue
        found: Any
        if section == "captum":
            found = agreement(arguments.folder)
        elif section == "cost":
            found = costs(arguments.folder)
        elif section == "stage":
            found = stage_costs(arguments.folder)
        else:
            problem = problems()[section]
            found = summary(problem, [record(problem, seed, arguments.folder) for seed in problem.seeds])
        everything = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        everything |= {section: found, "machine": machine()}
        arguments.output.write_text(json.dumps(everything, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
