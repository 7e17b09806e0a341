"""A task whose model is a RASP program that Tracr compiled (`tracr_model.py`), on the sequences that were exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from npeff.tasks.base import Examples, Inputs, Task, Token, placed_words
from npeff.tasks.embedded_tokens import TokenTable, token_inputs
from npeff.tasks.errors import TaskError
from npeff.tasks.planted.tracr_model import (
    EXAMPLE_RULES,
    EXAMPLE_TOKENS,
    START,
    WEIGHTS_FILE,
    Program,
    TracrTransformer,
    rule_masks,
)


class TracrProgramTask(Task):
    """A compiled program and its examples.

    The label of an example is the class that the model predicts, which is the output of the program. The table has a
    column ``rule_NAME`` for each rule (whether its value is true), ``strength_NAME`` (1 or 0), and ``n_rules``.

    Args:
        folder: Folder that `tracr_export.py` wrote.
        strength: Factor of the logits, which are about 1 for the output of the program and about 0 for other classes.
    """

    def __init__(self, folder: str, strength: float = 1.0) -> None:
        if not isinstance(strength, int | float) or not 0 < strength <= 100:
            raise TaskError(f"tracr-program: strength must be above 0 and at most 100, not {strength!r}")
        self._strength = strength
        self.program = Program.read(Path(folder))
        path = Path(folder) / WEIGHTS_FILE
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError):
            raise TaskError(f"tracr-program: cannot read {path}: export the program again (docs/tasks.md)") from None
        tokens_NT, rules_Nr = (arrays.pop(name, torch.zeros(0)) for name in (EXAMPLE_TOKENS, EXAMPLE_RULES))
        self._model = TracrTransformer(self.program).eval()
        problem = _mismatch(arrays, self._model) or _unusable(self.program, tokens_NT, rules_Nr)
        if problem:
            raise TaskError(f"tracr-program: {path} {problem}: export the program again (docs/tasks.md)")
        self._model.load_state_dict(arrays)
        with torch.no_grad():
            labels_N = self._model(tokens_NT).argmax(1)
        self._examples = _Sequences(self.program, tokens_NT, rules_Nr, labels_N)

    def rule_masks(self) -> dict[str, dict[str, Tensor]]:
        """Return the entries of the parameters that only one rule uses (`tracr_model.rule_masks`)."""
        return rule_masks(self.program, self._model)

    def model(self, cache: Path) -> nn.Module:
        return self._model

    def examples(self, cache: Path) -> Examples:
        return self._examples

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits_BC: Tensor = self._strength * model(batch)
        return logits_BC

    def inputs(self, model: nn.Module, batch: Tensor) -> Inputs:
        """Return the embeddings of the letters."""
        table = TokenTable(model.get_submodule("tokens"))
        starts = [number for number, name in enumerate(self.program.vocabulary) if name == START]
        segments_BT = -torch.isin(batch, torch.tensor(starts, device=batch.device)).long()
        logits = table.logits(batch, lambda: self.logits(model, batch))
        return token_inputs(table, batch, torch.ones_like(batch, dtype=torch.bool), segments_BT, logits)


def _mismatch(arrays: dict[str, Tensor], model: nn.Module) -> str | None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in arrays.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"does not fit the program in {wrong[0]}" if wrong else None


def _unusable(program: Program, tokens_NT: Tensor, rules_Nr: Tensor) -> str | None:
    if tokens_NT.dim() != 2 or tokens_NT.dtype != torch.int64 or not len(tokens_NT):
        return f"has no {EXAMPLE_TOKENS} of int64 (N, T)"
    if rules_Nr.shape != (len(tokens_NT), len(program.rules)) or rules_Nr.dtype != torch.bool:
        return f"has no {EXAMPLE_RULES} of bool (N, number of rules)"
    if not 0 <= program.position < tokens_NT.shape[1] <= program.max_length:
        return "has examples whose length does not fit the program"
    if int(tokens_NT.min()) < 0 or int(tokens_NT.max()) >= len(program.vocabulary):
        return "has tokens that are not in the vocabulary"
    return None


class _Sequences(Examples):
    def __init__(self, program: Program, tokens_NT: Tensor, rules_Nr: Tensor, labels_N: Tensor) -> None:
        self.class_names = program.classes
        self._program, self._tokens_NT, self._rules_Nr, self._labels_N = program, tokens_NT, rules_Nr, labels_N

    def __len__(self) -> int:
        return len(self._tokens_NT)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._tokens_NT[torch.as_tensor(indices, dtype=torch.int64)]

    def tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        return [placed_words(self._words(index)) for index in indices]

    def _words(self, index: int) -> list[str]:
        return [self._program.vocabulary[token] for token in self._tokens_NT[index].tolist()]

    def table(self) -> pa.Table:
        columns = {
            "id": pa.array([f"sequence-{i:05d}" for i in range(len(self))], pa.string()),
            "label": pa.array(self._labels_N.numpy(), pa.int64()),
            "text": pa.array([" ".join(self._words(i)) for i in range(len(self))], pa.string()),
        }
        for rule, name in enumerate(self._program.rules):
            columns[f"rule_{name}"] = pa.array(self._rules_Nr[:, rule].numpy())
        for rule, name in enumerate(self._program.rules):
            columns[f"strength_{name}"] = pa.array(self._rules_Nr[:, rule].double().numpy())
        return pa.table({**columns, "n_rules": pa.array(self._rules_Nr.sum(1).numpy(), pa.int64())})
