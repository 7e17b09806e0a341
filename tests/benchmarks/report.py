"""Size and opening time of the report of a large run, in a headless Chromium.

    python tests/benchmarks/report.py [--components 512] [--top-examples 20] [--output runs/benchmarks/report.json]

Two invented runs in the stored format, one of images and one of texts, with every table there is: 10,000 examples, 40
parameters, verification, selectivity of all pairs, shares of positions. Nothing about them is realistic but their
sizes. Opening is from the navigation to the load event, to the first paint, and to the end of the first frame after
both, as the browser measures them, the best of five (a busy machine slows rounds, never speeds one up); beside it the
CPU time of the page's main thread. Then the same to a card by its link, and a first search.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from npeff.reports.report import write_report
from npeff.store.component_store import write_factorization
from npeff.store.tables import write_table
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import Browser, find_chromium

N_EXAMPLES, N_CLASSES, N_PARAMETERS, N_WORDS, SIDE, LISTED = 10_000, 10, 40, 30, 28, 32
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--components", type=int, default=512)
    parser.add_argument("--top-examples", type=int, default=20, help="of each split; contrast examples come on top")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/report.json"))
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        raise SystemExit("no Chromium or Chrome is installed: the report cannot be opened")
    result: dict[str, Any] = {"machine": {"platform": platform.platform(), "cores": os.cpu_count()}, **vars(options)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("images", "texts"):
            run = write_run(Path(folder) / kind, options.components, texts=kind == "texts")
            start = time.perf_counter()
            page = write_report(run, top_examples=options.top_examples)
            written_s = time.perf_counter() - start
            browser = Browser(program, Path(folder) / f"profile-{kind}")
            try:
                measured = opened(browser, page, options.components)
            finally:
                browser.close()
            result[kind] = {"written_s": written_s, "megabytes": page.stat().st_size / 1e6, **measured}
    for kind in ("images", "texts"):
        print(f"\n{kind}: {options.components} components, {options.top_examples} top examples of each split")
        for name, value in result[kind].items():
            print(f"| {name} | {value:.2f} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"\nwritten to {options.output}")


def opened(browser: Browser, page: Path, n_components: int) -> dict[str, float]:
    """Seconds of opening the page."""
    rounds: list[dict[str, float]] = []
    browser.call("Performance.enable", timeDomain="threadTicks")
    for _ in range(ROUNDS):
        before = main_thread_s(browser)
        browser.open(page)
        times = browser.evaluate(
            "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done({"
            " load_s: performance.getEntriesByType('navigation')[0].loadEventEnd / 1000,"
            " first_paint_s: (performance.getEntriesByName('first-contentful-paint')[0] ?? {startTime: NaN}).startTime"
            " / 1000, settled_s: performance.now() / 1000}), 0)))"
        )
        rounds.append(times | {"main_thread_cpu_s": main_thread_s(browser) - before})
        browser.open("about:blank#")
    found = {name: min(times[name] for times in rounds) for name in rounds[0]}
    target = f"component-{n_components // 2}"
    browser.open(page.resolve().as_uri() + f"#{target}")
    found["linked_card_s"] = browser.evaluate(
        "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now() / 1000), 0)))"
    )
    card = f"document.getElementById('{target}')"
    assert browser.evaluate(f"{card}.querySelector('.examples li') !== null")
    assert browser.evaluate(f"Math.abs({card}.getBoundingClientRect().top) < 200")
    found["search_s"] = browser.evaluate(
        "(() => { const start = performance.now(), box = document.getElementById('search'); box.value = 'kwote';"
        " box.dispatchEvent(new Event('input')); return (performance.now() - start) / 1000; })()"
    )
    return found


def main_thread_s(browser: Browser) -> float:
    """CPU seconds that the page's main thread has worked."""
    metrics = {item["name"]: item["value"] for item in browser.call("Performance.getMetrics")["metrics"]}
    return metrics["TaskDuration"]


def write_run(path: Path, n_components: int, *, texts: bool) -> Path:
    rng = np.random.default_rng(0)
    coefficients = np.where(rng.random((N_EXAMPLES, n_components)) < 0.05, rng.random((N_EXAMPLES, n_components)), 0)
    coefficients = coefficients.astype(np.float32)
    held_out = np.arange(N_EXAMPLES) % 3 == 2
    top = _top(coefficients, held_out)
    (path / "tables").mkdir(parents=True)
    (path / "run.yaml").write_text(f"run_dir: {path.name}\n")
    write_factorization(path / "factorization.zarr", rng.standard_normal((n_components, 64)), coefficients, {})
    parameters = [f"encoder.layer.{i // 8}.attention.{i % 8}.weight" for i in range(N_PARAMETERS)]
    energy = rng.dirichlet(np.ones(N_PARAMETERS), n_components)
    tables: dict[str, Any] = {
        "examples": _examples(rng, held_out, texts),
        "classes": {"class": list(range(N_CLASSES)), "name": [f"class {i}" for i in range(N_CLASSES)]},
        "components": {
            "component": list(range(n_components)),
            "n_active": (coefficients > 0).sum(0),
            "mass": coefficients.sum(0, dtype=float),
            "energy": (coefficients**2).sum(0, dtype=float),
            "nearest_component": np.roll(np.arange(n_components), 1),
            "nearest_cosine": rng.random(n_components),
            "lift_cosine": rng.random(n_components),
            "cosine_own": rng.random(n_components),
            "stability": rng.random(n_components),
        },
        "top_examples": top,
        "layer_energy": {
            "component": np.repeat(np.arange(n_components), N_PARAMETERS),
            "parameter": parameters * n_components,
            "energy": energy.ravel(),
        },
        "verification": _verification(rng, n_components),
        "selectivity": _selectivity(rng, n_components),
    }
    tables["position_shares"] = _position_shares(rng, top, tables["examples"]["text"] if texts else None)
    for name, table in tables.items():
        if name == "position_shares":
            import pyarrow.parquet as pq

            pq.write_table(pa.table(table), path / "tables" / f"{name}.parquet")
        else:
            write_table(path / "tables" / f"{name}.parquet", name, table)
    return path


def _top(coefficients: np.ndarray, held_out: np.ndarray) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {name: [] for name in ("component", "split", "rank", "example", "coefficient")}
    for component in range(coefficients.shape[1]):
        for split, among in (("fit", ~held_out), ("held_out", held_out)):
            members = np.flatnonzero(among)
            chosen = members[np.argsort(-coefficients[members, component])[:LISTED]]
            rows["component"] += [component] * LISTED
            rows["split"] += [split] * LISTED
            rows["rank"] += range(LISTED)
            rows["example"] += chosen.tolist()
            rows["coefficient"] += coefficients[chosen, component].astype(float).tolist()
    return rows


def _examples(rng: np.random.Generator, held_out: np.ndarray, texts: bool) -> dict[str, Any]:
    labels, predictions = rng.integers(0, N_CLASSES, N_EXAMPLES), rng.integers(0, N_CLASSES, N_EXAMPLES)
    nothing = [None] * N_EXAMPLES
    return {
        "example": list(range(N_EXAMPLES)),
        "id": [f"example-{i:05d}" for i in range(N_EXAMPLES)],
        "label": labels,
        "prediction": predictions,
        "correct": labels == predictions,
        "split": np.where(held_out, "held_out", "fit").tolist(),
        "valid": [True] * N_EXAMPLES,
        "fisher_norm": rng.random(N_EXAMPLES),
        "fisher_rank": [N_CLASSES - 1] * N_EXAMPLES,
        "kept_trace": [1.0] * N_EXAMPLES,
        "loss": rng.random(N_EXAMPLES),
        "logits": pa.nulls(N_EXAMPLES, pa.list_(pa.float32())),
        "image": pa.array(nothing if texts else [_picture(rng) for _ in range(N_EXAMPLES)], pa.binary()),
        "text": pa.array(_texts(rng) if texts else nothing, pa.string()),
        "source": [f"source {i % 7}" for i in range(N_EXAMPLES)],
        "size": rng.random(N_EXAMPLES),
    }


def _texts(rng: np.random.Generator) -> list[str]:
    letters = "bdfgklmnprstvwaeiou"
    words = ["".join(letters[i] for i in rng.integers(0, len(letters), rng.integers(2, 9))) for _ in range(3000)]
    ranks = np.minimum(rng.zipf(1.3, (N_EXAMPLES, N_WORDS)), len(words)) - 1
    return [" ".join(words[i] for i in row) for row in ranks]


def _picture(rng: np.random.Generator) -> bytes:
    """As hard to compress as a handwritten digit: a few soft blobs on black."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.zeros((SIDE, SIDE))
    for cx, cy, r in rng.uniform((6, 6, 1), (22, 22, 3), (6, 3)):
        pixels = np.maximum(pixels, np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r * r)))
    stream = io.BytesIO()
    Image.fromarray((255 * np.where(pixels > 0.2, pixels, 0)).astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def _position_shares(rng: np.random.Generator, top: dict[str, list[Any]], texts: pa.Array | None) -> dict[str, Any]:
    """Of every word, or of every fourth pixel."""
    count, n = N_WORDS if texts is not None else SIDE * SIDE // 4, len(top["component"])
    columns: dict[str, Any] = {
        "component": np.repeat(top["component"], count),
        "example": np.repeat(top["example"], count),
        "position": np.tile(np.arange(count), n),
        "start": pa.nulls(n * count, pa.int64()),
        "stop": pa.nulls(n * count, pa.int64()),
        "token": pa.nulls(n * count, pa.string()),
        "share": rng.dirichlet(np.full(count, 0.3), n).ravel(),
    }
    if texts is not None:
        words = [text.split() for text in texts.to_pylist()]
        lengths = np.array([[len(word) for word in row] for row in words])
        stops = np.cumsum(lengths + 1, axis=1) - 1
        columns["start"], columns["stop"] = (stops - lengths)[top["example"]].ravel(), stops[top["example"]].ravel()
        columns["token"] = [word for example in top["example"] for word in words[example]]
    return columns


def _selectivity(rng: np.random.Generator, n_components: int) -> dict[str, Any]:
    moved, watched = (grid.ravel() for grid in np.mgrid[:n_components, :n_components])
    kl = np.where(moved == watched, 0.1, 0.1 * rng.random(len(moved)) ** 8)
    return {
        "moved": np.tile(moved, 2),
        "component": np.tile(watched, 2),
        "examples": ["held_out"] * (2 * len(moved)),
        "sign": np.repeat([1, -1], len(moved)),
        "n_examples": [8] * (2 * len(moved)),
        "kl": np.tile(kl, 2),
        "kl_checked": [None] * (2 * len(moved)),
    }


def _verification(rng: np.random.Generator, n_components: int) -> dict[str, Any]:
    n = 4 * n_components
    ratio = rng.lognormal(1.5, 1.0, n)
    measured = {
        name: rng.lognormal(-1, 1, n)
        for name in [
            "epsilon",
            "kl_top",
            "kl_baseline",
            "fisher_norm_ratio",
            "random_epsilon",
            "random_kl_top",
            "random_kl_baseline",
            "random_kl_ratio",
            "other_epsilon",
            "other_kl_top",
            "other_kl_baseline",
            "other_kl_ratio",
            "target_kl",
            "trace_ratio",
            "kl_matched",
            "kl_ratio_trace",
            "small_step_ratio",
            "auc",
            "changed_top",
            "changed_matched",
        ]
    }
    shares = "accuracy_top_before accuracy_top_after accuracy_baseline_before accuracy_baseline_after kl_correlation"
    return {
        "component": np.repeat(np.arange(n_components), 4),
        "examples": ["fit", "fit", "held_out", "held_out"] * n_components,
        "sign": [1, -1, 1, -1] * n_components,
        "n_top": [LISTED] * n,
        "n_baseline": [200] * n,
        "kl_ratio": ratio,
        "kl_ratio_low": 0.7 * ratio,
        "kl_ratio_high": 1.4 * ratio,
        "above_controls": ratio > 2,
        "other_component": rng.integers(0, n_components, n),
        "reached_target": [True] * n,
        "informative": [True, False] * (n // 2),
        "matched": [True] * n,
        "n_matched": [40] * n,
        "n_by_trace": [0] * n,
        "examples_passed": [300] * n,
        "kl_ratio_matched": ratio,
        "kl_ratio_matched_low": 0.7 * ratio,
        "kl_ratio_matched_high": 1.4 * ratio,
        "other_kl_ratio_checked": [None] * n,
        **measured,
        **{name: rng.random(n) for name in shares.split()},
    }


if __name__ == "__main__":
    main()
