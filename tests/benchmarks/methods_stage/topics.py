"""A small character-level language model of the topic help of Python's standard library, trained here.

The text is that of `pydoc_data.topics`, which is part of every CPython and differs between versions of Python. Topics
are held out until they have 30% of the characters; the model is trained on the others. An example is one character of
the held-out topics, predicted from the 63 characters before it. Examples do not overlap. All sizes were set before the
first result, and those that concern the time were set by the time alone: the text is in lower case with 46 characters,
since `gradients` and `kmeans` need all C − 1 rows of C classes.

Legend: B windows of a batch, T characters of a window, V tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from npeff.runs.config import RunConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CONTEXT, CHARACTERS = 64, 46
HELD_OUT_SHARE, N_EXAMPLES = 0.3, 1500
STEPS, WARM_UP, WINDOWS, RATE, SEED = 1200, 50, 32, 3e-3, 0
PAD, UNKNOWN = "[PAD]", "[UNK]"


def prepared(folder: Path) -> dict[str, Any]:
    """Train the model and draw the examples, if the folder does not have them yet.

    The folder then contains ``model``, a folder that Hugging Face reads, and ``examples.parquet`` with the columns
    ``id``, ``topic``, ``prompt`` (63 characters) and ``text`` (the character that follows).

    Returns:
        Numbers of characters, parameters and examples, the CPU time of the training in seconds, and the mean losses in
        nats per character on the held-out topics: of the model, of the frequencies of the training text (``unigram``)
        and of equal probabilities (``uniform``).
    """
    facts = folder / "facts.json"
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = _prepare(folder)
        facts.write_text(json.dumps(found, indent=2) + "\n")
    return dict(json.loads(facts.read_text()))


def config(folder: Path) -> RunConfig:
    """Return the run of these examples: the weights and biases of all linear layers, no embeddings, no LayerNorm.

    The keys that are left out, such as the number of top examples, have their defaults, as for MiniLM.
    """
    options = {
        "model": str(folder.absolute() / "model"),
        "data": str(folder.absolute() / "examples.parquet"),
        "prompt_column": "prompt",
        "text_column": "text",
        "id_column": "id",
        "examples": "positions",
        "max_length": CONTEXT,
    }
    return RunConfig.model_validate(
        {
            "run_dir": str(folder),
            "task": {"name": "huggingface-causal-lm", "options": options},
            "parameters": {"include": ["transformer.h.*"], "exclude": ["*.ln_*"]},
            "fishers": {"sketch": {"kind": "tensorsketch", "dim": 2048}, "shard_size": 64},
            "factorization": {"n_components": 24},
        }
    )


def split_topics() -> tuple[dict[str, str], dict[str, str]]:
    """Return the topics to train on and the held-out ones, by name.

    A paragraph that several topics contain stays in the first of them by name, so that no paragraph is in both parts.
    """
    seen: set[str] = set()
    own: dict[str, str] = {}
    for name in sorted(topics):
        paragraphs = []
        for paragraph in topics[name].lower().split("\n\n"):
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                paragraphs.append(paragraph)
        own[name] = "\n\n".join(paragraphs)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(SEED)).tolist()
    names, held_out, count = list(own), set[str](), 0
    for index in order:
        if count >= HELD_OUT_SHARE * sum(map(len, own.values())):
            break
        held_out.add(names[index])
        count += len(own[names[index]])
    return {name: own[name] for name in names if name not in held_out}, {name: own[name] for name in sorted(held_out)}


def drawn_examples(held_out: dict[str, str]) -> pa.Table:
    """Return the examples: the last characters of windows of `CONTEXT` characters that do not overlap, drawn."""
    windows = [
        (name, start, text[start : start + CONTEXT])
        for name, text in held_out.items()
        for start in range(0, len(text) - CONTEXT + 1, CONTEXT)
    ]
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(SEED))[:N_EXAMPLES].sort().values
    drawn = [windows[index] for index in chosen.tolist()]
    return pa.table(
        {
            "id": [f"{name}-{start}" for name, start, _ in drawn],
            "topic": [name for name, _, _ in drawn],
            "prompt": [window[:-1] for _, _, window in drawn],
            "text": [window[-1] for _, _, window in drawn],
        }
    )


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters: the `CHARACTERS` most frequent ones of a text, ties by their order."""
    ordered = sorted(Counter(text).items(), key=lambda each: (-each[1], each[0]))
    tokens = [PAD, UNKNOWN, *(character for character, _ in islice(ordered, CHARACTERS))]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, padding_side="right", model_max_length=CONTEXT
    )


def _prepare(folder: Path) -> dict[str, Any]:
    trained, held_out = split_topics()
    tokenizer = tokenizer_of("".join(trained.values()))
    read, unread = (_ids(tokenizer, part) for part in (trained, held_out))
    model, began = new_model(tokenizer), time.process_time()
    train(model, torch.cat(read))
    seconds = time.process_time() - began
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    examples = drawn_examples(held_out)
    pq.write_table(examples, folder / "examples.parquet")
    return {
        "characters": {"trained": sum(map(len, read)), "held_out": sum(map(len, unread))},
        "topics": {"trained": len(trained), "held_out": len(held_out)},
        "tokens": len(tokenizer),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": len(examples),
        "training_cpu_s": seconds,
        "loss": _losses(model, torch.cat(read), unread),
    }


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Return a GPT-2 of two layers with initial weights for the vocabulary of a tokenizer."""
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _ids(tokenizer: PreTrainedTokenizerFast, part: dict[str, str]) -> list[Tensor]:
    return [torch.tensor(tokenizer.backend_tokenizer.encode(text).ids) for text in part.values() if text]


def train(model: nn.Module, text: Tensor) -> None:
    """Train with AdamW on windows drawn from a text, with a linear warm-up and a cosine decay to 0."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(text) - CONTEXT + 1, (WINDOWS, 1), generator=generator)
        batch_BT = text[starts + torch.arange(CONTEXT)]
        loss = model(input_ids=batch_BT, labels=batch_BT).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def _losses(model: nn.Module, trained: Tensor, unread: Sequence[Tensor]) -> dict[str, float]:
    """Return mean losses on windows of the held-out topics that do not overlap, without their first characters.

    The frequencies of ``unigram`` are of all training characters, with one more count of each token.
    """
    windows_BT = torch.cat([part[: len(part) // CONTEXT * CONTEXT].reshape(-1, CONTEXT) for part in unread])
    targets = windows_BT[:, 1:]
    loss = nn.functional.cross_entropy
    found = [
        float(loss(model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        for batch in windows_BT.split(256)
    ]
    size = model.get_input_embeddings().num_embeddings
    counts_V = torch.bincount(trained, minlength=size) + 1
    last = torch.cat([model(input_ids=batch[:, :-1]).logits[:, -1] for batch in windows_BT.split(256)])
    return {
        "model": sum(found) / targets.numel(),
        "model, characters of the examples": float(loss(last, windows_BT[:, -1])),
        "unigram": float(-(counts_V / counts_V.sum()).log()[targets].mean()),
        "uniform": math.log(size),
    }
