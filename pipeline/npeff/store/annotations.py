"""Names and notes that people give to the components of a factorization.

    annotations.json    {"components": checksum, "annotations": {"3": {"name": "...", "note": "..."}}, "seal": checksum}

The file is in the folder of the factorization. It contains the checksum of the components that it describes. If the
factorization is fitted again with other components, its annotations describe nothing that is stored any more: they are
not shown, and the next annotation replaces them.

Texts are one line without control characters. They come from people and from language models, so whatever shows them
must escape them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from npeff.errors import plain_line
from npeff.storage.checksums import read_json, write_json_atomically
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.file_lock import lock_file
from npeff.storage.location import is_remote
from npeff.store.run_files import FilesOfRun

LONGEST_NAME, LONGEST_NOTE = 200, 4000
"""Largest numbers of characters of a name and of a note."""


@dataclass(frozen=True)
class Annotation:
    """The name and the note of a component.

    In stored annotations, None means that there is no such text. In changes, None leaves the stored text as it is, and
    an empty text deletes it.
    """

    name: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Annotations:
    """The annotations of a factorization.

    Attributes:
        of_component: annotation by component, in the order of the components, without empty annotations.
        outdated: whether the stored annotations are of former components, and therefore are not in `of_component`.
    """

    of_component: Mapping[int, Annotation] = field(default_factory=dict)
    outdated: bool = False

    def name(self, component: int) -> str | None:
        """Return the name of a component; None if it has no name."""
        return self.of_component.get(component, Annotation()).name

    def note(self, component: int) -> str | None:
        """Return the note of a component; None if it has no note."""
        return self.of_component.get(component, Annotation()).note


def read_annotations(run: FilesOfRun) -> Annotations:
    """Return the annotations of a factorization.

    Raises:
        StoreError: the file is damaged, or the factorization is damaged.
    """
    path = run.annotations
    if not path.exists():
        return Annotations()
    of_components, found = _content(path)
    if of_components != _components(run)[0]:
        return Annotations(outdated=True)
    return Annotations(dict(sorted(found.items())))


def write_annotations(run: FilesOfRun, changes: Mapping[int, Annotation]) -> Annotations:
    """Change annotations of a factorization. The file is replaced as a whole.

    Other processes of this machine wait meanwhile. In a bucket, the last writer wins.

    Args:
        run: the run, with the factorization.
        changes: changed annotation by component.

    Returns:
        All annotations after the change.

    Raises:
        StoreError: there is no such component, or a text is too long, or the file is damaged or cannot be written. The
            stored annotations are then unchanged.
    """
    checksum, n_components = _components(run)
    for component in changes:
        if not 0 <= component < n_components:
            raise StoreError(f"there is no component {component}", f"choose one of 0 to {n_components - 1}")
    cleaned = {component: _cleaned(component, change) for component, change in changes.items()}
    with _locked(run.annotations):
        found = dict(read_annotations(run).of_component)
        for component, change in cleaned.items():
            former = found.pop(component, Annotation())
            name = former.name if change.name is None else change.name or None
            note = former.note if change.note is None else change.note or None
            if name or note:
                found[component] = Annotation(name, note)
        found = dict(sorted(found.items()))
        texts = {str(component): {"name": each.name, "note": each.note} for component, each in found.items()}
        write_json_atomically(run.annotations, {"components": checksum, "annotations": texts})
    return Annotations(found)


def verify_annotations(path: Path) -> None:
    """Check the file of annotations. Raises StoreError if it is damaged."""
    _content(path)


def _content(path: Path) -> tuple[str, dict[int, Annotation]]:
    """Return the checksum of the described components, and the annotations."""
    try:
        content = read_json(path)
        found = {
            int(component): _cleaned(int(component), Annotation(**texts))
            for component, texts in content["annotations"].items()
        }
        return str(content["components"]), found
    except (StoreError, KeyError, TypeError, ValueError, AttributeError):
        raise StoreError(f"{path} is damaged", "restore it from a copy or delete it", path=path) from None


def _components(run: FilesOfRun) -> tuple[str, int]:
    """Return the checksum and the number of the components.

    They are in the record of the stage. Without the record, such as in runs of earlier versions, the store has them.
    """
    record = run.record_file("factorize")
    try:
        found = read_json(record)
        return str(found["checksums"]["components"]), int(found["n_components"])
    except (StoreError, KeyError, TypeError, ValueError):
        from npeff.store.component_store import open_factorization  # Zarr is imported only if it is needed

        stored = open_factorization(run.factorization)
        return stored.attrs["checksums"]["components"], int(stored.components.shape[0])


def _cleaned(component: int, change: Annotation) -> Annotation:
    texts = {}
    for what, most in (("name", LONGEST_NAME), ("note", LONGEST_NOTE)):
        text: str | None = getattr(change, what)
        texts[what] = None if text is None else plain_line(text)
        if text is not None and len(texts[what] or "") > most:
            length = len(texts[what] or "")
            raise StoreError(f"the {what} of component {component} has {length} characters", f"write at most {most}")
    return Annotation(**texts)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time read and replace the file."""
    if is_remote(path):
        yield
        return
    with (
        os_errors_explained("write", path),
        open(path.with_name(f".{path.name}.lock"), "a", encoding="utf-8") as file,
    ):
        lock_file(file, path, wait=True, elsewhere="use a run on another file system")
        yield
