"""Natural gradients: iterations of conjugate gradients, the loss after one step, and K-FAC beside nngeometry.

    python tests/benchmarks/natural_gradient.py [iterations] [losses] [kfac] [--output FILE] [--figure FILE]

All sections by default. The network is that of the task ``digits``, with 9,802 parameters. nngeometry is installed into
a folder of its own. `README.md` beside this file keeps results. `repair.py` compares the natural-gradient step with
repair and with training. `--figure` writes the picture of docs/step.md from the section `losses`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from natural_gradients import iterations, kronecker, losses
from natural_gradients.figure import figure
from quickstart import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="iterations, losses, kfac")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/natural_gradient.json"))
    parser.add_argument("--figure", type=Path, help="write the picture of docs/step.md to this file")
    arguments = parser.parse_args()
    output: Path = arguments.output
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Callable[[], Any]] = {
        "iterations": iterations.measured,
        "losses": losses.compared,
        "kfac": lambda: kronecker.compared(output.parent),
    }
    found = json.loads(output.read_text()) if output.exists() else {}
    found["machine"] = machine()
    for name in arguments.sections or sections:
        began = time.process_time()
        found[name] = sections[name]()
        print(f"\n{name}: {time.process_time() - began:.0f} s of CPU time\n")
        SHOW[name](found[name])
        output.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.figure is not None:
        arguments.figure.write_text(figure(found["losses"]), encoding="utf-8")
    print(f"\nwritten to {output}")


def _show_iterations(rows: list[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if isinstance(rows[0][name], dict) and name != "cosines"]
    print(f"| epochs | largest eigenvalue | λ | {' | '.join(names)} |\n" + "|---" * (3 + len(names)) + "|")
    for row in rows:
        cells = [f"{row[name]['iterations']} ({row[name]['error']:.0e})" for name in names]
        print(f"| {row['epochs']} | {row['largest']:.1f} | {row['damping']:g} | {' | '.join(cells)} |")
    others = list(rows[0]["cosines"])
    print(f"\n| epochs | λ | {' | '.join(others)} |\n" + "|---" * (2 + len(others)) + "|")
    for row in rows:
        cells = [f"{row['cosines'][name]:.2f}" for name in others]
        print(f"| {row['epochs']} | {row['damping']:g} | {' | '.join(cells)} |")


def _show_losses(found: dict[str, Any]) -> None:
    print("| direction | damping of seeds | test loss | of seeds | minus gradient | of seeds |\n" + "|---" * 6 + "|")
    for kind, row in found.items():
        dampings = ", ".join(f"{each['damping']:g}" for each in row["chosen"])
        difference = "{:.3f} ({:.3f} to {:.3f})".format(*row["difference"])
        spans = [f"{min(row[key]):.3f} to {max(row[key]):.3f}" for key in ("loss_of_seeds", "difference_of_seeds")]
        print(f"| {kind} | {dampings} | {row['loss']:.3f} | {spans[0]} | {difference} | {spans[1]} |")


def _show_kfac(found: dict[str, Any] | None) -> None:
    if found is None:
        print("nngeometry could not be installed")
        return
    columns = ("model", "largest difference of a layer", "ms", "ms, nngeometry", "time of nngeometry ÷ ours")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for name, row in found.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"])
        difference, ms = max(row["differences"].values()), row["ms"]
        print(f"| {name} | {difference:.1e} | {ms['ours']:.1f} | {ms['nngeometry']:.1f} | {ratio} |")


SHOW: dict[str, Callable[[Any], None]] = {"iterations": _show_iterations, "losses": _show_losses, "kfac": _show_kfac}


if __name__ == "__main__":
    main()
