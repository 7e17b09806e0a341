"""FAdam, elastic weight consolidation and functional information: the time of a step, equal tuning, five tasks.

    python tests/benchmarks/training.py [sections] [--output FILE] [--figure FILE] [--modalities-figure FILE]

Sections: steps, start, tuned, characters, pairs, continual, modalities, cost; all by default. `pairs` needs
NPEFF_SHARED_DATA. pytorch_optimizer is installed into a folder of its own. Each optimizer has 12 trials, which are
compared on validation data (300 images) with two seeds. The best one is measured on test data (900 images) with five
other seeds. Intervals are paired bootstraps that draw the test examples (95%); the seeds are listed beside them.
`training_loops/modalities.py` describes the section ``modalities``. `--figure` writes the first picture of
docs/training.md from the section ``start`` of the output file, and `--modalities-figure` the second one from the
section ``modalities``. The results of single trainings are in the folder `trainings` beside it, from which an
interrupted section continues.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environments import environment
from quickstart import machine
from training_loops import continual, modalities, modality_figure, optimizers, steps, text

OTHER = ["--no-deps", "pytorch-optimizer==4.1.0"]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 320, 52, 50, 44
COLOURS = {"AdamW": "#1f5fa8", "FAdam": "#b4531f", "FAdam, debiased momentum": "#3b7a3b"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", help="steps, start, tuned, characters, pairs, continual, modalities, cost"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/training.json"))
    parser.add_argument("--figure", type=Path, help="an SVG file")
    parser.add_argument("--methods", nargs="+", default=list(modalities.METHODS), help="of the section modalities")
    parser.add_argument("--modalities-figure", type=Path, help="an SVG file")
    arguments = parser.parse_args()
    output: Path = arguments.output
    found = json.loads(output.read_text()) if output.exists() else {}
    if arguments.figure is not None:
        arguments.figure.write_text(figure(found["start"]), encoding="utf-8")
    if arguments.modalities_figure is not None:
        arguments.modalities_figure.write_text(modality_figure.figure(found["modalities"]), encoding="utf-8")
    if arguments.figure is not None or arguments.modalities_figure is not None:
        return
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    trainings = output.parent / "trainings"

    def save() -> None:
        output.write_text(json.dumps(found, indent=2) + "\n")

    sections: dict[str, Callable[[], dict[str, Any] | None]] = {
        "steps": lambda: steps.measured(other(output.parent)),
        "start": lambda: optimizers.from_the_start(other(output.parent), trainings / "start"),
        "tuned": lambda: optimizers.fine_tuned(trainings / "tuned"),
        "characters": lambda: text.characters(other(output.parent), trainings / "characters"),
        "pairs": lambda: text.pairs(other(output.parent), trainings / "pairs"),
        "continual": lambda: continual.compared(trainings / "continual"),
        "modalities": lambda: resumed(found.setdefault("modalities", {}), arguments.methods, save),
        "cost": modalities.cost,
    }
    found["machine"] = machine()
    for name in arguments.sections or sections:
        began = time.process_time()
        measured = sections[name]()
        if measured is None:
            continue
        found[name] = measured
        print(f"\n{name}: {time.process_time() - began:.0f} s of CPU time\n")
        show(name, found[name])
        save()
    print(f"written to {output}")


def resumed(found: dict[str, Any], methods: list[str], save: Callable[[], None]) -> dict[str, Any]:
    """The comparison of regularizers takes minutes: methods with results are not measured again."""
    modalities.compared(found, methods, save)
    return found


def other(folder: Path) -> type | None:
    """FAdam of pytorch_optimizer, with the torch of this environment; None if it cannot be installed."""
    python = environment(folder / "pytorch_optimizer", OTHER)
    if python is None:
        return None
    packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
    sys.path.append(str(packages))
    made: type = importlib.import_module("pytorch_optimizer").FAdam
    return made


def show(name: str, found: dict[str, Any]) -> None:
    if name == "steps":
        print("| optimizer | ms per step | relative to AdamW |\n|---|---|---|")
        for method, ms in found["ms"].items():
            median, low, high = found["relative"][method]
            print(f"| {method} | {ms:.1f} | {median:.2f} ({low:.2f} to {high:.2f}) |")
        print(f"\nlargest difference to pytorch_optimizer: {found['difference']}")
    elif name == "cost":
        modality_figure.show_cost(found)
    elif name == "modalities":
        modality_figure.show(found)
    elif name == "continual":
        print("| method | weight | accuracy | of seeds | minus none | minus exact | forgetting |\n" + "|---" * 7 + "|")
        for method, row in found.items():
            seeds = _range(row["accuracy_of_seeds"])
            print(
                f"| {method} | {row['weight']:g} | {row['accuracy']:.3f} | {seeds} | {_interval(row['difference'])} | "
                f"{_interval(row['minus_exact'])} | {row['forgetting']:.3f} |"
            )
    else:
        print("| optimizer | options | test loss | of seeds | minus AdamW | of seeds |\n" + "|---" * 6 + "|")
        for method, row in found.items():
            options = ", ".join(f"{key} {value:g}" for key, value in row["options"].items())
            print(
                f"| {method} | {options}{' (edge)' if row['at_the_edge'] else ''} | {row['loss']:.3f} | "
                f"{_range(row['loss_of_seeds'])} | {_interval(row['difference'])} | "
                f"{_range(row['difference_of_seeds'])} |"
            )


def _interval(values: list[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*values)


def _range(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def figure(found: dict[str, Any]) -> str:
    """Return the picture of the documentation: the test loss after each epoch, and the range of the seeds."""
    n = len(found["AdamW"]["curve"])
    top = max(found[name]["high"][0] for name in COLOURS)

    def x(epoch: float) -> float:
        return LEFT + (epoch - 1) / (n - 1) * (WIDTH - LEFT - 16)

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - loss / top * (HEIGHT - BOTTOM - TOP)

    marks = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        row = found[name]
        sides = [(e + 1, v) for e, v in enumerate(row["low"])] + [(e + 1, v) for e, v in enumerate(row["high"])][::-1]
        band = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in sides)
        line = " ".join(f"{x(e + 1):.1f},{y(v):.1f}" for e, v in enumerate(row["curve"]))
        marks += [
            f'<polygon points="{band}" fill="{colour}" opacity="0.18"/>',
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{x(n / 2):.0f}" y="{TOP + 24 + 18 * number}" fill="{colour}">{name}: {row["loss"]:.3f}</text>',
        ]
    ticks = [f'<text x="{x(e):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{e}</text>' for e in (1, n // 2, n)]
    ticks += [
        f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.5, 1, 1.5, 2)
        if v <= top
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12" fill="#1c2126">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            f'<text x="{LEFT}" y="20">Test loss on the digits, options of each optimizer tuned alike:</text>',
            f'<text x="{LEFT}" y="36">mean of five seeds and their range; the numbers are the last means</text>',
            f'<path d="M{LEFT} {TOP}V{y(0):.1f}H{WIDTH - 16}" fill="none" stroke="#888"/>',
            *marks,
            *ticks,
            f'<text x="{x((n + 1) / 2):.0f}" y="{HEIGHT - 8}" text-anchor="middle">epoch</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    main()
