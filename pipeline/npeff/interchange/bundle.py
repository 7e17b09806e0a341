"""A folder with the report, the tables and some directions of a run, and a card, that any static host can serve.

OUT/index.html                         the report
OUT/tables/NAME.parquet                the tables
OUT/directions/component-3.safetensors unit directions of chosen components
OUT/run.yaml, factorization.yaml, provenance.json, annotations.json
OUT/README.md                          the card: metadata, contents, provenance, licence
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from npeff.errors import without_values
from npeff.interchange.card import card_text
from npeff.query.components import ComponentStore
from npeff.query.without_texts import without_texts
from npeff.reports.report import render_report
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.stages.pipeline import export_direction
from npeff.storage.atomic import refuse_not_empty, replacing_directory
from npeff.storage.location import location

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")


@dataclass(frozen=True)
class BundleOptions:
    """What a bundle contains.

    Attributes:
        components: components whose directions are written.
        texts: whether to write the texts, images and tokens of the examples, and the columns of the task.
        license: identifier of the licence in the card, as model hubs know it. ``unknown`` leaves it open.
        factorization: name of the factorization. The default is ``default``, or the only one.
    """

    components: Sequence[int] = ()
    texts: bool = True
    license: str = "unknown"
    factorization: str | None = None

    def __post_init__(self) -> None:
        if not _LICENSE.fullmatch(self.license):
            raise ConfigError(
                f"{self.license!r:.80} is not an identifier of a licence: use one such as apache-2.0, mit or cc-by-4.0"
            )


def write_bundle(run_dir: str | Path, folder: str | Path, options: BundleOptions | None = None) -> Path:
    """Write a run as a folder for a static host. The folder is complete or absent.

    The texts of the run file are written as they are stored, with the names of environment variables in place of their
    values.

    Args:
        run_dir: The run directory.
        folder: The folder to write. It must not exist, or be empty.
        options: What to write.

    Returns:
        The folder.

    Raises:
        ConfigError: An option is not valid, or huggingface_hub is not installed, which writes the card.
        RunDirectoryError: The path is not a run directory, or a component is not lifted.
        QueryError: A table is damaged.
        StoreError: The folder is not empty or cannot be written.
    """
    options, target = options or BundleOptions(), location(folder)
    refuse_not_empty(target)
    run = RunDirectory.open(run_dir, options.factorization)
    store = ComponentStore.open(run.path, run.name)
    if not options.texts:
        store = without_texts(store)
    shown = run.config.report.arguments()
    if not options.texts:
        shown["beside"] = None  # the report of another run, with its texts
    with replacing_directory(target) as partial:
        (partial / "tables").mkdir()
        for name in store.tables.names():
            _write_table(store, name, partial / "tables" / f"{name}.parquet", copied=options.texts)
        for component in dict.fromkeys(options.components):
            (partial / "directions").mkdir(exist_ok=True)
            export_direction(run, component, partial / "directions" / f"component-{component}.safetensors")
        for file in (run.path / "run.yaml", run.settings, run.path / "provenance.json", run.annotations):
            if file.exists():
                text = without_values(file.read_text(encoding="utf-8"))
                (partial / file.name).write_text(text, encoding="utf-8")
        (partial / "index.html").write_text(render_report(store, **shown), encoding="utf-8")
        (partial / "README.md").write_text(card_text(store, partial, options.license, options.texts), encoding="utf-8")
    return target


def _write_table(store: ComponentStore, name: str, file: Path, *, copied: bool) -> None:
    """Copy the file of a table, or write the part of it that the store shows."""
    if copied:
        with store.run.table(name).open("rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    else:
        pq.write_table(store.tables.read(name), file, compression="zstd")
