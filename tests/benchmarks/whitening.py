"""Own and whitened directions of one factorization, by true passes, for several values of the damping.

    python tests/benchmarks/whitening.py RUN_DIR [--damping 0.01 0.03 0.1] [--components 24] [--output FILE]

RUN_DIR is a run whose components are fitted; it is copied. For each component, the step that changes the top examples
by a mean KL of 0.1 nats is found on fitted examples for both signs, and for the sign with the larger KL ratio on
held-out examples. A ratio is the mean KL of the 32 top examples over that of 100 random others. The damping is chosen
on fitted examples; the held-out column is what is quoted. `README.md` beside this file keeps results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import torch
from npeff.models.loaded import LoadedModel
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of, prediction_batch_size
from npeff.stages.worker_specs import model_spec
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import read_table
from npeff.verification import baseline_examples, find_step_size, moved, top_examples

N_TOP, N_BASELINE, TARGET_KL, LONGEST = 32, 100, 0.1, 1e3


class Measure:
    """KL ratios of the directions of a run."""

    def __init__(self, run: RunDirectory) -> None:
        self._loaded: LoadedModel = model_spec(run, fingerprint_of(run)).load()
        self._batch_size = prediction_batch_size(run)
        table = read_table(run.table("examples"), "examples")
        split_N, valid_N = np.asarray(table["split"].to_pylist()), table["valid"].to_numpy()
        self._members = {split: valid_N & (split_N == split) for split in ("fit", "held_out")}
        self._coefficients_NK = open_factorization(run.factorization).read_coefficients()

    def ratios(self, component: int, direction: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the ratios of the stronger sign on fitted examples, on both splits."""
        fitted = {sign: self._ratio("fit", component, direction, sign) for sign in (1, -1)}
        sign = max(fitted, key=lambda each: np.nan_to_num(fitted[each], nan=-1.0))
        held_out = self._ratio("held_out", component, direction, sign)
        return {"fit": fitted[sign], "other sign": fitted[-sign], "held_out": held_out}

    def _ratio(self, split: str, component: int, direction: dict[str, torch.Tensor], sign: int) -> float:
        members_N, loaded = self._members[split], self._loaded
        top = top_examples(self._coefficients_NK[:, component], members_N, N_TOP)
        baseline = baseline_examples(members_N, top, N_BASELINE, component)

        def kl_of(examples: np.ndarray, epsilon: float) -> float:
            before = loaded.predict(examples.tolist(), self._batch_size)
            with moved(loaded.model, direction, sign * epsilon):
                after = loaded.predict(examples.tolist(), self._batch_size)
            return float(np.nanmean(after.kl(before)))

        step = find_step_size(lambda epsilon: kl_of(top, epsilon), TARGET_KL, longest=LONGEST)
        return step.kl / kl_of(baseline, step.epsilon) if step.reached_target else float("nan")


def measured(run: RunDirectory, measure: Measure, components: list[int], **lift: Any) -> dict[str, Any]:
    run = run.with_config(run.config.with_lift(components=components, **lift))
    run.reopen("lift")
    npeff.lift(run)
    store, table = DirectionStore.open(run.directions), read_table(run.table("components"), "components")
    found = []
    for component in components:
        direction = {name: torch.from_numpy(array) for name, array in store.read(component).items()}
        found.append(measure.ratios(component, direction))
    rows = {name: [each[name] for each in found] for name in found[0]}
    cosines = {name: statistics.median(table[name].to_numpy()[components]) for name in ("cosine_own", "lift_cosine")}
    medians = {name: float(np.nanmedian(values)) for name, values in rows.items()}
    return {"lift": lift, "medians": medians, "reached": int(np.isfinite(rows["held_out"]).sum()), **cosines, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--damping", type=float, nargs="*", default=[0.01, 0.03, 0.1])
    parser.add_argument("--components", type=int, default=24, help="number of components, in order")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/whitening.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.open(shutil.copytree(arguments.run, Path(folder) / "run"))
        components = list(range(min(arguments.components, run.config.factorization.n_components)))
        measure = Measure(run)
        for lift in ({"direction": "own"}, *({"direction": "whitened", "damping": each} for each in arguments.damping)):
            results.append(measured(run, measure, components, **lift))
            print(
                json.dumps({key: value for key, value in results[-1].items() if not isinstance(value, list)}),
                flush=True,
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
