"""AdamW and FAdam on text with equal tuning: a character model, and the head of MiniLM on pairs of sentences.

Legend: N examples, H hidden size.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_stage.topics import split_topics
from npeff.training import FAdam
from torch import Tensor, nn

from training_loops.digits import Part, losses, train
from training_loops.optimizers import DECAYS, RATES, Method, compared

READ, CHARACTERS, STEPS, BATCH, HELD_OUT = 16, 62, 250, 64, 2000
PAIRS = {"SICK_train.txt": 300, "SICK_trial.txt": 150, "SICK_test_annotated.txt": 300}
"""Pairs for training, validation and the test."""
PAIR_BATCH, PAIR_EPOCHS = 16, 5
PAIR_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def methods(other: type | None, rates: tuple[float, ...]) -> list[Method]:
    """The optimizers with the same 12 trials."""
    trials = [{"lr": lr, "weight_decay": decay} for lr, decay in itertools.product(rates, DECAYS)]

    def debiased(model: nn.Module, options: dict[str, float]) -> torch.optim.Optimizer:
        return FAdam(model.parameters(), debias_momentum=True, **options)

    found = [
        Method("AdamW", lambda model, o: torch.optim.AdamW(model.parameters(), **o), trials),
        Method("FAdam", lambda model, o: FAdam(model.parameters(), **o), trials),
        Method("FAdam, debiased momentum", debiased, trials),
    ]
    if other is not None:
        found.append(Method("FAdam of pytorch_optimizer", lambda model, o: other(model.parameters(), **o), trials))
    return found


def characters(other: type | None, folder: Path) -> dict[str, Any]:
    """Predict the next of 63 characters from 16, after 250 steps. The loss is in nats per character."""
    trained_topics, held_out = split_topics()
    training = "".join(trained_topics.values())
    common = [character for character, _ in Counter(training).most_common(CHARACTERS)]
    numbers = {character: number for number, character in enumerate(common)}

    def coded(text: str) -> Tensor:
        return torch.tensor([numbers.get(character, CHARACTERS) for character in text])

    def drawn(text: Tensor, count: int, seed: int) -> Part:
        starts = torch.randperm(len(text) - READ, generator=torch.Generator().manual_seed(seed))[:count]
        windows = text[starts[:, None] + torch.arange(READ + 1)]
        return Part(windows[:, :READ], windows[:, READ])

    names = list(held_out)  # topics of validation are no topics of the test
    validation, test = (coded("".join(held_out[name] for name in names[first::2])) for first in (0, 1))
    text = coded(training)

    def trained(method: Method, options: dict[str, float], seed: int, on: Part) -> Tensor:
        torch.manual_seed(seed)
        layers = (nn.Embedding(CHARACTERS + 1, 16), nn.Flatten(), nn.Linear(16 * READ, 128), nn.ReLU())
        model = nn.Sequential(*layers, nn.Linear(128, CHARACTERS + 1))
        optimizer, part = method.make(model, options), drawn(text, STEPS * BATCH, seed)
        return torch.stack(train(model, part, optimizer, 1, seed, BATCH, after_epoch=lambda: losses(model, on)))

    parts = drawn(validation, HELD_OUT, 0), drawn(test, HELD_OUT, 0)
    return compared(methods(other, RATES), trained, *parts, folder)


class Head(nn.Module):
    """The pooler of a BERT and a new classifier, on the last hidden state of the first token (N, H)."""

    def __init__(self, pooler: nn.Module, n_classes: int) -> None:
        super().__init__()
        self.dense, self.classifier = pooler.dense, nn.Linear(pooler.dense.in_features, n_classes)

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.tanh(self.dense(states)))
        return logits


def pairs_available() -> bool:
    """Whether the optional data are there."""
    return (Path(os.environ.get("NPEFF_SHARED_DATA", "")) / "models" / "minilm-sick").is_dir()


def pairs(other: type | None, folder: Path) -> dict[str, Any] | None:
    """Fine-tune the head of MiniLM to tell thirds of the relatedness of two sentences; None without the data.

    The encoder stays as it is, so that its states are computed once: otherwise, a step takes a hundred times as long.
    """
    if not pairs_available():
        print("skipped: NPEFF_SHARED_DATA has no models/minilm-sick")
        return None
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = Path(os.environ["NPEFF_SHARED_DATA"])
    path = data / "models" / "minilm-sick"
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    bert = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True).float().eval().bert
    edges = np.quantile([row[2] for row in _sick(data, "SICK_train.txt")], [1 / 3, 2 / 3])

    @torch.no_grad()
    def part(name: str) -> Part:
        rows = _sick(data, name)
        chosen = np.random.default_rng(0).permutation(len(rows))[: PAIRS[name]]
        states = [bert(**tokenizer(*rows[index][:2], return_tensors="pt")).last_hidden_state[0, 0] for index in chosen]
        return Part(torch.stack(states), torch.from_numpy(np.digitize([rows[index][2] for index in chosen], edges)))

    training, validation, test = map(part, PAIRS)
    weights = {name: value.clone() for name, value in bert.pooler.state_dict().items()}

    def trained(method: Method, options: dict[str, float], seed: int, on: Part) -> Tensor:
        bert.pooler.load_state_dict(weights)
        torch.manual_seed(seed)
        model = Head(bert.pooler, 3)
        optimizer = method.make(model, options)
        train(model, training, optimizer, PAIR_EPOCHS, seed, PAIR_BATCH)
        return losses(model, on)[None]

    return compared(methods(other, PAIR_RATES), trained, validation, test, folder)


def _sick(folder: Path, name: str) -> list[tuple[str, str, float]]:
    """The sentences and the relatedness (1 to 5) of the pairs of a file."""
    with (folder / "data" / "sick" / name).open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence_A"], row["sentence_B"], float(row["relatedness_score"])) for row in rows]
