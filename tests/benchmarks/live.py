"""Latency and memory of the live view: a store of 100,000 examples with 64 components.

    python tests/benchmarks/live.py [--examples N] [--components K] [--folder DIR]

The store is that of `queries.py`, with pictures for a part of the examples, a verification and the energies of the
directions. The server runs in a process of its own. Every page that runs no model is asked 50 times, each time for
another component or example, one request at a time, and the median and the 95th percentile of the time are printed.
Then 2,000 requests follow, and the memory of the server is that of its process (RSS) and of all processes that it has
started (PSS).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import psutil
from npeff.query.tables import StoredRun
from npeff.storage.commands import DEFAULT
from npeff.store.tables import write_table
from queries import build
from rich.console import Console
from rich.table import Table
from synthetic_run import _layer_energy, _verification

RESULTS = Path("runs/benchmarks/live.json")
REPEATS, REQUESTS = 50, 2000

SERVE = """
import sys
from npeff.live.server import serve
if __name__ == "__main__":
    serve(sys.argv[1], 0, 12, lambda line: print(line, flush=True))
"""

SUBSET = quote("label = 2 and not correct")

PAGES: dict[str, Callable[[int, int, int], str]] = {
    "overview": lambda i, n, k: "/",
    "overview, search and order": lambda i, n, k: f"/?q=elit+{i}&sort=mass&order=down",
    "overview, t-SNE of examples": lambda i, n, k: "/?of=examples&by=tsne",
    "component": lambda i, n, k: f"/component/{i % k}",
    "example": lambda i, n, k: f"/example/{(7919 * i) % n}",
    "example by id": lambda i, n, k: f"/example/example-{(7919 * i) % n:07d}",
    "picture": lambda i, n, k: f"/image?example={(7919 * i) % n}",
    "forms": lambda i, n, k: "/query",
    "query: top 20": lambda i, n, k: f"/query/top?component={i % k}&n=20",
    "query: top 20 where": lambda i, n, k: f"/query/top?component={i % k}&n=20&where={SUBSET}",
    "query: one example": lambda i, n, k: f"/query/example?example={(7919 * i) % n}",
    "query: similar": lambda i, n, k: f"/query/similar?component={i % k}",
    "query: SQL": lambda i, n, k: f"/query/sql?query={quote('select label, count(*) from examples group by label')}",
    "query: enriched": lambda i, n, k: f"/query/enriched?where={SUBSET}",
    "report, not changed": lambda i, n, k: "/report",
    "try, the form": lambda i, n, k: "/try",
    "step, the form": lambda i, n, k: f"/step?component={i % k}",
    "style sheet": lambda i, n, k: "/style.css",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="keep the store here, and use one that is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "run"
        if not list(folder.rglob("components.parquet")):
            build(folder, options.examples, options.components)
            add_results(folder, options.components)
        results = measure(folder, options.examples, options.components)
    results["load_average"] = os.getloadavg()[1]
    show(results)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1))


def add_results(folder: Path, n_components: int) -> None:
    """Write the tables of the later stages."""
    rng, run = np.random.default_rng(1), StoredRun(folder, DEFAULT)
    tables = {"layer_energy": _layer_energy(rng, n_components, ""), "verification": _verification(rng, n_components)}
    for name, table in tables.items():
        write_table(run.table(name), name, table)


def measure(folder: Path, n_examples: int, n_components: int) -> dict[str, object]:
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", SERVE, str(folder)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split(" at ")[1].split()[0]
            host, token = address.split("/")[2], address.partition("token=")[2]
            get(host, token, "/")
            results: dict[str, object] = {"first_page_s": time.perf_counter() - started}
            get(host, token, "/report")
            results["report_s"] = time.perf_counter() - started - float(results["first_page_s"])
            results["latency_ms"] = {
                name: times(host, token, [page(i, n_examples, n_components) for i in range(REPEATS)])
                for name, page in PAGES.items()
            }
            results["memory_before"] = memory(server.pid)
            pages = list(PAGES.values())
            began = time.perf_counter()
            for i in range(REQUESTS):
                get(host, token, pages[i % len(pages)](i, n_examples, n_components))
            results["requests_s"] = time.perf_counter() - began
            results["memory_after"] = memory(server.pid)
        finally:
            server.terminate()
    return results


def get(host: str, token: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=600)
    connection.request("GET", path, headers={"Cookie": f"npeff-{host.partition(':')[2]}={token}"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    assert answer.status in (200, 404), (path, answer.status, content[:300])
    return content


def times(host: str, token: str, paths: list[str]) -> dict[str, float]:
    get(host, token, paths[-1])
    found = []
    for path in paths:
        began = time.perf_counter()
        get(host, token, path)
        found.append(1000 * (time.perf_counter() - began))
    return {"median": float(np.median(found)), "p95": float(np.quantile(found, 0.95)), "largest": max(found)}


def memory(pid: int) -> dict[str, float]:
    process = psutil.Process(pid)
    everything = [process, *process.children(recursive=True)]
    shared = sum(each.memory_full_info().pss for each in everything)
    return {
        "rss_mib": process.memory_info().rss / 2**20,
        "pss_of_all_mib": shared / 2**20,
        "processes": len(everything),
    }


def show(results: dict[str, object]) -> None:
    table = Table("page", "median, ms", "p95, ms", "largest, ms")
    for name, found in results["latency_ms"].items():  # type: ignore[attr-defined]
        table.add_row(name, *(f"{found[key]:.1f}" for key in ("median", "p95", "largest")))
    console = Console(width=140)
    console.print(table)
    console.print_json(json.dumps({name: value for name, value in results.items() if name != "latency_ms"}))


if __name__ == "__main__":
    main()
