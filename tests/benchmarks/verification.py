"""Whether components do what they claim on a real model, beside those of other methods under the same protocol.

    python tests/benchmarks/verification.py [minilm] [--methods npeff gradient-kmeans …] [--components 32]
                                            [--epsilon 0.1] [--cache FOLDER] [--output FILE]

MiniLM on SICK, K = 32, fitted on two thirds of the pairs; top examples are held-out ones. Every method is a run
directory of its own that shares the Fishers: a kind of factorization, or coefficients and components of
`verify_stage.baselines`. From there it goes through the package's own lift and verification: same numbers of examples,
same target KL, same controls. With fewer `--components`, those of the same seeded numbers are lifted and verified of
each method. Everything is kept in the cache, and the same command goes on; asked for fewer of those that are there, it
sums them up. Needs NPEFF_SHARED_DATA, and about ten minutes of CPU time for all 32 components of a method, four for
eight of them. `README.md` beside this file keeps results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import torch
from npeff.runs.config import RunConfig
from npeff.runs.definition import finished
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of, lifted_components
from npeff.stages.factorize.solution import write_solution
from npeff.stages.verify.options import VerificationOptions, VerificationPaths
from npeff.stages.verify.worker import VerificationWorker
from npeff.stages.worker_specs import model_spec
from npeff.store.fisher_store import FisherStore
from npeff.store.splits import Splits
from npeff.store.tables import read_table
from quickstart import machine
from solver_stage.minilm_fishers import DIM, minilm_factors
from verify_stage.baselines import KINDS, METHODS, Data, pooled_output

N_COMPONENTS = 32
TARGETS = {"median KL ratio": 4.0, "above 1": 0.9, "above all controls": 0.85}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="minilm")
    parser.add_argument("--methods", nargs="+", default=[*KINDS, *METHODS], choices=[*KINDS, *METHODS])
    parser.add_argument("--components", type=int, default=N_COMPONENTS, help="of each method, to lift and verify")
    parser.add_argument("--epsilon", type=float, help="a step of that length, not one for a mean KL of 0.1")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "npeff-benchmarks")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/verification.json"))
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - {"minilm"}:
        parser.error(f"no section {sorted(unknown)[0]!r}: choose from minilm")
    torch.set_num_threads(1)
    if minilm_factors(arguments.cache) is None:
        print("minilm: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
        return
    output, about = arguments.output, machine()
    output.parent.mkdir(parents=True, exist_ok=True)
    everything = json.loads(output.read_text()) if output.exists() else {}
    minilm = everything.setdefault("minilm", {"targets": TARGETS, "methods": {}})
    chosen = np.random.default_rng(0).permutation(N_COMPONENTS)[: arguments.components].tolist()
    for method in arguments.methods:
        run = _run(arguments.cache, method, chosen)
        rows = _verified(run, chosen, arguments.epsilon)
        found = {"informative sign": _summary(rows)}
        step = "mean KL 0.1" if arguments.epsilon is None else f"step {arguments.epsilon:g}"
        minilm["methods"][f"{method}, {len(chosen)} components, {step}"] = {"machine": about, **found}
        _print(method, found)
        output.write_text(json.dumps(everything, indent=2) + "\n")
    print(f"written to {output}")


def _run(cache: Path, method: str, components: list[int]) -> RunDirectory:
    """A run with the components of a method, lifted."""
    fishers = RunDirectory.open(cache / f"minilm-sick-{DIM}-all")
    document = fishers.config.model_dump() | {"run_dir": str(cache / f"verification-{method}")}
    document["factorization"] |= {
        "n_components": N_COMPONENTS,
        "stability_examples": 0,
        "kind": KINDS.get(method, "fishers"),
    }
    document["lift"] = {"memory_limit_mb": 2048, "components": components}
    run = RunDirectory.create(RunConfig.model_validate(document))
    if not (run.path / "stages").exists():
        for name in ("fishers.zarr", "shards", "task"):
            (run.path / name).symlink_to(fishers.path / name)
        for name in ("tables", "stages"):
            shutil.copytree(fishers.path / name, run.path / name)
    if method in KINDS:
        npeff.factorize(run)
    elif run.record("factorize") is None:
        _factorize(run, method)
    began = time.monotonic()
    lifted = npeff.lift(run)
    print(
        f"{method}: lifted, median cosine {lifted['median_cosine']:.3f} ({time.monotonic() - began:.0f} s)", flush=True
    )
    return run


def _factorize(run: RunDirectory, method: str) -> None:
    """What the stage would write, of another method's components."""
    began = time.monotonic()
    store = FisherStore.open(run.fishers)
    rows = store.read_rows(np.arange(store.plan.n_examples), ["factors"])
    loaded = model_spec(run, fingerprint_of(run)).load()
    data = Data(
        factors_NRD=torch.from_numpy(rows["factors"]),
        fit_N=Splits.of(read_table(run.table("examples"), "examples")).fit_N,
        activations=lambda: pooled_output(loaded, store.attrs["batch_size"]),
    )
    coefficients_NK, components_KD = METHODS[method](data, N_COMPONENTS, run.config.seed)
    write_solution(run, components_KD, coefficients_NK, [], {"factorized": method})
    run.complete("factorize", {"n_iter": 0, "stopped": "converged", "seconds": time.monotonic() - began})


def _verified(run: RunDirectory, components: list[int], epsilon: float | None) -> list[dict[str, Any]]:
    """Rows of the verification table, of these components and held-out examples."""
    name, wanted = "verify-held-out" if epsilon is None else f"verify-held-out-{epsilon:g}", run.config.verification
    results = run.partial_results(name)
    worker = VerificationWorker(
        model_spec(run, fingerprint_of(run)),
        VerificationPaths.of(run, results),
        VerificationOptions(
            n_top=wanted.top_examples,
            n_baseline=wanted.baseline_examples,
            target_kl=wanted.target_kl,
            epsilon=epsilon,
            n_selectivity=0,
            n_correlation=0,
            seed=run.config.seed,
            batch_size=FisherStore.open(run.fishers).attrs["batch_size"],
            lifted=lifted_components(run),
        ),
    )
    rows: list[dict[str, Any]] = []
    for component in components:
        began, done = time.monotonic(), finished(results)
        if component in done:
            rows += read_table(done[component], "verification").to_pylist()
        else:
            rows += worker.verify(component)
            print(f"  {run.path.name}: component {component}, {time.monotonic() - began:.0f} s", flush=True)
    return [row for row in rows if row["examples"] == "held_out" and row["informative"] and row["matched"]]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rows of the verification table. Components without held-out examples, or that are not matched, have none."""
    controls = {"a": "trace_ratio", "b": "random_kl_ratio", "c": "other_kl_ratio"}

    def share(values: list[bool]) -> float:
        return sum(values) / len(rows)

    return {
        "components": len({row["component"] for row in rows}),
        "rows": len(rows),
        "median KL ratio": statistics.median(row["kl_ratio_matched"] for row in rows),
        "above 1": share([row["kl_ratio_matched"] > 1 for row in rows]),
        **{
            f"above ({x})": share([row["kl_ratio_matched"] > row[name] for row in rows]) for x, name in controls.items()
        },
        "above all controls": share(
            [row["kl_ratio_matched"] > max(row[name] for name in controls.values()) for row in rows]
        ),
        "median, by trace": statistics.median(row["kl_ratio_trace"] for row in rows),
        "median, random baseline": statistics.median(row["kl_ratio"] for row in rows),
        "with 95% confidence": share([row["above_controls"] for row in rows]),
        "median KL of the top": statistics.median(row["kl_top"] for row in rows),
        "reached target": share([row["reached_target"] for row in rows]),
        **{f"median ({x})": statistics.median(row[name] for row in rows) for x, name in controls.items()},
    }


def _print(method: str, found: dict[str, dict[str, Any]]) -> None:
    signs = list(found.values())
    print(f"{method}: {signs[0]['components']} components with held-out top examples; {', '.join(found)}")
    for name in signs[0]:
        target = f"  (at least {TARGETS[name]:g})" if name in TARGETS else ""
        print(f"  {name:22s}" + "".join(f"{of[name]:8.2f}" for of in signs) + target)
    print(flush=True)


if __name__ == "__main__":
    main()
