"""The tables of the components and coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.runs.directory import RunDirectory
from npeff.store.coefficient_rows import Coefficients, columns_of
from npeff.store.splits import is_fit
from npeff.store.tables import read_table, rows_to_columns, write_table, write_table_in_parts
from npeff.verification import top_examples


def write_component_tables(
    run: RunDirectory,
    components_KD: NDArray[np.float64],
    coefficients_NK: Coefficients,
    stability_K: NDArray[np.float64] | None = None,
    lineage: str | None = None,
) -> None:
    """Write the tables ``components``, ``top_examples`` and ``coefficients``, with the coefficients of one component in
    memory at a time."""
    examples = read_table(run.table("examples"), "examples", ["split"])
    fit_N = is_fit(examples["split"])
    among = {"fit": fit_N, "held_out": ~fit_N}
    facts: list[dict[str, Any]] = []
    top: list[dict[str, Any]] = []

    def parts() -> Iterator[dict[str, Any]]:
        for component, w_N in enumerate(columns_of(coefficients_NK)):
            fitted_n = w_N[among["fit"]]
            facts.append(
                {"n_active": np.count_nonzero(fitted_n > 0), "mass": fitted_n.sum(), "energy": fitted_n @ fitted_n}
            )
            for split, among_N in among.items():
                chosen = top_examples(w_N, among_N, run.config.verification.top_examples)
                top.extend(
                    {"component": component, "split": split, "rank": rank, "example": example, "coefficient": w}
                    for rank, (example, w) in enumerate(zip(chosen.tolist(), w_N[chosen].tolist(), strict=True))
                )
            active = np.flatnonzero(w_N)
            active = active[np.argsort(-w_N[active], kind="stable")]
            yield {"example": active, "component": np.full(len(active), component), "coefficient": w_N[active]}

    write_table_in_parts(run.table("coefficients"), "coefficients", parts(), lineage)
    write_table(run.table("top_examples"), "top_examples", rows_to_columns(top, "top_examples"), lineage)
    n_components = len(components_KD)
    cosines_KK = np.abs(components_KD @ components_KD.T)
    np.fill_diagonal(cosines_KK, -1)
    alone = n_components == 1
    write_table(
        run.table("components"),
        "components",
        {
            "component": np.arange(n_components),
            **{name: [each[name] for each in facts] for name in ("n_active", "mass", "energy")},
            "nearest_component": [None] if alone else cosines_KK.argmax(axis=1),
            "nearest_cosine": [None] if alone else cosines_KK.max(axis=1),
            "lift_cosine": [None] * n_components,
            "cosine_own": [None] * n_components,
            "stability": [None] * n_components if stability_K is None else stability_K,
        },
        lineage,
    )
