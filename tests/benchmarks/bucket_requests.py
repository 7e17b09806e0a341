"""Requests of a complete run on an object store, by what they do and in which part of the run.

    python tests/benchmarks/bucket_requests.py [--shards N] [--components K]

The run is `npeff run` on handwritten digits, from an empty bucket of moto's server (S3 on the loopback device) to the
report, with one worker in this process. Requests are counted by the server.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import npeff
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from npeff.runs.config import RunConfig
from object_store import BUCKET, Request, environment, serving
from rich.console import Console
from rich.table import Table

RESULTS = Path("runs/benchmarks/bucket_requests.json")
RUN = f"s3://{BUCKET}/digits"
SHARD = 16
"""Examples of a shard."""


def config(n_shards: int, n_components: int) -> RunConfig:
    settings: dict[str, Any] = {
        "run_dir": RUN,
        "task": {"name": "digits", "options": {"limit": SHARD * n_shards}},
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 2048}, "shard_size": SHARD},
        "factorization": {"n_components": n_components},
        "executor": {"kind": "serial"},
    }
    return RunConfig.model_validate(settings)


def kind_of(request: Request) -> tuple[str, str]:
    """What a request does, and the folder of the run or, in it, of the Fisher store."""
    parts = request.key.removeprefix("digits").strip("/").split("/")
    prefix = request.query.get("prefix", [""])[0].removeprefix("digits").strip("/")
    folder = parts[0] or prefix.split("/")[0]
    if folder == "fishers.zarr" and len(parts) > 2 and parts[2] == "c":
        folder += " factors" if parts[1] == "factors" else " other arrays"
    return request.kind, folder if "/" in request.key.removeprefix("digits/") or "." not in folder else "(files)"


def measure(n_shards: int, n_components: int) -> dict[str, Any]:
    with serving() as store, tempfile.TemporaryDirectory(prefix="npeff-") as cache:
        os.environ |= environment(store, Path(cache))
        get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, "us-east-1")
        began = time.monotonic()
        npeff.run(config(n_shards, n_components))
        seconds = time.monotonic() - began
        requests = list(store.requests)
    kinds = Counter(map(kind_of, requests))
    return {
        "n_shards": n_shards,
        "n_components": n_components,
        "seconds": seconds,
        "requests": len(requests),
        "by_kind": dict(Counter(request.kind for request in requests)),
        "by_kind_and_folder": [[*kind, count] for kind, count in kinds.most_common()],
    }


def show(found: dict[str, Any]) -> None:
    n_shards = found["n_shards"]
    title = f"{found['requests']} requests, {found['requests'] / n_shards:.1f} a shard, in {found['seconds']:.0f} s"
    table = Table("request", "folder", "number", "a shard", title=title)
    for kind, folder, count in found["by_kind_and_folder"]:
        table.add_row(kind, folder, str(count), f"{count / n_shards:.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=63)
    parser.add_argument("--components", type=int, default=24)
    options = parser.parse_args()
    found = measure(options.shards, options.components)
    show(found)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(RESULTS)


if __name__ == "__main__":
    main()
