"""A synthetic run directory in the stored format: scikit-learn's digits with invented components."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.store.component_store import write_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import rows_to_columns, write_table
from PIL import Image
from places import place
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

WORD = re.compile(r"\w+")
PARAMETERS = {
    "conv1.weight": (12, 1, 3, 3),
    "conv1.bias": (12,),
    "conv2.weight": (24, 12, 3, 3),
    "conv2.bias": (24,),
    "norm.weight": (24,),
    "norm.bias": (24,),
    "head.weight": (10, 24),
    "head.bias": (10,),
}


@dataclass(frozen=True)
class SyntheticRun:
    """The run directory and the arrays it was made from."""

    path: Path
    coefficients: np.ndarray
    components: np.ndarray
    split: np.ndarray
    valid: np.ndarray


@pytest.fixture(scope="session")
def written_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SyntheticRun]:
    """Writes a run once for each combination of options. Read only."""

    @functools.cache
    def written(**options: Any) -> SyntheticRun:
        return write_run(tmp_path_factory.mktemp("runs") / "digits", **options)

    return written


@pytest.fixture(scope="session")
def run(written_run: Callable[..., SyntheticRun]) -> SyntheticRun:
    """A complete run: 360 examples, two of them invalid, 12 components, the last one dead. Read only."""
    return written_run()


@pytest.fixture(scope="session")
def informed_run(written_run: Callable[..., SyntheticRun]) -> SyntheticRun:
    """A run of three components with shares of positions and of inputs. Read only."""
    return written_run(n_components=3, shares=True, inputs=True)


@pytest.fixture
def make_run(written_run: Callable[..., SyntheticRun], tmp_path: Path) -> Callable[..., SyntheticRun]:
    """Copies a run to the temporary folder of a test, which may change it."""

    def make(**options: Any) -> SyntheticRun:
        original = written_run(**options)
        return replace(original, path=Path(shutil.copytree(original.path, tmp_path / "digits")))

    return make


def write_run(
    path: Path,
    n_examples: int = 360,
    n_components: int = 12,
    hostile_text: str | None = None,
    text_instead_of_images: bool = False,
    shares: bool = False,
    inputs: bool = False,
) -> SyntheticRun:
    """Write every stage's files; `hostile_text` goes wherever a data set or a model can put text of its own."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    pixels, labels = digits.data[:n_examples] / 16.0, digits.target[:n_examples]
    model = LogisticRegression(C=0.01).fit(digits.data[1000:1250] / 16.0, digits.target[1000:1250])
    split = np.where(np.arange(n_examples) % 3 == 2, "held_out", "fit")
    valid = np.ones(n_examples, bool)
    valid[[5, 17]] = False
    coefficients = _coefficients(pixels, valid, n_components)
    components = rng.standard_normal((n_components, 64))
    components /= np.linalg.norm(components, axis=1, keepdims=True)
    hostile = hostile_text or ""
    names = [f"{digit}{hostile}" for digit in range(10)]

    tables = {
        "examples": _examples(pixels, labels, model, split, valid, hostile, text_instead_of_images),
        "classes": pa.table({"class": list(range(10)), "name": names}),
        "parameters": pa.table(
            {
                "parameter": ["weight", "scale"],
                "shape": ["10x64", None],
                "size": pa.array([640, None], pa.int64()),
                "taken": [True, False],
                "reason": [None, "matches nothing in parameters.include"],
            }
        ),
        "components": _components(coefficients, components, split),
        "top_examples": _top_examples(coefficients, split),
        "coefficients": _long(coefficients),
        "history": _history(),
        "layer_energy": _layer_energy(rng, n_components, hostile),
        "verification": _verification(rng, n_components),
        "selectivity": _selectivity(n_components),
    }
    tables |= _shifts(tables["verification"], tables["top_examples"], names)
    (path / "tables").mkdir(parents=True)
    for name, table in tables.items():
        write_table(path / place(f"tables/{name}.parquet"), name, table)
    if shares:
        table = _position_shares(rng, tables["top_examples"], tables["examples"], hostile)
        pq.write_table(table, path / place("tables/position_shares.parquet"))
    if inputs:
        for name, rows in input_tables(tables["top_examples"], tables["examples"], hostile).items():
            write_table(path / place(f"tables/{name}.parquet"), name, rows_to_columns(rows, name))
    _write_arrays(path, rng, coefficients, components)
    _write_records(path, hostile)
    return SyntheticRun(path, coefficients, components, split, valid)


def _coefficients(pixels: np.ndarray, valid: np.ndarray, n_components: int) -> np.ndarray:
    """Groups of images that look alike; the last component of several has none."""
    centres = KMeans(max(1, n_components - 1), n_init=1, random_state=0).fit(pixels).cluster_centers_
    distances = ((pixels[:, None, :] - centres[None]) ** 2).sum(-1)
    nearness = np.exp(-(distances - distances.min(axis=1, keepdims=True)) / 2)
    weights = np.where(nearness > 0.05, nearness * np.exp(-distances / 8), 0.0)
    coefficients = np.column_stack([weights, np.zeros(len(pixels))])[:, :n_components].astype(np.float32)
    coefficients[~valid] = np.nan
    return coefficients


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels.reshape(8, 8)).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _examples(
    pixels: np.ndarray,
    labels: np.ndarray,
    model: LogisticRegression,
    split: np.ndarray,
    valid: np.ndarray,
    hostile: str,
    text_instead_of_images: bool,
) -> pa.Table:
    predictions = model.predict(pixels)
    count = len(labels)
    sentences = [f"A {label} written by hand, number {i}.{hostile}" for i, label in enumerate(labels)]
    images = [_png(row) for row in pixels]
    return pa.table(
        {
            "example": pa.array(range(count), pa.int64()),
            "id": [f"digit-{i:04d}{hostile}" for i in range(count)],
            "label": pa.array(labels, pa.int64()),
            "prediction": pa.array(predictions, pa.int64()),
            "correct": pa.array(labels == predictions, pa.bool_()),
            "split": split.tolist(),
            "valid": pa.array(valid, pa.bool_()),
            "fisher_norm": pa.array(1 - model.predict_proba(pixels).max(axis=1), pa.float64()),
            "fisher_rank": pa.array(np.full(len(pixels), len(model.classes_) - 1), pa.int64()),
            "kept_trace": pa.array(np.ones(len(pixels)), pa.float64()),
            "loss": pa.array([None] * len(pixels), pa.float64()),
            "logits": pa.array(model.decision_function(pixels).tolist(), pa.list_(pa.float32())),
            "image": pa.array([None] * count if text_instead_of_images else images, pa.binary()),
            "text": pa.array(sentences if text_instead_of_images else [None] * count, pa.string()),
            "ink": pa.array(pixels.sum(axis=1), pa.float64()),
            "writer": [f"writer {i % 13}{hostile}" for i in range(count)],
        }
    )


def _components(coefficients: np.ndarray, components: np.ndarray, split: np.ndarray) -> pa.Table:
    fit = np.nan_to_num(coefficients[split == "fit"]).astype(np.float64)
    cosines = np.abs(components @ components.T) - 2 * np.eye(len(components))
    alone = len(components) == 1
    return pa.table(
        {
            "component": list(range(len(components))),
            "n_active": pa.array((fit > 0).sum(axis=0), pa.int64()),
            "mass": fit.sum(axis=0),
            "energy": (fit**2).sum(axis=0),
            "nearest_component": pa.array([None] if alone else cosines.argmax(axis=1), pa.int64()),
            "nearest_cosine": pa.array([None] if alone else cosines.max(axis=1), pa.float64()),
            "lift_cosine": [0.97] * len(components),
            "cosine_own": [0.68] * len(components),
            "stability": [0.9] * len(components),
        }
    )


def _top_examples(coefficients: np.ndarray, split: np.ndarray, count: int = 32) -> pa.Table:
    rows = []
    for component in range(coefficients.shape[1]):
        for name in ("fit", "held_out"):
            members = np.flatnonzero((split == name) & (np.nan_to_num(coefficients[:, component]) > 0))
            ranked = members[np.argsort(-coefficients[members, component], kind="stable")][:count]
            for rank, example in enumerate(ranked):
                coefficient = float(coefficients[example, component])
                rows.append((component, name, rank, int(example), coefficient))
    columns = zip(*rows, strict=True)
    return pa.table(
        dict(zip(("component", "split", "rank", "example", "coefficient"), map(list, columns), strict=True))
    )


def _long(coefficients: np.ndarray) -> pa.Table:
    example, component = np.nonzero(np.nan_to_num(coefficients))
    values = coefficients[example, component].astype(np.float64)
    order = np.lexsort((example, -values, component))
    return pa.table({"example": example[order], "component": component[order], "coefficient": values[order]})


def _history() -> pa.Table:
    losses = 100 + 140 * np.exp(-np.arange(30) / 4)
    accepted = np.arange(30) % 9 != 5
    losses[~accepted] += 12
    return pa.table(
        {
            "iteration": list(range(30)),
            "loss": losses,
            "objective": losses,
            "explained": 1 - losses / 300,
            "mu": 0.1 * 0.8 ** np.arange(30),
            "accepted": accepted,
            "n_dead": [1] * 30,
            "seconds": [0.2] * 30,
            "sent_bytes": [0] * 30,
        }
    )


def _layer_energy(rng: np.random.Generator, n_components: int, hostile: str) -> pa.Table:
    energy = rng.dirichlet(np.array([1.0, 0.2, 4.0, 0.3, 0.3, 0.3, 3.0, 0.3]), size=n_components)
    return pa.table(
        {
            "component": np.repeat(np.arange(n_components), len(PARAMETERS)),
            "parameter": [f"{name}{hostile}" for name in PARAMETERS] * n_components,
            "energy": energy.ravel(),
        }
    )


def _selectivity(n_components: int) -> pa.Table:
    """Component 1 also moves the examples of component 2; everything else is a hundredth."""
    rows = [
        {"moved": moved, "component": watched, "examples": "held_out", "sign": sign, "n_examples": 8,
         "kl": 0.1 if moved == watched else 0.08 if (moved, watched) == (1, 2) else 0.001, "kl_checked": None}
        for sign in (1, -1) for moved in range(n_components) for watched in range(n_components)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def _position_shares(rng: np.random.Generator, top: pa.Table, examples: pa.Table, hostile: str) -> pa.Table:
    """Of texts, the words with their places, the third one most; of images, the pixels. Every second component's words
    have no places."""
    rows = []
    for listed in top.to_pylist():
        text = examples["text"][listed["example"]].as_py()
        spans = (
            [(None, None, None)] * 64
            if text is None
            else [(m.start(), m.end(), m.group()) for m in WORD.finditer(text)]
        )
        shares = rng.dirichlet(np.ones(len(spans)))
        shares[2] = 1.0
        for position, (start, stop, word) in enumerate(spans):
            known = listed["component"] % 2 == 0
            rows.append(
                {
                    "component": listed["component"],
                    "example": listed["example"],
                    "position": position,
                    "start": start if known else None,
                    "stop": stop if known else None,
                    "token": word and f"{word}{hostile}",
                    "share": float(shares[position]),
                }
            )
    kinds = [("component", pa.int64()), ("example", pa.int64()), ("position", pa.int64()), ("start", pa.int64()),
             ("stop", pa.int64()), ("token", pa.string()), ("share", pa.float64())]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=pa.schema(kinds))


def input_tables(top: pa.Table, examples: pa.Table, hostile: str = "") -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the tables of the stage `inputs`. The first example is not finite."""
    rng = np.random.default_rng(1)
    inputs, shares, groups = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    for number, example in enumerate(sorted(top["example"].unique().to_pylist())):
        text = examples["text"][example].as_py()
        spans = [(None, None, None)] * 64 if text is None else [(*m.span(), m.group()) for m in WORD.finditer(text)]
        row: dict[str, Any] = {"example": example, "class": examples["prediction"][example].as_py(), "n_samples": 32}
        known = {"information": 0.5, "information_se": 0.1, "entropy": 0.2, "entropy_se": 0.01}
        known |= {"prediction_stable": 0.75}
        finite = number > 0
        inputs.append(row | {name: value if finite else None for name, value in known.items()})
        inputs[-1]["shape"] = [8, 8] if text is None else [len(spans)]
        if not finite:
            continue
        values = rng.dirichlet(np.ones(len(spans)))
        values[3], values[0] = 1.0, -0.5
        values /= values.sum()
        for position, ((start, stop, word), value) in enumerate(zip(spans, values.tolist(), strict=True)):
            group = f"{'first' if position < 4 else 'second'}{hostile}"
            token = word and f"{word}{hostile}"
            place_of = {"example": example, "position": position, "start": start, "stop": stop}
            shares.append(place_of | {"group": group, "token": token, "share": value, "information": 0.5 * value})
        for group, part in ((f"first{hostile}", values[:4].sum()), (f"second{hostile}", values[4:].sum())):
            groups.append({"example": example, "group": group, "information": 0.5 * part, "share": part})
    return {"inputs": inputs, "input_shares": shares, "input_groups": groups, "faithfulness": _faithfulness(hostile)}


def _faithfulness(hostile: str) -> list[dict[str, Any]]:
    """By deletion, `occlusion` is better than ours, and knows the replacement; ours is the best by the information."""
    rows = []
    for metric, replacement, means in (
        ("deletion", "mean", {"functional_information": 0.3, "occlusion": 0.1, "random": 0.6}),
        ("information", "resample", {"functional_information": 0.8, "occlusion": 0.7, "random": 0.2}),
    ):
        ours = means["functional_information"]
        for method, mean in means.items():
            is_ours = mean == ours
            difference = {"difference": ours - mean, "difference_low": ours - mean - 0.05}
            difference |= {"difference_high": ours - mean + 0.05}
            row = {"method": method if is_ours else f"{method}{hostile}", "replacement": replacement, "metric": metric}
            row |= {"n_examples": 100, "mean": mean, "low": mean - 0.04, "high": mean + 0.04}
            row |= {name: None if is_ours else value for name, value in difference.items()}
            knows = method == "occlusion" and replacement == "mean"
            rows.append(row | {"knows_replacement": knows, "passes_per_example": 64.0})
    return rows


def _verification(rng: np.random.Generator, n_components: int) -> pa.Table:
    """All components verified but the dead one; component 3 fails, component 4 left its baseline untouched."""
    rows: list[dict[str, Any]] = []
    for component in range(max(1, n_components - 1)):
        for examples in ("fit", "held_out"):
            norm_ratio = float(rng.lognormal(-0.3, 0.5))
            for sign in (1, -1):
                ratio = float(rng.lognormal(1.8 if examples == "fit" else 1.5, 0.6)) if component != 3 else 0.4
                ratio = np.inf if component == 4 and examples == "held_out" and sign == 1 else ratio
                rows.append(_verified(rng, component, examples, sign, ratio, norm_ratio))
    return pa.Table.from_pylist(rows)


def _verified(
    rng: np.random.Generator, component: int, examples: str, sign: int, ratio: float, norm_ratio: float
) -> dict[str, Any]:
    random_ratio = float(rng.lognormal(-0.1, 0.4))
    baseline = 0.1 / ratio
    return {
        "component": component,
        "examples": examples,
        "sign": sign,
        "epsilon": 0.21,
        "n_top": 32,
        "n_baseline": 200,
        "kl_top": 0.1,
        "kl_baseline": baseline,
        "kl_ratio": ratio,
        "fisher_norm_ratio": norm_ratio,
        "random_epsilon": 0.4,
        "random_kl_top": 0.1 * random_ratio,
        "random_kl_baseline": 0.1,
        "random_kl_ratio": random_ratio,
        "other_component": (component + 1) % 12,
        "other_epsilon": 0.3,
        "other_kl_top": 0.05,
        "other_kl_baseline": 0.1,
        "other_kl_ratio": 0.5,
        "kl_ratio_low": 0.7 * ratio,
        "kl_ratio_high": 1.4 * ratio,
        **_matched(component, examples, sign, ratio, norm_ratio),
        "above_controls": 0.7 * ratio > max(1.0, norm_ratio, random_ratio),
        "kl_correlation": 0.4,
        "accuracy_top_before": 0.94,
        "accuracy_top_after": 0.94 - 0.3 * min(1.0, baseline + 0.4),
        "accuracy_baseline_before": 0.96,
        "accuracy_baseline_after": 0.95,
        "reached_target": component != 6,
    }


def _matched(component: int, examples: str, sign: int, ratio: float, norm_ratio: float) -> dict[str, Any]:
    """The sign + is the informative one of even components; component 5 is not matched in the held-out examples."""
    matched = component != 5 or examples == "fit"
    return {
        "informative": (sign > 0) == (component % 2 == 0),
        "target_kl": 0.1,
        "matched": matched,
        "n_matched": 40 if matched else 12,
        "n_by_trace": 0 if matched else 32,
        "trace_ratio": norm_ratio,
        "kl_matched": 0.1 / (0.8 * ratio),
        "kl_ratio_matched": 0.8 * ratio,
        "kl_ratio_matched_low": 0.5 * ratio,
        "kl_ratio_matched_high": 1.1 * ratio,
        "kl_ratio_trace": 1.5 * ratio,
        "small_step_ratio": 0.9 * ratio,
        "auc": 0.8,
        "changed_top": 0.25,
        "changed_matched": 0.02,
        "other_kl_ratio_checked": None,
        "examples_passed": 300,
        "flip_from": 4,
        "flip_to": 9,
        "flip_share": 0.25,
        "raised_class": 9,
        "raised": 0.2,
        "lowered_class": 4,
        "lowered": -0.3,
    }


def _shifts(verification: pa.Table, top_examples: pa.Table, names: list[str]) -> dict[str, pa.Table]:
    """Every step moves probability from class 4 to class 9, and every fourth top example with it."""
    classes, examples = list[dict[str, Any]](), list[dict[str, Any]]()
    for verified in verification.to_pylist():
        step = {name: verified[name] for name in ("component", "examples", "sign")}
        for number, name in enumerate(names):
            p = {4: (0.5, 0.2), 9: (0.1, 0.3)}.get(number, (0.05, 0.0625))
            shares = {4: (0.6, 0.35), 9: (0.1, 0.35)}.get(number, (0.0375, 0.0375))
            row = {"class": number, "name": name, "p_before": p[0], "p_after": p[1]}
            classes.append(step | row | {"share_before": shares[0], "share_after": shares[1]})
        tops = [row for row in top_examples.to_pylist() if row["component"] == verified["component"]]
        for top in (row for row in tops if row["split"] == verified["examples"]):
            new = 9 if top["rank"] % 4 == 0 else 4
            row = {"rank": top["rank"], "example": top["example"], "place": 0, "p_before": 0.8, "p_after": 0.3}
            row |= {"class_before": 4, "name_before": names[4], "class_after": new, "name_after": names[new]}
            examples.append(step | row | {"p_new": 0.6 if new == 9 else 0.3, "kl": 0.1, "context": None})
    return {"prediction_shifts": pa.Table.from_pylist(classes), "example_shifts": pa.Table.from_pylist(examples)}


def _write_arrays(path: Path, rng: np.random.Generator, coefficients: np.ndarray, components: np.ndarray) -> None:
    write_factorization(path / place("factorization.zarr"), components, coefficients, {"explained": 0.667})
    count = len(components)
    store = DirectionStore.create(path / place("directions.zarr"), n_components=count, shapes=PARAMETERS, attrs={})
    for component in range(count):
        store.write(component, {name: rng.standard_normal(shape) for name, shape in PARAMETERS.items()})


def _write_records(path: Path, hostile: str) -> None:
    (path / "run.yaml").write_text(f"run_dir: runs/digits\ntask:\n  name: digits{hostile}\n", encoding="utf-8")
    (path / place("report")).parent.joinpath("factorization.yaml").write_text("factorization:\n  n_components: 12\n")
    provenance = {
        "task": f"digits{hostile}",
        "version": "0.1.0",
        "git_sha": "0f2c1a9",
        "packages": {"torch": "2.13.0", "ray": "2.60.0"},
        "seed": 0,
    }
    (path / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    stages: dict[str, dict[str, Any]] = {
        "fishers": {"n_examples": 360, "n_invalid": 2, "seconds": 21.4},
        "factorize": {"explained": 0.667, "explained_held_out": 0.581, "stopped": "converged", "seconds": 6.2},
        "lift": {"median_cosine": 0.97, "seconds": 9.0},
        "verify": {"seconds": 74.9, "n_components": 11, "scores": [{"examples": "fit", "sign": 1}]},
    }
    for name, summary in stages.items():
        (path / place(f"stages/{name}.json")).parent.mkdir(parents=True, exist_ok=True)
        (path / place(f"stages/{name}.json")).write_text(json.dumps(summary), encoding="utf-8")
