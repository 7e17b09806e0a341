"""Compile a RASP program with Tracr, and write the folder that the task ``tracr-program`` reads.

    pip install 'npeff-pipeline[tracr]'
    python -m npeff.tasks.planted.tracr_export counts runs/tracr/counts --examples 1200 --seed 0

Only this module needs tracr and jax. `PROGRAMS` are two programs with four rules each, on sequences of eight letters
after a first token. Up to two rules vote for "left", and up to two for "right"; the class with more votes is the
output, or "stay" if they are equal. For another program, call `export`.

Legend: N examples, T positions.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tracr.compiler import compiling
from tracr.rasp import rasp

from npeff.tasks.planted.tracr_model import EXAMPLE_RULES, EXAMPLE_TOKENS, PROGRAM_FILE, START, WEIGHTS_FILE, Program

PAD = "[pad]"
LETTERS, LENGTH = tuple("abcde"), 8
_CLASSES = ("stay", "left", "right")
_POOL = 4
"""Sequences that are drawn for each example that is kept."""


@dataclass(frozen=True)
class Rasp:
    """A RASP program with its rules, which are boolean expressions with equal values at all positions.

    The names of all expressions of a rule begin with ``RULE.``, and those of other expressions do not.
    """

    output: Any
    """The expression that is compiled. It is categorical, with equal values at all positions."""
    rules: Mapping[str, Any]
    classes: Sequence[str]
    """The values of `output`, in the order of the logits."""


def _count(rule: str, token: str, part: str = "count") -> Any:
    selected = rasp.Select(rasp.tokens, rasp.tokens, lambda key, query: key == token)
    return rasp.SelectorWidth(selected).named(f"{rule}.{part}")


def _map(rule: str, part: str, function: Callable[[Any], Any], of: Any) -> Any:
    return rasp.categorical(rasp.Map(function, of).named(f"{rule}.{part}"))


def _at(rule: str, part: str, place: int, of: Any) -> Any:
    """Return the value of an expression at one position, at all positions."""
    selected = rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == place)
    return rasp.categorical(rasp.Aggregate(selected, of, default=None).named(f"{rule}.{part}"))


def _anywhere(rule: str, of: Any) -> Any:
    """Return whether a boolean expression is true at any position.

    The queries are tokens, which every position has: `of` may have no value at the first position.
    """
    selected = rasp.Select(of, rasp.tokens, lambda key, query: key is True)
    return _map(rule, "fires", lambda count: count > 0, rasp.SelectorWidth(selected).named(f"{rule}.width"))


def _after(rule: str, of: Any) -> Any:
    """Return the value of an expression one position before, or None at the first position."""
    selected = rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == query - 1)
    return rasp.categorical(rasp.Aggregate(selected, of, default=None).named(f"{rule}.before"))


def _pair(rule: str, part: str, function: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
    return rasp.categorical(rasp.SequenceMap(function, first, second).named(f"{rule}.{part}"))


def _voted(rules: Mapping[str, Any]) -> Rasp:
    """Let the first two rules vote for "left" and the other two for "right"."""
    one, two, three, four = rules.values()
    left = rasp.categorical(rasp.SequenceMap(lambda x, y: int(x) + int(y), one, two).named("votes_left"))
    right = rasp.categorical(rasp.SequenceMap(lambda x, y: int(x) + int(y), three, four).named("votes_right"))
    decided = rasp.SequenceMap(lambda x, y: _CLASSES[1 if x > y else 2 if y > x else 0], left, right)
    return Rasp(rasp.categorical(decided.named("decided")), rules, _CLASSES)


def counts() -> Rasp:
    """Rules that count: an a occurs; three b; more c than d; the first letter is e."""
    return _voted(
        {
            "a_occurs": _map("a_occurs", "fires", lambda n: n >= 1, _count("a_occurs", "a")),
            "three_b": _map("three_b", "fires", lambda n: n >= 3, _count("three_b", "b")),
            "more_c_than_d": _pair(
                "more_c_than_d",
                "fires",
                lambda c, d: c > d,
                _count("more_c_than_d", "c", "c"),
                _count("more_c_than_d", "d", "d"),
            ),
            "first_is_e": _at(
                "first_is_e", "fires", 0, _map("first_is_e", "is_e", lambda letter: letter == "e", rasp.tokens)
            ),
        }
    )


def order() -> Rasp:
    """Rules about places: b follows a; two equal letters in a row; the last letter is the first; the fourth is d, e."""
    b_after_a = _pair(
        "ab_occurs", "is_ab", lambda old, new: old == "a" and new == "b", _after("ab_occurs", rasp.tokens), rasp.tokens
    )
    again = _pair("repeats", "again", lambda old, new: old == new, _after("repeats", rasp.tokens), rasp.tokens)
    ends = [_at("closes", part, place, rasp.tokens) for part, place in (("first", 0), ("last", LENGTH - 1))]
    late = _map("fourth_is_late", "late", lambda letter: letter in ("d", "e"), rasp.tokens)
    return _voted(
        {
            "ab_occurs": _anywhere("ab_occurs", b_after_a),
            "repeats": _anywhere("repeats", again),
            "closes": _pair("closes", "fires", lambda first, last: first == last, *ends),
            "fourth_is_late": _at("fourth_is_late", "fires", 3, late),
        }
    )


PROGRAMS: dict[str, Callable[[], Rasp]] = {"counts": counts, "order": order}


def compiled(program: Rasp, letters: Sequence[str] = LETTERS, length: int = LENGTH) -> Any:
    """Compile a program to tracr's assembled model."""
    return compiling.compile_rasp_to_model(
        program.output, vocab=set(letters), max_seq_len=length, compiler_bos=START, compiler_pad=PAD
    )


def export(
    name: str,
    program: Rasp,
    sequences: Sequence[Sequence[str]],
    folder: Path,
    letters: Sequence[str] = LETTERS,
) -> None:
    """Compile a program and write it with its examples.

    Args:
        name: Name of the program.
        program: The program and its rules.
        sequences: N sequences of T - 1 letters. The first token is added.
        folder: Folder to write; its files are replaced.
        letters: The vocabulary.
    """
    model = compiled(program, letters, len(sequences[0]))
    encoder, config = model.input_encoder, model.model_config
    numbers = {str(token): number for token, number in encoder.encoding_map.items()}
    labels = tuple(str(label) for label in model.residual_labels)
    outputs = tuple(f"{program.output.label}:{value}" for value in program.classes)
    described = Program(
        name=name,
        vocabulary=tuple(sorted(numbers, key=numbers.__getitem__)),
        max_length=len(sequences[0]) + 1,
        n_layers=config.num_layers,
        n_heads=config.num_heads,
        head_features=config.key_size,
        hidden_units=config.mlp_hidden_size,
        residual_labels=labels,
        outputs=outputs,
        classes=tuple(str(value) for value in program.classes),
        rules=tuple(program.rules),
        position=1,
    )
    arrays = weights(model.params, config.num_layers)
    arrays[EXAMPLE_TOKENS] = torch.tensor([[numbers[START], *(numbers[t] for t in words)] for words in sequences])
    arrays[EXAMPLE_RULES] = torch.from_numpy(rule_values(program, sequences))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / f"{WEIGHTS_FILE}.partial")
    (folder / f"{PROGRAM_FILE}.partial").write_text(json.dumps(asdict(described), indent=2) + "\n")
    for file in (WEIGHTS_FILE, PROGRAM_FILE):
        os.replace(folder / f"{file}.partial", folder / file)


def weights(params: Mapping[str, Mapping[str, Any]], n_layers: int) -> dict[str, torch.Tensor]:
    """Return haiku's parameters under the names of `TracrTransformer`, with weights (outputs, inputs)."""
    modules = {"attn/query": "query", "attn/key": "key", "attn/value": "value", "attn/linear": "output"}
    modules |= {"mlp/linear_1": "mlp_in", "mlp/linear_2": "mlp_out"}

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float32))

    found = {
        "tokens.weight": tensor(params["token_embed"]["embeddings"]),
        "positions.weight": tensor(params["pos_embed"]["embeddings"]),
    }
    for layer in range(n_layers):
        for theirs, ours in modules.items():
            linear = params[f"transformer/layer_{layer}/{theirs}"]
            found[f"layers.{layer}.{ours}.weight"] = tensor(linear["w"]).T.contiguous()
            found[f"layers.{layer}.{ours}.bias"] = tensor(linear["b"])
    return found


def rule_values(program: Rasp, sequences: Sequence[Sequence[str]]) -> np.ndarray:
    """Evaluate the rules with RASP's own interpreter (N, number of rules)."""
    return np.array([[bool(rule(list(words))[0]) for rule in program.rules.values()] for words in sequences])


def draw(program: Rasp, n_examples: int, seed: int) -> list[list[str]]:
    """Draw distinct sequences, with as even a distribution of the number of active rules as a larger draw allows."""
    rng = np.random.default_rng(seed)
    drawn = {
        tuple(rng.choice(LETTERS, LENGTH, p=rng.dirichlet(np.ones(len(LETTERS))))) for _ in range(_POOL * n_examples)
    }
    pool = sorted(drawn)
    rng.shuffle(pool)
    counts_M = rule_values(program, pool).sum(1)
    kept: list[int] = []
    groups = sorted((np.flatnonzero(counts_M == count) for count in np.unique(counts_M)), key=len)
    for i, group in enumerate(groups):
        kept += group[: (n_examples - len(kept)) // (len(groups) - i)].tolist()
    rng.shuffle(kept)
    return [[str(letter) for letter in pool[i]] for i in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile a RASP program with Tracr for the task tracr-program.")
    parser.add_argument("program", choices=sorted(PROGRAMS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    program = PROGRAMS[arguments.program]()
    export(arguments.program, program, draw(program, arguments.examples, arguments.seed), arguments.folder)
    print(f"written to {arguments.folder}")


if __name__ == "__main__":
    main()
