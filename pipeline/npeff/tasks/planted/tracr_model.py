"""A transformer that Tracr compiled, as a torch module that needs neither tracr nor jax.

Source: Lindner et al., "Tracr: Compiled Transformers as a Laboratory for Interpretability", arXiv 2301.05062. The
transformer has no layer norm, no mask, and ReLU units. Every feature of the residual stream is a value of an expression
of the program, and has its name and value as a label.

A folder of an exported program contains two files:

    model.safetensors  the weights, under the names of the parameters of `TracrTransformer`; ``example_tokens`` (N, T),
                       int64, and ``example_rules`` (N, r), bool: the value of each rule on each example
    program.json       the fields of `Program`

`tracr_export.py` writes it.

Legend: B batch, T positions, d features of the residual stream, n heads, h features of a head.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from npeff.tasks.errors import TaskError

WEIGHTS_FILE, PROGRAM_FILE = "model.safetensors", "program.json"
EXAMPLE_TOKENS, EXAMPLE_RULES = "example_tokens", "example_rules"
START = "[start]"
"""Name of the token with which every sequence begins."""


@dataclass(frozen=True)
class Program:
    """What an exported program is, apart from its weights."""

    name: str
    vocabulary: tuple[str, ...]
    """Names of the tokens, in the order of their numbers."""
    max_length: int
    """Number of position embeddings."""
    n_layers: int
    n_heads: int
    head_features: int
    hidden_units: int
    residual_labels: tuple[str, ...]
    """Label of each feature of the residual stream, ``NAME`` or ``NAME:VALUE``."""
    outputs: tuple[str, ...]
    """Labels of the features that are the logits, in the order of the classes."""
    classes: tuple[str, ...]
    rules: tuple[str, ...]
    """Names of the rules. The features of a rule have labels that begin with ``RULE.``."""
    position: int
    """The position whose logits are the prediction."""

    @classmethod
    def read(cls, folder: Path) -> Program:
        """Read ``program.json``.

        Raises:
            TaskError: The file does not exist or does not have the fields of a program.
        """
        path = folder / PROGRAM_FILE
        remedy = "export the program again (docs/tasks.md)"
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError):
            raise TaskError(f"tracr-program: cannot read {path}: {remedy}") from None
        kinds = {field.name: {"str": str, "int": int}.get(str(field.type), list) for field in fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != kinds.keys():
            raise TaskError(f"tracr-program: {path} does not have the fields {', '.join(kinds)}: {remedy}")
        for name, kind in kinds.items():
            if not isinstance(stored[name], kind):
                raise TaskError(f"tracr-program: {name} in {path} is not a {kind.__name__}: {remedy}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        program = cls(**values)
        if len(program.outputs) != len(program.classes) or not set(program.outputs) <= set(program.residual_labels):
            raise TaskError(f"tracr-program: outputs in {path} are not one residual label for each class: {remedy}")
        return program

    def owners(self) -> list[int]:
        """Return the rule of each feature of the residual stream, or -1 for a feature of no rule."""
        return [
            next((rule for rule, name in enumerate(self.rules) if label.startswith(f"{name}.")), -1)
            for label in self.residual_labels
        ]


class _Layer(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        n_features, inner = len(program.residual_labels), program.n_heads * program.head_features
        self.n_heads = program.n_heads
        self.query, self.key, self.value = (nn.Linear(n_features, inner) for _ in range(3))
        self.output = nn.Linear(inner, n_features)
        self.mlp_in, self.mlp_out = (
            nn.Linear(n_features, program.hidden_units),
            nn.Linear(program.hidden_units, n_features),
        )

    def forward(self, x_BTd: Tensor) -> Tensor:
        q_BnTh, k_BnTh, v_BnTh = (
            layer(x_BTd).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights_BnTT = (q_BnTh @ k_BnTh.mT / math.sqrt(q_BnTh.shape[-1])).softmax(-1)
        x_BTd = x_BTd + self.output((weights_BnTT @ v_BnTh).transpose(1, 2).flatten(2))
        result: Tensor = x_BTd + self.mlp_out(functional.relu(self.mlp_in(x_BTd)))
        return result


class TracrTransformer(nn.Module):
    """Transformer from token numbers (B, T) to logits (B, C), which are features of the residual stream."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        n_features = len(program.residual_labels)
        self.tokens = nn.Embedding(len(program.vocabulary), n_features)
        self.positions = nn.Embedding(program.max_length, n_features)
        self.layers = nn.ModuleList(_Layer(program) for _ in range(program.n_layers))
        self._outputs = [program.residual_labels.index(label) for label in program.outputs]
        self._position = program.position

    def residual(self, tokens_BT: Tensor) -> Tensor:
        """Return the residual stream after the last layer (B, T, d)."""
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x_BTd: Tensor = self.tokens(tokens_BT) + self.positions(positions_BT)
        for layer in self.layers:
            x_BTd = layer(x_BTd)
        return x_BTd

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.residual(tokens_BT)[:, self._position, self._outputs]


def rule_masks(program: Program, model: TracrTransformer) -> dict[str, dict[str, Tensor]]:
    """Return the entries of the parameters that only one rule uses: rule name to parameter name to mask (bool).

    A head or a hidden unit belongs to a rule if it writes only to features of this rule. All its weights then belong to
    the rule. An entry of an embedding or of a bias of the residual stream belongs to the rule of its feature.
    """
    of_features = torch.tensor(program.owners())
    masks: dict[str, dict[str, Tensor]] = {name: {} for name in program.rules}

    def keep(name: str, shape: torch.Size, owners: Tensor) -> None:
        for rule, key in enumerate(program.rules):
            masks[key][name] = (owners == rule).expand(shape).clone()

    for table in ("tokens", "positions"):
        keep(f"{table}.weight", getattr(model, table).weight.shape, of_features)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, _Layer)
        of_heads = _writers(layer.output.weight, of_features, program.n_heads)
        of_units = _writers(layer.mlp_out.weight, of_features, program.hidden_units)
        for names, writer, owners in (
            (("query", "key", "value"), "output", of_heads),
            (("mlp_in",), "mlp_out", of_units),
        ):
            for name in names:
                linear = getattr(layer, name)
                keep(f"layers.{i}.{name}.weight", linear.weight.shape, owners[:, None])
                keep(f"layers.{i}.{name}.bias", linear.bias.shape, owners)
            keep(f"layers.{i}.{writer}.weight", getattr(layer, writer).weight.shape, owners)
            keep(f"layers.{i}.{writer}.bias", of_features.shape, of_features)
    return masks


def _writers(weight_do: Tensor, owners_d: Tensor, n_writers: int) -> Tensor:
    """Return the rule of each input of the layer with this weight, or -1; all inputs of a writer have the same one."""
    written_dw = weight_do.detach().unflatten(1, (n_writers, -1)).ne(0).any(2)
    owners = []
    for written_d in written_dw.T:
        rules = owners_d[written_d].unique()
        owners.append(int(rules[0]) if len(rules) == 1 else -1)
    return torch.tensor(owners).repeat_interleave(weight_do.shape[1] // n_writers)
