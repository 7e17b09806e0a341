"""A proposal of a task and its options for a model and data: which columns are texts, labels and ids.

Columns are recognized by their names and by the values of the first rows. Where two columns are possible, nothing is
proposed: the error names them and the option that chooses one. This module imports neither torch nor transformers,
unless the model is one of the hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa

from npeff.tasks.checks import ROWS
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.model_folder import KINDS, ModelFolder
from npeff.tasks.image_folders import IMAGE, SUFFIXES
from npeff.tasks.labels import class_numbers
from npeff.tasks.names import LANGUAGE_MODELS
from npeff.tasks.tables import TableOptions

_LABELS = ("label", "labels", "target", "class", "category", "gold_label", "gold")
_TEXTS = ("text", "sentence", "review", "content", "document", "tweet", "comment", "prompt")
_IDS = re.compile(r"(^|.*[_\s])(id|idx|uid|uuid|guid|index)$", re.IGNORECASE)
_PAIRS = (
    *(("premise", "hypothesis"), ("question", "context"), ("question", "answer"), ("query", "passage")),
    *(("query", "document"), ("text", "text_pair"), ("claim", "evidence")),
)
_PROMPTS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_SOURCES = (
    *(("source", "target"), ("document", "summary"), ("article", "highlights"), ("article", "summary")),
    *(("question", "answer"), ("input", "output"), ("text", "summary")),
)
_WORDS, _TAGS = ("words", "tokens", "sentence", "text"), ("tags", "ner_tags", "pos_tags", "labels", "label")
_NUMBERED = re.compile(r"(.*?)[_\s]?([12]|[AB]|[ab])$")
_GENERIC = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Columns:
    """Columns that the user has chosen; None where they are to be found."""

    text: Sequence[str] | None = None
    label: str | None = None
    label_names: Sequence[str] | None = None


@dataclass(frozen=True)
class Proposal:
    """A task for a model and data."""

    task: str
    options: dict[str, Any]
    """Keyword arguments of the task."""
    notes: dict[str, str]
    """Why an option has its value, or what it means, by the name of the option."""
    model: ModelFolder | None
    columns: Sequence[str]
    """All columns of the data."""


def propose(model: str | None, data: str, task: str | None, chosen: Columns, split: str | None = None) -> Proposal:
    """Propose a task.

    Args:
        model: Folder or hub id of the model; None for the task `sklearn-table`, which trains one.
        data: The option ``data`` of the task.
        task: Name of the task; recognized by the class of the model if None.
        chosen: Columns that are not to be recognized.
        split: The option ``split`` of the task.

    Raises:
        TaskError: The data cannot be read, the task is not known, or a column cannot be recognized. The message names
            the option that helps.
    """
    folder = None if model is None else _model(model)
    task = task or _task(model, folder)
    table = _head(data, split)
    options: dict[str, Any] = {} if model is None else {"model": model}
    options |= {"data": data} | ({} if split is None else {"split": split})
    finder = _Finder(data, table, chosen, folder)
    found, notes = finder.options(task)
    return Proposal(task, options | found, notes, folder, table.column_names)


def _model(model: str) -> ModelFolder:
    if (folder := ModelFolder.read(model)) is not None:
        return folder
    from npeff.tasks.huggingface.options import PretrainedOptions
    from npeff.tasks.huggingface.pretrained import model_config

    return ModelFolder(Path(model), model_config(PretrainedOptions(model=model, data="")).to_dict())


def _task(model: str | None, folder: ModelFolder | None) -> str:
    if folder is None:
        return "sklearn-table"
    if folder.task is None:
        known = ", ".join(dict.fromkeys(KINDS.values()))
        what = folder.architecture or "of an unknown class"
        raise TaskError(f"model {model!r} is {what}, for which no task is known: give --task, one of {known}")
    return folder.task


def _head(data: str, split: str | None) -> pa.Table:
    options = TableOptions(data=data, split=split)
    head = options.head(ROWS)
    table = options.read(()) if head is None else head
    if not len(table):
        raise TaskError(f"{data} has no rows: give data with at least one row")
    return table


class _Finder:
    """Recognizes the columns of a table."""

    def __init__(self, data: str, table: pa.Table, chosen: Columns, folder: ModelFolder | None) -> None:
        self._data, self._table, self._chosen = data, table, chosen
        self._names: list[str] = table.column_names
        self._classes = list(chosen.label_names or (folder.class_names if folder else None) or ())
        self._notes: dict[str, str] = {}

    def options(self, task: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the options of a task that name columns, and notes."""
        found: dict[str, Any]
        match task:
            case "huggingface-sequence-classification":
                labels = self._labels()
                found = {"text_columns": self._texts(2, _PAIRS, without=labels.values())} | labels
            case "huggingface-token-classification":
                found = {"words_column": self._named("--text", _WORDS), **self._optional("tags_column", _TAGS)}
            case "huggingface-image-classification":
                found = {"image_column": self._images(), **self._labels()}
            case "huggingface-causal-lm":
                texts = self._texts(2, _PROMPTS)
                found = dict(zip(("prompt_column", "text_column")[-len(texts) :], texts, strict=True))
            case "huggingface-seq2seq-lm":
                texts = self._texts(2, _SOURCES)
                if len(texts) < 2:
                    raise self._unknown("source and target", "--text twice, the source first")
                found = dict(zip(("source_column", "target_column"), texts, strict=True))
            case "sklearn-table":
                found = {"label_column": self._named("--label", _LABELS, self._chosen.label)}
            case _:
                raise TaskError(f"no options are proposed for task {task!r}: write a run file as in docs/tasks.md")
        if self._chosen.label_names is not None and task not in LANGUAGE_MODELS:
            found["label_names"] = list(self._chosen.label_names)
        return found | self._ids(), self._notes

    def _texts(self, most: int, pairs: Sequence[tuple[str, str]], without: Any = ()) -> list[str]:
        """Return the column of texts, or a pair of columns that belong together."""
        if self._chosen.text is not None:
            for name in self._chosen.text:
                self._check(name, "--text")
            if len(self._chosen.text) > most:
                raise TaskError(f"--text: at most {most} columns are possible: {', '.join(self._chosen.text)}")
            return list(self._chosen.text)
        possible = [name for name in self._names if name not in without and self._is_text(name)]
        for pair in pairs:
            if len(found := _called(pair, possible)) == len(pair):
                return found
        for first, second in combinations(possible, 2):
            if _are_numbered(first, second):
                return [first, second]
        named = _called(_TEXTS, possible)
        if len(possible) == 1 or named:
            return [(named or possible)[0]]
        raise self._unknown("texts", "--text COLUMN (twice for pairs of texts)", possible)

    def _is_text(self, name: str) -> bool:
        """Return whether most values of a column are texts of several words, and no path of a file."""
        if not pa.types.is_string(self._table[name].type) and not pa.types.is_large_string(self._table[name].type):
            return False
        values = [value for value in self._table[name].to_pylist() if value]
        return sum(" " in value.strip() for value in values) > len(values) / 2

    def _labels(self) -> dict[str, str]:
        """Return the option of the column whose values are classes of the model; empty if there is none."""
        if self._chosen.label is not None:
            self._check(self._chosen.label, "--label")
            self._check_classes(self._chosen.label)
            return {"label_column": self._chosen.label}
        if named := [name for name in self._names if name.lower() in _LABELS]:
            self._check_classes(named[0])
            return {"label_column": named[0]}
        fitting = [name for name in self._names if self._classes and self._fits(name) and not _IDS.match(name)]
        if len(fitting) > 1:
            raise self._unknown("labels", "--label COLUMN", fitting)
        if fitting:
            return {"label_column": fitting[0]}
        self._notes["text_columns"] = "no column has the classes of the model: accuracy and repair need label_column"
        return {}

    def _check_classes(self, name: str) -> None:
        """Refuse names of labels that the model does not have, where it has none of its own."""
        if self._fits(name) or not self._classes or not all(map(_GENERIC.fullmatch, self._classes)):
            return
        values = sorted({str(value) for value in self._table[name].to_pylist() if value is not None})
        raise TaskError(
            f"the model calls its classes {', '.join(self._classes[:3])}, and column {name!r} has "
            f"{', '.join(values[:5])}: give their names in the order of the logits, --label-names a,b"
        )

    def _fits(self, name: str) -> bool:
        values = self._table[name].to_pylist()
        if all(value is None for value in values):
            return False
        try:
            class_numbers(_as_numbers(values), self._classes, self._data, "numbers")
        except TaskError:
            return False
        return True

    def _images(self) -> str:
        if IMAGE in self._names:
            return IMAGE
        possible = [name for name in self._names if self._is_image(name)]
        if len(possible) != 1:
            raise TaskError(f"{self._data}: no column of images is recognized: rename it to {IMAGE}, or give a folder")
        return possible[0]

    def _is_image(self, name: str) -> bool:
        kind, values = self._table[name].type, self._table[name].to_pylist()
        if pa.types.is_binary(kind) or pa.types.is_struct(kind):
            return True
        return all(isinstance(value, str) and value.lower().endswith(SUFFIXES) for value in values)

    def _named(self, option: str, names: Sequence[str], chosen: str | None = None) -> str:
        if option == "--text" and self._chosen.text:
            chosen = self._chosen.text[0]
        if chosen is not None:
            self._check(chosen, option)
            return chosen
        if not (found := _called(names, self._names)):
            raise self._unknown("labels" if option == "--label" else "words", f"{option} COLUMN")
        return found[0]

    def _optional(self, option: str, names: Sequence[str]) -> dict[str, str]:
        if self._chosen.label is not None:
            self._check(self._chosen.label, "--label")
            return {option: self._chosen.label}
        found = _called(names, self._names)
        return {option: found[0]} if found else {}

    def _ids(self) -> dict[str, str]:
        for name in self._names:
            values = self._table[name].to_pylist()
            if _IDS.match(_separated(name)) and None not in values and len(set(map(str, values))) == len(values):
                return {"id_column": name}
        return {}

    def _check(self, name: str, option: str) -> None:
        if name not in self._names:
            raise TaskError(f"{option}: {self._data} has no column {name!r}: it has {', '.join(self._names)}")

    def _unknown(self, what: str, option: str, possible: Sequence[str] = ()) -> TaskError:
        several = f"several columns can be the {what}: {', '.join(possible)}"
        none = f"no column of {what} is recognized among {', '.join(self._names)}"
        return TaskError(f"{self._data}: {several if len(possible) > 1 else none}: give {option}")


def _called(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the columns with one of the names in any case, in the order of the names."""
    lower = {column.lower(): column for column in columns}
    return [lower[name] for name in names if name in lower]


def _are_numbered(first: str, second: str) -> bool:
    """Return whether two names differ in a last number or letter, such as sentence1 and sentence2."""
    one, other = _NUMBERED.fullmatch(first), _NUMBERED.fullmatch(second)
    return bool(
        one and other and one[1] and one[1] == other[1] and (one[2], other[2]) in (("1", "2"), ("A", "B"), ("a", "b"))
    )


def _as_numbers(values: Sequence[Any]) -> list[Any]:
    """Return texts of integers as integers, as the columns of labels of text files are read."""
    given = [value for value in values if value is not None and value != ""]
    if given and all(isinstance(value, str) and value.isdecimal() for value in given):
        return [int(value) if value else None for value in values]
    return [None if value == "" else value for value in values]


def _separated(name: str) -> str:
    """Return a name with its last word in capitals separated, such as pair_ID and exampleId."""
    return re.sub(r"(?<=[a-z])(?=Id$|ID$)", "_", name)
