"""Tiny Hugging Face models with random weights and tokenizers of a few words, saved to folders, and tasks on them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from npeff.tasks import Examples, Task, load_task, to_device
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WORDS = ["a", "the", "small", "cat", "dog", "bird", "tree", "sings", "sleep", "##s", "near", "and", "in", "is", "?"]
PAD, UNKNOWN, START, END = range(4)
VOCABULARY = {piece: number for number, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
SIZE = {"vocab_size": len(VOCABULARY)}


def token(word: str) -> int:
    return VOCABULARY[word]


def ids_of(text: str) -> list[int]:
    """The pieces of a text without special tokens."""
    return [token(piece) for piece in text.replace("sleeps", "sleep ##s").split()]


def png(seed: int, size: int = 8) -> bytes:
    """A square image of random pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def save_tokenizer(
    folder: Path, template: str = "[CLS] $A [SEP]", *, pad: bool = True, side: str = "right", types: bool = False
) -> None:
    """A WordPiece tokenizer of `WORDS`; "sleeps" is two tokens. `types`: it gives token types, as BERT's does."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1 [SEP]:1", special_tokens=[("[CLS]", START), ("[SEP]", END)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]" if pad else None,
        unk_token="[UNK]",
        eos_token="[SEP]",
        padding_side=side,
        model_input_names=names,
    ).save_pretrained(folder)


def save_model(folder: Path, factory: Any, config: Any) -> Any:
    """The model of a configuration, with weights large enough for its logits to differ; also returned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def write(path: Path, columns: dict[str, Any]) -> str:
    """A Parquet or JSON-lines file."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@dataclass(frozen=True)
class Loaded:
    """A task with its model and examples."""

    task: Task
    model: Any
    examples: Examples

    def logits(self, indices: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.task.logits(self.model, self.batch(indices))

    def targets(self, indices: Sequence[int]) -> Tensor | None:
        return self.task.targets(self.batch(indices))

    def batch(self, indices: Sequence[int]) -> Any:
        return to_device(self.examples.batch(indices), torch.device("cpu"))

    def column(self, name: str) -> list[Any]:
        return self.examples.table()[name].to_pylist()

    def lengths(self) -> list[int]:
        lengths = self.examples.lengths()
        assert lengths is not None
        return list(map(int, lengths))

    def predictions(self, indices: Sequence[int]) -> list[Tensor]:
        """Of each example of one batch, the logits (n, C) of its predictions; checks what `targets` says of them."""
        logits, targets = self.logits(indices), self.targets(indices)
        if targets is None:
            assert logits.dim() == 2
            return [row[None] for row in logits]
        assert targets.dtype == torch.int64
        assert targets.shape == logits.shape[:2]
        return [row[target != -100] for row, target in zip(logits, targets, strict=True)]


def load(family: str, model: Path, data: str | Path, **options: Any) -> Loaded:
    task = load_task(f"huggingface-{family}", {"model": str(model), "data": str(data), **options})
    return Loaded(task, task.model(Path("unused")), task.examples(Path("unused")))


def check_batches(loaded: Loaded) -> None:
    """The predictions of an example do not depend on what else is in its batch, nor on the order in it."""
    everything = range(len(loaded.examples))
    together, reversed_ = loaded.predictions(everything), loaded.predictions(everything[::-1])[::-1]
    for index in everything:
        for other in (loaded.predictions([index])[0], reversed_[index]):
            torch.testing.assert_close(together[index], other, rtol=1e-5, atol=1e-5)
    lengths = loaded.examples.lengths()
    assert lengths is None or len(lengths) == len(loaded.examples)
