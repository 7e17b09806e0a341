"""A small language model of the docstrings of Python's standard library, over a vocabulary of pieces of words.

It is trained here, as that of `topics`. Docstrings of every fifth module are held out, and no docstring is in both
parts. An example is a held-out docstring of at least `LEAST` characters.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from methods_stage import topics
from methods_stage.topics import CONTEXT, PAD

VOCABULARY, LEAST = 1024, 200


def prepared(folder: Path) -> dict[str, Any]:
    """Train the model and write the examples, if the folder does not have them yet.

    The folder then contains ``model`` and ``texts.parquet`` with the columns ``id``, ``module`` and ``text``.

    Returns:
        Numbers of texts and tokens, the CPU time of the training in seconds, and the mean loss on the held-out texts in
        nats per token.
    """
    facts = folder / "facts.json"
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        facts.write_text(json.dumps(_prepare(folder), indent=2) + "\n")
    return dict(json.loads(facts.read_text()))


def docstrings() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the docstrings to train on and the held-out ones. A text of several places is that of the first one."""
    folder, seen = Path(sysconfig.get_paths()["stdlib"]), set[str]()
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for number, path in enumerate(sorted(folder.rglob("*.py"))):
        if {"site-packages", "test", "idlelib", "lib2to3"} & set(path.parts):
            continue
        module = path.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
        for line, text in _docstrings_of(path):
            if text not in seen:
                seen.add(text)
                parts[number % 5 == 0].append({"id": f"{module}:{line}", "module": module, "text": text})
    return parts


def _docstrings_of(path: Path) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.lineno, text


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, padding_side="right", model_max_length=CONTEXT
    )


def _prepare(folder: Path) -> dict[str, Any]:
    read, unread = docstrings()
    tokenizer = _tokenizer([row["text"] for row in read])
    separator = tokenizer.encode("\n\n")
    tokens = torch.tensor([token for row in read for token in (*tokenizer.encode(row["text"]), *separator)])
    model, began = topics.new_model(tokenizer), time.process_time()
    topics.train(model, tokens)
    seconds = time.process_time() - began
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [row for row in unread if len(row["text"]) >= LEAST]
    pq.write_table(pa.Table.from_pylist(rows), folder / "texts.parquet")
    windows = [ids for row in rows if len(ids := tokenizer.encode(row["text"])) >= CONTEXT]
    with torch.no_grad():
        held_out = torch.tensor([ids[:CONTEXT] for ids in windows])
        loss = model(input_ids=held_out, labels=held_out).loss.item()
    return {
        "texts": {"trained": len(read), "held_out": len(rows)},
        "tokens": len(tokens),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_cpu_s": seconds,
        "loss": loss,
    }
