"""Sequence classification with a Hugging Face model, on a table of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.tasks.base import Examples, Task, TaskError

_READERS = {
    ".parquet": pyarrow.parquet.read_table,
    ".jsonl": pyarrow.json.read_json,
    ".csv": pyarrow.csv.read_csv,
    ".tsv": lambda path: _read_tab_separated(path),
    ".txt": lambda path: _read_tab_separated(path),
}


class SequenceClassificationTask(Task):
    """``AutoModelForSequenceClassification`` on a Parquet, CSV, TSV or JSON-lines file.

    Args:
        model: hub id or local folder of the model and its tokenizer.
        data: the table, one row per example.
        text_columns: one column of texts, or two for pairs.
        label_column: column of labels, as class numbers or names; None where there are none.
        label_names: names of the classes in the order of the logits; the model's ``id2label`` unless given. Labels are
            compared with them without regard to case.
        id_column: column of the examples' ids; row numbers unless given.
        max_length: tokens after which a text is cut.
        limit: use only the first ``limit`` rows.
        revision: of the model on the hub.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(
        self,
        model: str,
        data: str,
        text_columns: Sequence[str],
        label_column: str | None = None,
        label_names: Sequence[str] | None = None,
        id_column: str | None = None,
        max_length: int = 128,
        limit: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not 1 <= len(text_columns) <= 2 or isinstance(text_columns, str):
            raise TaskError("text_columns must be a list of one column, or of two for pairs of texts")
        if max_length < 1:
            raise TaskError(f"max_length must be at least 1, not {max_length}")
        if limit is not None and limit < 0:
            raise TaskError(f"limit must not be negative, not {limit}")
        self._hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._model, self._data = model, Path(data)
        self._text_columns, self._label_column, self._id_column = tuple(text_columns), label_column, id_column
        self._label_names, self._max_length, self._limit = label_names, max_length, limit

    def model(self, cache: Path) -> nn.Module:
        return self._from_hub(AutoModelForSequenceClassification, dtype=torch.float32).eval()

    def examples(self, cache: Path) -> Examples:
        tokenizer = self._from_hub(AutoTokenizer)
        names = self._label_names or self._class_names()
        return _TextTable(self._read(names), self._text_columns, tokenizer, self._max_length, names)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**batch).logits
        return logits

    def _from_hub(self, factory: Any, **options: Any) -> Any:
        try:
            return factory.from_pretrained(self._model, **self._hub, **options)
        except (OSError, ValueError) as error:
            raise TaskError(f"cannot load {self._model!r}: {' '.join(str(error).split())[:300]}") from None

    def _class_names(self) -> Sequence[str]:
        from transformers import AutoConfig

        return [name for _, name in sorted(self._from_hub(AutoConfig).id2label.items())]

    def _read(self, class_names: Sequence[str]) -> pa.Table:
        """The data file with columns ``id``, ``label`` and the columns it came with."""
        try:
            table = _READERS[self._data.suffix](self._data)
        except KeyError:
            raise TaskError(f"cannot read {self._data}: use a file ending in {', '.join(_READERS)}") from None
        except (OSError, pa.ArrowException) as error:
            raise TaskError(f"cannot read {self._data}: {' '.join(str(error).split())[:300]}") from None
        table = table.slice(0, self._limit) if self._limit is not None else table
        wanted = [*self._text_columns, *filter(None, (self._label_column, self._id_column))]
        for column in wanted:
            if column not in table.column_names:
                raise TaskError(f"{self._data} has no column {column!r}: it has {', '.join(table.column_names)}")
        ids = table[self._id_column] if self._id_column else pa.array(range(len(table)))
        labels = self._labels(table[self._label_column], class_names) if self._label_column else [None] * len(table)
        taken = {"id": ids.cast(pa.string()), "label": pa.array(labels, pa.int64())}
        others = {name: table[name] for name in table.column_names if name not in (*taken, self._label_column)}
        return pa.table({**taken, **others})

    def _labels(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> list[int | None]:
        if pa.types.is_integer(column.type):
            numbers = column.to_pylist()
        else:
            known = {str(name).lower(): number for number, name in enumerate(class_names)}
            numbers = []
            for label in column.to_pylist():
                if label is not None and str(label).lower() not in known:
                    raise TaskError(f"{self._data}: label {label!r} is none of {', '.join(known)}: give label_names")
                numbers.append(None if label is None else known[str(label).lower()])
        outside = [number for number in numbers if number is not None and not 0 <= number < len(class_names)]
        if outside:
            raise TaskError(f"{self._data}: label {outside[0]} is not one of the model's {len(class_names)} classes")
        return numbers


class _TextTable(Examples):
    def __init__(
        self, table: pa.Table, text_columns: Sequence[str], tokenizer: Any, max_length: int, class_names: Sequence[str]
    ) -> None:
        self.class_names = tuple(str(name) for name in class_names)
        self._table, self._text_columns = table, text_columns
        self._texts = [pc.fill_null(table[name].cast(pa.string()), "").to_pylist() for name in text_columns]
        self._tokenizer, self._max_length = tokenizer, max_length

    def __len__(self) -> int:
        return len(self._table)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        texts = [[column[index] for index in indices] for column in self._texts]
        encoded = self._tokenizer(
            *texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        return dict(encoded)

    def table(self) -> pa.Table:
        text = ["\n".join(parts) for parts in zip(*self._texts, strict=True)]
        others = [name for name in self._table.column_names if name not in ("text", "image", *self._text_columns)]
        return self._table.select(others).append_column("text", pa.array(text, pa.string()))


def _read_tab_separated(path: Path) -> pa.Table:
    return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False))
