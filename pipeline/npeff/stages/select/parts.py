"""The fits of the stage `select` that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part
from npeff.store.fit_store import FitStore


def select_parts(run: RunDirectory) -> Iterator[Part]:
    record = run.record_file("select")
    fits = FitStore(run.partial_results("select"), signature="")
    for name in fits.names():
        files = tuple(fits.directory / f"{name}{suffix}" for suffix in (".json", ".npy"))
        yield Part(f"fit {name}", files[0], partial(fits.verify, name), (*files, record))
