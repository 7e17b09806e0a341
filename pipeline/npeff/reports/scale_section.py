"""The section of the report about the perceptual scale: curves of ψ, the table of paths, and images along paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.query.components import ComponentStore
from npeff.reports.charts import Axis
from npeff.reports.pictures import data_uri, png_size

_POINTS = 41
"""Positions at which a curve is drawn."""
_CURVES = 64
"""Largest number of single curves."""
_ROWS = 12
"""Largest number of paths in the table, and of paths of components."""
_MORPHS = 2
"""Largest number of paths whose images are shown."""
_PIXELATED_BELOW = 65
"""Images narrower than this number of pixels are enlarged without smoothing."""

_NAMES = {"psi": "equal steps of ψ", "s": "equal steps of s"}
_PREDICTIONS = {
    "input": "the distance of the inputs",
    "gaussian": "Gaussian textures of the same spectra",
    "ideal": "an ideal observer of the stimulus",
}


@dataclass(frozen=True)
class ScaleChart:
    """Curves of ψ against s, with the straight line."""

    width: float
    height: float
    axis_s: Axis
    axis_psi: Axis
    curves: list[str]
    """Points of the curve of each path."""
    mean: str
    predicted: str | None
    """Points of the mean predicted curve."""
    prediction: str | None
    """What is predicted from."""


@dataclass(frozen=True)
class MorphRow:
    label: str
    names: list[str]
    """CSS classes of the images."""
    positions: list[float]


@dataclass(frozen=True)
class Morph:
    """Images on one path."""

    title: str
    rows: list[MorphRow]
    pixelated: bool


@dataclass(frozen=True)
class ScaleSection:
    chart: ScaleChart | None
    rows: list[dict[str, Any]]
    """The rows of the model in the table of paths, with titles and comparisons."""
    n_paths: int
    of_components: list[dict[str, Any]]
    prediction: str | None
    along: bool
    texts: bool
    """Whether the inputs are tokens, between which there are no texts."""
    morphs: list[Morph] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    """CSS class to data URI."""


def scale_section(store: ComponentStore) -> ScaleSection | None:
    """Return the section; None if the stage `scale` has not run."""
    if not all(store.tables.has(name) for name in ("paths", "scales", "morphs")):
        return None
    paths = store.table("paths").to_pylist()
    titles = _titles(store, paths)
    others = {row["path"]: row for row in paths if row["space"] != "model"}
    rows = [
        {
            **row,
            "title": titles[row["path"]],
            "matching": others.get(row["path"], row)["matching"],
            "largest_difference": others.get(row["path"], row)["largest_difference"],
        }
        for row in paths
        if row["space"] == "model"
    ]
    plain, of_components = ([row for row in rows if (row["component"] is None) is wanted] for wanted in (True, False))
    along = any(row["to_example"] is None for row in plain)
    space = next((row["space"] for row in others.values()), None)
    prediction = None if space is None else _PREDICTIONS["ideal" if along and space == "gaussian" else space]
    morphs, images = _morphs(store.table("morphs").to_pylist(), titles)
    return ScaleSection(
        chart=_chart(store, [row["path"] for row in plain], prediction),
        rows=plain[:_ROWS],
        n_paths=len(plain),
        of_components=of_components[:_ROWS],
        prediction=prediction,
        along=along,
        texts=bool(store.tables.record("scale").get("texts")),
        morphs=morphs,
        images=images,
    )


def _titles(store: ComponentStore, paths: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Return the ids of the ends of each path, with the predicted classes."""
    found = store.tables.read("examples", ["example", "id", "prediction"]).to_pylist()
    shown = {end for row in paths for end in (row["from_example"], row["to_example"])}
    names = store.class_names()

    def named(row: dict[str, Any]) -> str:
        name = names.get(row["prediction"])
        return str(row["id"]) if name is None else f"{row['id']} ({name})"

    texts = {row["example"]: named(row) for row in found if row["example"] in shown}
    return {
        row["path"]: " → ".join(texts[end] for end in (row["from_example"], row["to_example"]) if end is not None)
        for row in paths
    }


def _chart(store: ComponentStore, paths: Sequence[int], prediction: str | None) -> ScaleChart | None:
    """Lay out the curves of paths; None if no path has a scale."""
    s_n, wanted = np.linspace(0.0, 1.0, _POINTS), set(paths)
    found: dict[tuple[bool, int], tuple[list[float], list[float]]] = {}
    for row in store.tables.read("scales", ["path", "space", "s", "psi"]).to_pylist():
        if row["path"] in wanted and row["psi"] is not None:
            positions, values = found.setdefault((row["space"] == "model", row["path"]), ([], []))
            positions.append(row["s"])
            values.append(row["psi"])
    psi = {key: np.interp(s_n, *curve) for key, curve in found.items()}
    model = [psi_n for (of_model, _), psi_n in psi.items() if of_model]
    others = [psi_n for (of_model, _), psi_n in psi.items() if not of_model]
    if not model:
        return None
    width, height = 560.0, 360.0
    axis_s, axis_psi = Axis(0.0, 1.0, 62, width - 14), Axis(0.0, 1.0, height - 44, 14)

    def line(psi_n: NDArray[np.float64]) -> str:
        places = zip(s_n.tolist(), psi_n.tolist(), strict=True)
        return " ".join(f"{axis_s.position(s)},{axis_psi.position(value)}" for s, value in places)

    return ScaleChart(
        width=width,
        height=height,
        axis_s=axis_s,
        axis_psi=axis_psi,
        curves=[line(psi_n) for psi_n in model[:_CURVES]],
        mean=line(np.mean(model, axis=0)),
        predicted=line(np.mean(others, axis=0)) if others else None,
        prediction=prediction,
    )


def _morphs(rows: Sequence[dict[str, Any]], titles: dict[int, str]) -> tuple[list[Morph], dict[str, str]]:
    morphs, images = list[Morph](), dict[str, str]()
    for path in sorted({row["path"] for row in rows})[:_MORPHS]:
        shown = []
        of_path = [row for row in rows if row["path"] == path]
        for by, label in _NAMES.items():
            steps = sorted((row for row in of_path if row["by"] == by), key=lambda row: int(row["step"]))
            names = [f"m{path}-{by}-{row['step']}" for row in steps]
            images |= {name: data_uri(row["image"]) for name, row in zip(names, steps, strict=True)}
            shown.append(MorphRow(label, names, [row["s"] for row in steps]))
        width = png_size(of_path[0]["image"])[1]
        morphs.append(Morph(titles[path], shown, width < _PIXELATED_BELOW))
    return morphs, images
