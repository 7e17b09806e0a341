"""What a run file for a causal language model should say: whole texts or single tokens, and how many drawn labels.

    python tests/benchmarks/language_models.py [--model pydoc docstrings] [--seeds 0 1] [--texts 400] [--only NAME …]
                                               [--folder FOLDER] [--output FILE]

Two small language models are trained here: of characters (`methods_stage/topics.py`) and of pieces of words
(`methods_stage/docstrings.py`). An example is a text that they have not read, or one drawn token of such a text. All
other keys are those of the run file that `npeff init` writes. All numbers are of held-out examples:

- *explained*: fraction of the stored Fishers, the number that the command prints.
- *between draws*: mean cosine of two Fishers of the same example that differ in the drawn labels.
- *of the Fishers*: the fraction of Fishers with `REFERENCE` draws that the components explain, with the best
  coefficients. It can be compared between choices with the same examples.
- *matched ratio* and *above controls*: those of the verification, with all defaults. They can be compared between all
  choices.
- *CPU s*: of the stages fishers, factorize and lift.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from methods_stage import docstrings, topics
from methods_stage.scores import summary
from methods_stage.topics import CONTEXT
from npeff.factorization.nnls import nnls
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.store.component_store import open_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.splits import Splits
from npeff.store.tables import read_table
from quickstart import machine

REFERENCE = 32
"""Number of drawn labels of the Fishers that all choices with the same examples are judged by."""
EXAMPLES_PER_COMPONENT = 40
"""As `npeff init` proposes."""


@dataclass(frozen=True)
class Choice:
    """The keys in which the runs differ. The default is what `npeff init` wrote before these measurements."""

    labels: str = "sampled"
    rank: int = 4
    dim: int = 4096
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task."""


ONE_TOKEN = {"examples": "positions", "positions_per_row": 1}
"""An example is a drawn token of a text, and not the text."""
CHOICES = {
    "1 draw": Choice(rank=1),
    "4 draws": Choice(),
    "16 draws": Choice(rank=16),
    "32 draws": Choice(rank=REFERENCE),
    "4 draws, 16,384 coordinates": Choice(dim=16384),
    "one token, 4 draws": Choice(options=ONE_TOKEN),
    "one token, 16 draws": Choice(rank=16, options=ONE_TOKEN),
    "one token, truncated to 8": Choice("truncated", 8, options=ONE_TOKEN),
}
COLUMNS = ("explained", "between draws", "of the Fishers", "matched", "matched ratio", "above controls", "CPU s")


@dataclass(frozen=True)
class Problem:
    """A model and held-out texts, in a folder with ``model`` and ``texts.parquet``."""

    folder: Path
    n_texts: int

    def config(self, choice: Choice, seed: int) -> RunConfig:
        """Return the configuration of a run."""
        files = {"model": str(self.folder / "model"), "data": str(self.folder / "texts.parquet")}
        options = files | {"text_column": "text", "limit": self.n_texts, "max_length": CONTEXT} | choice.options
        components = self.n_texts // EXAMPLES_PER_COMPONENT
        about = f"{choice.labels}-{choice.rank}-{choice.dim}-{options['max_length']}-{components}"
        unit = "tokens" if "positions_per_row" in options else "texts"
        run_dir = self.folder / f"{unit}-{self.n_texts}-{about}-{seed}"
        return RunConfig.model_validate(
            {
                "run_dir": str(run_dir),
                "seed": seed,
                "task": {"name": "huggingface-causal-lm", "options": options},
                "parameters": {"include": ["*"], "exclude": ["*wte*", "*wpe*", "*lm_head*", "*ln_*"]},
                "fishers": {
                    "labels": choice.labels,
                    "rank": choice.rank,
                    "sketch": {"kind": "tensorsketch", "dim": choice.dim},
                },
                "factorization": {"n_components": components, "stability_examples": 0},
                "executor": {"kind": "serial"},
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=["pydoc", "docstrings"], default=["pydoc", "docstrings"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/language-models"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/language-models.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(), "texts": arguments.texts, "seeds": arguments.seeds}
    for name in arguments.model:
        problem = _problem(name, arguments.folder.absolute(), arguments.texts)
        rows = {each: [_measured(problem, CHOICES[each], seed) for seed in arguments.seeds] for each in arguments.only}
        _print(name, rows)
        found[name] = rows
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=2, default=str) + "\n")
    print(f"written to {arguments.output}")


def _problem(name: str, folder: Path, n_texts: int) -> Problem:
    home = folder / name
    if name == "docstrings":
        facts = docstrings.prepared(home)
    else:
        facts = topics.prepared(home)
        windows = pq.read_table(home / "examples.parquet")
        windows = windows.take(np.random.default_rng(0).permutation(len(windows)))
        texts = [row["prompt"] + row["text"] for row in windows.to_pylist()]
        pq.write_table(pa.table({"text": texts}), home / "texts.parquet")
    print(f"{name}: held-out loss in nats per token: {facts['loss']}", flush=True)
    return Problem(home, n_texts)


def _measured(problem: Problem, choice: Choice, seed: int) -> dict[str, Any]:
    run = RunDirectory.create(problem.config(choice, seed))
    result = run.path / "language-models.json"
    if not result.exists():
        began = time.process_time()
        npeff.compute_fishers(run)
        record = npeff.factorize(run)
        npeff.lift(run)
        seconds = time.process_time() - began
        npeff.verify(run)
        rows = read_table(run.table("verification"), "verification").to_pylist()
        made = {"explained fitted": record["explained"], "explained": record["explained_held_out"], "CPU s": seconds}
        made |= {name: str(value) for name, value in summary([rows]).items()}
        result.write_text(json.dumps(made | {"rows": rows}) + "\n")
    found: dict[str, Any] = json.loads(result.read_text())
    if choice.labels == "sampled":
        reference = RunDirectory.create(problem.config(_reference(choice), seed))
        npeff.compute_fishers(reference)
        held_out_N = Splits.of(read_table(reference.table("examples"), "examples")).held_out_N
        factors_nRD, stored = _factors(reference)[held_out_N], open_factorization(run.factorization)
        found["of the Fishers"] = _explained(factors_nRD, stored.read_components())
        if choice.rank <= REFERENCE // 2:
            found["between draws"] = _cosine(factors_nRD, choice.rank)
    return found


def _reference(choice: Choice) -> Choice:
    return Choice("sampled", REFERENCE, choice.dim, choice.options)


def _factors(run: RunDirectory) -> np.ndarray:
    store = FisherStore.open(run.fishers)
    return np.concatenate([store.read_factors(shard) for shard in range(store.plan.n_shards)]).astype(np.float64)


def _explained(factors_nRD: np.ndarray, components_KD: np.ndarray) -> float:
    """Return the explained fraction of some Fishers, with the best coefficients W ≥ 0 of some components."""
    components_KD = components_KD.astype(np.float64)
    targets_nK = np.square(factors_nRD @ components_KD.T).sum(1)
    squares_KK = np.square(components_KD @ components_KD.T)
    w_nK = nnls(torch.from_numpy(targets_nK), torch.from_numpy(squares_KK)).numpy()
    squares_n = np.square(factors_nRD @ factors_nRD.transpose(0, 2, 1)).sum((1, 2))
    explained = 2 * (w_nK * targets_nK).sum() - (w_nK * (w_nK @ squares_KK)).sum()
    return float(explained / squares_n.sum())


def _cosine(factors_nRD: np.ndarray, rank: int) -> float:
    """Return the mean cosine ⟨F, F'⟩ / (‖F‖ ‖F'‖) of two Fishers with different draws of the same example."""
    one, other = factors_nRD[:, :rank], factors_nRD[:, rank : 2 * rank]
    product, own, its = (
        np.square(a @ b.transpose(0, 2, 1)).sum((1, 2)) for a, b in ((one, other), (one, one), (other, other))
    )
    return float((product / np.sqrt(own * its)).mean())


def _print(name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{name}\n\n| choice | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for choice, found in rows.items():
        cells = ["; ".join(_cell(each.get(column)) for each in found) for column in COLUMNS]
        print(f"| {choice} | {' | '.join(cells)} |")
    print(flush=True)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
