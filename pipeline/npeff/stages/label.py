"""Names and notes of components: one at a time, or from a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npeff.runs.directory import RunDirectory
from npeff.runs.opening import AnyRun, as_run
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.store.annotations import Annotation, Annotations, write_annotations

_MOST_BYTES = 2**26
"""Size of the largest file of names that is read."""


def annotate(
    run: AnyRun,
    component: int,
    *,
    name: str | None = None,
    note: str | None = None,
    factorization: str | None = None,
) -> None:
    """Give a name, a note or both to a component.

    They are kept in the run, and shown in the report and in the answers of queries.

    Args:
        run: The run, its configuration, or the path of its directory or run file.
        component: The component.
        name: The name, of at most 200 characters. None keeps the present one, and an empty text deletes it.
        note: The note, of at most 4,000 characters, likewise.
        factorization: Name of the factorization. The default is that of the run.

    Raises:
        RunDirectoryError: The path is not a run directory, or the run has no factorization of this name.
        StoreError: There is no such component, a text is too long, or the file cannot be read or written.
    """
    opened = as_run(run)
    opened = opened if factorization is None else opened.with_factorization(factorization)
    write_annotations(opened, {component: Annotation(name, note)})


def annotate_from(run: RunDirectory, file: Path) -> Annotations:
    """Give the names and notes of a file to the components.

    Args:
        run: The run, with the factorization.
        file: JSON objects, one on each line, or a CSV table if its name ends in ``.csv``. The keys or columns are
            ``component``, ``name`` and ``note``; others are ignored. A missing or empty text keeps the present one.

    Returns:
        All annotations of the factorization.

    Raises:
        StoreError: The file cannot be read, or a line of it is not valid. No annotation is then changed.
    """
    changes: dict[int, Annotation] = {}
    for line, row in _rows(file):
        component = _component(row.get("component"))
        texts = [row.get(key) for key in ("name", "note")]
        if component is None or any(not isinstance(text, str | None) for text in texts):
            wanted = 'write {"component": 3, "name": "...", "note": "..."}'
            raise StoreError(f"line {line} of {file} does not have a component and texts", wanted, path=file)
        if component in changes:
            raise StoreError(f"line {line} of {file} names component {component} again", "keep one line", path=file)
        if any(texts):
            changes[component] = Annotation(*(text or None for text in texts))
    if not changes:
        raise StoreError(f"{file} has no names", "give a file with the keys component, name and note", path=file)
    return write_annotations(run, changes)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects or rows of a file, with their lines."""
    with os_errors_explained("read", file), file.open("rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise StoreError(f"{file} is larger than {_MOST_BYTES >> 20} MiB", "split it", path=file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise StoreError(f"{file} is not UTF-8", "save it as UTF-8", path=file) from None
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
        try:
            yield from ((reader.line_num, dict(row)) for row in reader)
        except csv.Error as error:
            raise StoreError(
                f"line {reader.line_num} of {file} is not CSV ({error})", "correct it", path=file
            ) from None
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise StoreError(f"line {number} of {file} is not a JSON object", "write one object a line", path=file)
            yield number, row


def _component(value: Any) -> int | None:
    """Return the number of a component, which is a text in CSV; None if it is none."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal() and len(value) < 12:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
