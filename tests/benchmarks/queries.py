"""Queries of a store far larger than they may hold: 1,000,000 examples, 512 components, 15 of them in an example.

    python tests/benchmarks/queries.py [--examples N] [--components K] [--s3] [--folder DIR]

The store is written by the same code as a run's. Each question is asked in a process of its own, first cold (opening
the store; imports beside it), then warm (the same store, other components, the fastest and the median of several), by
the clock and by CPU time, with the process's peak memory. `--s3` asks again through moto's server, an S3 on the
loopback device, and counts the requests: moto reads a whole object for every part that is asked for, one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.factorize.tables import write_component_tables
from npeff.storage.location import location
from npeff.storage.objects import upload_files
from npeff.store.component_store import write_factorization
from npeff.store.tables import write_table_in_parts
from object_store import serving
from rich.console import Console
from rich.table import Table
from scipy import sparse

RESULTS = Path("runs/benchmarks/queries.json")
SKETCH_DIM, N_CLASSES, N_SOURCES, PART = 1024, 100, 20, 50_000
SUBSET = "label = 2 and not correct"
FILTER = "label = 2 and not correct and source = 'source-3'"
QUESTIONS = {
    "top 20 of a component": "store.top_examples(i, 20)",
    "top 20 of a split": "store.top_examples(i, 20, split='held_out')",
    "top 20 where": f'store.top_examples(i, 20, where="{FILTER}")',
    "top 20 where, by name": "store.top_examples(i, 20, where=\"label_name = 'class 7' and text like '%elit%'\")",
    "one example": "store.example(1000 * i + 7)",
    "20 nearest examples": "store.neighbours(1000 * i + 7)",
    "enriched in 1%": f'store.enriched("{SUBSET}")',
    "similar components": "store.similar_components(i)",
    "SQL: count by label": "store.sql('select label, count(*) from examples group by label')",
}
WORDS = np.array(
    ["lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit", "sed", "do", "eiusmod"]
)


class SparseCoefficients:
    """What the writers take for W (N, K): blocks of a sparse matrix, made dense as they are cut."""

    def __init__(self, rows: sparse.csr_array) -> None:
        self._by_row, self._by_column, self.shape = rows, rows.tocsc(), rows.shape

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        rows, columns = block
        return self._by_row[rows].toarray() if columns == slice(None) else self._by_column[:, columns].toarray()


def coefficients(n_examples: int, n_components: int, rng: np.random.Generator) -> SparseCoefficients:
    """10 to 20 components in an example, and none in one of 1,000; some components are in many, most in few."""
    count_N = rng.integers(10, 21, n_examples)
    count_N[3::1000] = 0
    popularity = 1 / np.sqrt(np.arange(1, n_components + 1))
    columns = rng.choice(n_components, count_N.sum(), p=popularity / popularity.sum())
    values = rng.gamma(0.5, 0.3, len(columns)).astype(np.float32)
    rows = np.repeat(np.arange(n_examples), count_N)
    found = sparse.coo_array((values, (rows, columns)), shape=(n_examples, n_components)).tocsr()
    found.sum_duplicates()
    return SparseCoefficients(found)


def example_parts(n_examples: int, rng: np.random.Generator):
    texts = [" ".join(WORDS[row]) for row in rng.integers(0, len(WORDS), (PART, 24))]
    for start in range(0, n_examples, PART):
        example = np.arange(start, min(start + PART, n_examples))
        n = len(example)
        label = rng.integers(0, N_CLASSES // 10, n)
        correct = rng.random(n) < 0.9
        yield {
            "example": example,
            "id": [f"example-{i:07d}" for i in example],
            "label": label,
            "prediction": np.where(correct, label, (label + 1) % N_CLASSES),
            "correct": correct,
            "split": np.where(rng.random(n) < 0.3, "held_out", "fit").astype(object),
            "valid": np.ones(n, bool),
            "fisher_norm": rng.random(n),
            "fisher_rank": np.full(n, 9),
            "kept_trace": np.ones(n),
            "loss": rng.random(n),
            "logits": [None] * n,
            "image": [None] * n,
            "text": [f"{text} {i}" for text, i in zip(texts, example, strict=False)],
            "source": [f"source-{i}" for i in rng.integers(0, N_SOURCES, n)],
        }


def build(folder: Path, n_examples: int, n_components: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    task, factorization = {"name": "digits"}, {"n_components": n_components}
    config = RunConfig.model_validate({"run_dir": str(folder), "task": task, "factorization": factorization})
    run = RunDirectory.create(config)
    started = time.perf_counter()
    write_table_in_parts(run.table("examples"), "examples", example_parts(n_examples, rng))
    names = {"class": np.arange(N_CLASSES), "name": [f"class {i}" for i in range(N_CLASSES)]}
    write_table_in_parts(run.table("classes"), "classes", [names])
    w_NK = coefficients(n_examples, n_components, rng)
    made = time.perf_counter()
    components_KD = rng.standard_normal((n_components, SKETCH_DIM))
    components_KD /= np.linalg.norm(components_KD, axis=1, keepdims=True)
    write_factorization(run.factorization, components_KD, w_NK, {})
    arrays = time.perf_counter()
    write_component_tables(run, components_KD, w_NK)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {
        "seconds_made": made - started,
        "seconds_arrays": arrays - made,
        "seconds_tables": time.perf_counter() - arrays,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "mb_total": sum(sizes.values()) / 1e6,
        "mb_arrays": sum(size for name, size in sizes.items() if "zarr" in name) / 1e6,
        "mb_coefficients": sizes[str(run.table("coefficients").relative_to(folder))] / 1e6,
        "mb_examples": sizes["tables/examples.parquet"] / 1e6,
    }


ASK = """
import json, time
t0 = time.perf_counter()
from npeff.query.components import ComponentStore
imported = time.perf_counter() - t0
t0, c0 = time.perf_counter(), time.process_time()
store = ComponentStore.open({run_dir!r})
i = 3
{question}
cold, cold_cpu = time.perf_counter() - t0, time.process_time() - c0
warm, cpu = [], []
for i in range({repeats}):
    i = 11 * i + 5
    t0, c0 = time.perf_counter(), time.process_time()
    {question}
    warm.append(time.perf_counter() - t0); cpu.append(time.process_time() - c0)
# not getrusage, whose peak a process inherits from the one that started it
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(json.dumps(dict(imports=imported, cold=cold, cold_cpu=cold_cpu, warm_best=min(warm),
    warm_median=sorted(warm)[len(warm) // 2], warm_cpu=sorted(cpu)[len(cpu) // 2], peak_mib=peak)))
"""


def ask(question: str, run_dir: str, repeats: int = 9, **environment: str) -> dict[str, float]:
    script = ASK.format(question=question, run_dir=run_dir, repeats=repeats)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def ask_on_s3(folder: Path) -> dict[str, dict[str, float]]:
    with serving() as store:
        environment = {"AWS_ENDPOINT_URL": store.endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        os.environ |= environment
        get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("runs", "us-east-1")
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        upload_files(folder, location("s3://runs/run"), names)
        answers = {}
        for name, question in QUESTIONS.items():
            counts = []
            for repeats in (1, 3):
                store.requests.clear()
                answers[name] = ask(question, "s3://runs/run", repeats=repeats, **environment)
                counts.append(len(store.requests))
            warm = (counts[1] - counts[0]) / 2
            answers[name] |= {"requests_cold": counts[0] - warm, "requests_warm": warm}
    show("moto's server", answers, ("requests_cold", "requests_warm"))
    return answers


def show(title: str, answers: dict[str, dict[str, float]], counts: tuple[str, ...] = ()) -> None:
    columns = ("cold", "cold_cpu", "warm_best", "warm_median", "warm_cpu", "imports")
    table = Table("question", *(f"{name}, ms" for name in columns), "peak, MiB", *counts, title=title)
    for question, found in answers.items():
        cells = [1000 * found[name] for name in columns] + [found[name] for name in ("peak_mib", *counts)]
        table.add_row(question, *(f"{cell:.1f}" if cell < 100 else f"{cell:.0f}" for cell in cells))
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--components", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="keep the store here, and use one that is there")
    parser.add_argument("--s3", action="store_true", help="also through moto's server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "run"
        results: dict[str, object] = {"n_examples": options.examples, "n_components": options.components}
        if not list(folder.rglob("components.parquet")):
            results["store"] = build(folder, options.examples, options.components)
            Console().print_json(json.dumps(results["store"]))
        local = {name: ask(question, str(folder)) for name, question in QUESTIONS.items()}
        show("local disk", local)
        results["local"] = local
        if options.s3:
            results["s3"] = ask_on_s3(folder)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
