"""Detection and intruder scores of all components, by an embedding model, in the table ``label_scores``.

Only held-out top examples are used, because the components were fitted on the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.statistics.label_scores import detection, intruder
from npeff.store.annotations import read_annotations
from npeff.store.splits import is_fit
from npeff.store.tables import read_table, rows_to_columns, write_table

if TYPE_CHECKING:
    from npeff.tasks.huggingface.embedding import TextEmbedder

N_OTHERS = 256
"""Number of other held-out examples that are compared with the top examples."""
N_DRAWS = 200
"""Number of draws of the intruder score: its standard error is at most 0.036."""


def score_labels(run: RunDirectory, model: Path) -> pa.Table:
    """Score the components and their names, and write the table ``label_scores``.

    Args:
        run: The run, with the factorization.
        model: Local folder of a sentence-embedding model.

    Returns:
        The table, one row for each component.

    Raises:
        RunDirectoryError: The examples have no texts, or no component has held-out top examples.
        StoreError: A table is missing or damaged.
        TaskError: The model cannot be loaded.
    """
    with run.lock():
        examples = read_table(run.table("examples"), "examples", ["example", "split", "valid", "text"])
        top = read_table(run.table("top_examples"), "top_examples")
        n_components = len(read_table(run.table("components"), "components", ["component"]))
        members = _held_out(top, n_components)
        others = _others(examples, run.config.seed)
        wanted = sorted({*others, *(example for listed in members for example in listed)})
        chosen = examples.filter(pc.is_in(examples["example"], pa.array(wanted, pa.int64())))
        texts = dict(zip(chosen["example"].to_pylist(), chosen["text"].to_pylist(), strict=True))
        if any(texts[example] is None for example in wanted):
            raise RunDirectoryError(f"the examples of {run.path} have no texts", "scores need examples with texts")
        if not any(members):
            raise RunDirectoryError(
                f"no component of {run.argument} has held-out top examples", "hold out examples in a new factorization"
            )
        from npeff.tasks.huggingface.embedding import TextEmbedder

        embedder = TextEmbedder(model)
        place_of = {example: place for place, example in enumerate(wanted)}
        embedded_nd = embedder.embed([texts[example] for example in wanted])
        places = [[place_of[example] for example in listed] for listed in members]
        rows = _rows(embedder, embedded_nd, places, [place_of[example] for example in others], run)
        table = pa.table(rows_to_columns(rows, "label_scores"))
        write_table(run.table("label_scores"), "label_scores", table)
        return read_table(run.table("label_scores"), "label_scores")


def _rows(
    embedder: TextEmbedder,
    embedded_nd: NDArray[np.float32],
    members: list[list[int]],
    others: list[int],
    run: RunDirectory,
) -> list[dict[str, Any]]:
    names = [read_annotations(run).name(component) for component in range(len(members))]
    names_nd = embedder.embed([name or "" for name in names])
    rows = []
    for component, listed in enumerate(members):
        outside = sorted(set(others) - set(listed))
        intruders = sorted({place for other in members for place in other} - set(listed))
        rng = np.random.default_rng([run.config.seed, component])
        named, top_nd, name = names[component] is not None, embedded_nd[listed], names_nd[component]
        rows.append(
            {
                "component": component,
                "name": names[component],
                "n_top": len(listed),
                "n_others": len(outside),
                "detection": detection(name, top_nd, embedded_nd[outside]) if named else None,
                "intruder": intruder(top_nd, embedded_nd[intruders], N_DRAWS, rng),
            }
        )
    return rows


def _held_out(top: pa.Table, n_components: int) -> list[list[int]]:
    """Return the held-out top examples of each component."""
    members: list[list[int]] = [[] for _ in range(n_components)]
    for row in top.select(["component", "split", "example"]).to_pylist():
        if row["split"] == "held_out":
            members[row["component"]].append(row["example"])
    return members


def _others(examples: pa.Table, seed: int) -> list[int]:
    """Return random valid held-out examples, the same for all components."""
    held_out_N = ~is_fit(examples["split"])
    numbers = examples["example"].to_numpy()[held_out_N & examples["valid"].to_numpy().astype(bool)]
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(numbers, min(N_OTHERS, len(numbers)), replace=False).tolist())
