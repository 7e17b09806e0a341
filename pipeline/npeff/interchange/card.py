"""The card of a bundle: a README with metadata in the form of the Hugging Face Hub, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from npeff.errors import without_values
from npeff.query.components import ComponentStore
from npeff.runs.config_reading import ConfigError
from npeff.storage.errors import StoreError
from npeff.store.fisher_store import FisherStore

_MOST_COMPONENTS = 100
_FILES = {
    "index.html": "the report, which opens in any browser",
    "tables": "the tables, as Parquet files",
    "directions": "unit directions of components in parameter space, as safetensors files",
    "annotations.json": "names and notes of components",
    "run.yaml": "the run file",
    "factorization.yaml": "the settings of the factorization",
    "provenance.json": "versions and commit",
}


def card_text(store: ComponentStore, folder: Path, license_id: str, texts: bool) -> str:
    """Return the content of the README of a bundle.

    Args:
        store: The run, as the bundle shows it.
        folder: The folder with the other files of the bundle.
        license_id: Identifier of the licence.
        texts: Whether the bundle contains the texts and images of the examples.

    Raises:
        ConfigError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import DatasetCard, DatasetCardData
    except ImportError:
        raise ConfigError("the card needs the package huggingface_hub: pip install 'npeff-pipeline[hf]'") from None
    task = str(store.tables.json("provenance.json").get("task") or "a model")
    tables = sorted(path.stem for path in (folder / "tables").glob("*.parquet"))
    data = DatasetCardData(
        license=license_id,
        pretty_name=f"NPEFF components of {_plain(task)}",
        tags=["npeff", "interpretability", "fisher-information"],
        configs=[{"config_name": name, "data_files": f"tables/{name}.parquet"} for name in tables],
    )
    lines = [f"# NPEFF components of {_code(task)}", "", *_summary(store), *_components(store)]
    lines += [*_contents(folder, texts), *_provenance(store)]
    lines += ["## Licence", "", f"Licence of this folder: {_code(license_id)}."]
    lines += ["The licences of the model and of the data set apply to what is derived from them.", ""]
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def _summary(store: ComponentStore) -> Iterator[str]:
    found = store.summary()
    if "n_components" in found:
        yield (
            f"{found['n_components']} components of the per-example Fisher matrices of {found.get('n_examples', '?')} "
            "examples, computed by npeff (NPEFF, [arXiv 2310.04649](https://arxiv.org/abs/2310.04649)). A component is "
            "a group of examples that the model processes in a similar way, with a direction in parameter space."
        )
        yield ""
    facts = {name: found[name] for name in ("explained", "explained_held_out") if found.get(name) is not None}
    for scores in found.get("verification", []):
        facts[f"median KL ratio, {scores['examples']}"] = scores.get("median_kl_ratio")
    yield from _table(("", ""), [(name, _number(value)) for name, value in facts.items()])


def _components(store: ComponentStore) -> Iterator[str]:
    if not store.tables.has("components"):
        return
    rows = store.components_table().to_pylist()
    ratio = next((name for name in rows[0] if name.startswith("kl_ratio_matched_")), None) if rows else None
    yield from ("## Components", "")
    listed = [
        (str(row["component"]), _code(row["name"] or ""), str(row["n_active"]), _number(row[ratio]) if ratio else "")
        for row in rows[:_MOST_COMPONENTS]
    ]
    yield from _table(
        (
            "component",
            "name",
            "active",
            f"KL ratio ({ratio.removeprefix('kl_ratio_matched_')})" if ratio else "KL ratio",
        ),
        listed,
    )
    if len(rows) > _MOST_COMPONENTS:
        yield from (f"{len(rows) - _MOST_COMPONENTS} more are in `tables/components.parquet`.", "")


def _contents(folder: Path, texts: bool) -> Iterator[str]:
    yield from ("## Files", "")
    yield from _table(
        ("file", "content"), [(f"`{name}`", what) for name, what in _FILES.items() if (folder / name).exists()]
    )
    if not texts:
        yield from ("The texts, images and tokens of the examples, and further columns of the data, are left out.", "")
    yield from (
        "```python",
        "import pyarrow.parquet as pq",
        "",
        'pq.read_table("tables/components.parquet")',
        "```",
        "",
    )


def _provenance(store: ComponentStore) -> Iterator[str]:
    found = store.tables.json("provenance.json")
    facts: dict[str, Any] = {name: found.get(name) for name in ("created_at", "task", "seed", "python", "git_sha")}
    facts |= found.get("packages") or {}
    facts["factorization"] = store.run.name
    with suppress(StoreError, KeyError):  # an imported decomposition has no Fishers
        facts["model fingerprint"] = FisherStore.read_attributes(store.run.fishers)["model_fingerprint"]
    yield from ("## Provenance", "")
    yield from _table(("", ""), [(name, _code(value)) for name, value in facts.items() if value is not None])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    if rows:
        for row in (head, ("---",) * len(head), *rows):
            yield f"| {' | '.join(row)} |"
        yield ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _code(value: Any) -> str:
    text = _plain(str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""


def _plain(text: str) -> str:
    """Return a text without line breaks, which would end a row or the metadata."""
    return " ".join(without_values(text).split())
