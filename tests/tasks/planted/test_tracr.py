"""Programs that Tracr compiled: the module computes what tracr's transformer computes, and unusable files are refused.

Legend: N examples, T positions, d features.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.models.loaded import ModelSpec
from npeff.sketches import SketchSpec, make_sketch
from npeff.tasks import TaskError, load_task
from npeff.tasks.planted.tracr import TracrProgramTask
from npeff.tasks.planted.tracr_model import Program, TracrTransformer, rule_masks
from safetensors.torch import save_file

TINY = Program(
    name="tiny",
    vocabulary=("[start]", "a", "b"),
    max_length=5,
    n_layers=2,
    n_heads=2,
    head_features=3,
    hidden_units=4,
    residual_labels=("first.is_a_1:True", "first.is_a_1:False", "one", "second.n_2", "out_3:no", "out_3:yes"),
    outputs=("out_3:no", "out_3:yes"),
    classes=("no", "yes"),
    rules=("first", "second"),
    position=1,
)


def random_weights(program: Program) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: 0.4 * torch.randn_like(value) for name, value in TracrTransformer(program).state_dict().items()}


def written(folder: Path, program: Program = TINY, **changed: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(1)
    arrays = {
        **random_weights(TINY),
        "example_tokens": torch.randint(3, (6, 4), generator=generator),
        "example_rules": torch.randint(2, (6, 2), generator=generator).bool(),
        **changed,
    }
    save_file(arrays, folder / "model.safetensors")
    (folder / "program.json").write_text(json.dumps(asdict(program)))
    return folder


def reference(arrays: dict[str, np.ndarray], tokens_T: np.ndarray, program: Program) -> np.ndarray:
    """Tracr's transformer by its definition, in float64: the residual stream (T, d) of one sequence."""
    x_Td = arrays["tokens.weight"][tokens_T] + arrays["positions.weight"][: len(tokens_T)]
    for layer in range(program.n_layers):

        def linear(name: str, inputs: np.ndarray, layer: int = layer) -> np.ndarray:
            return inputs @ arrays[f"layers.{layer}.{name}.weight"].T + arrays[f"layers.{layer}.{name}.bias"]

        query, key, value = (linear(name, x_Td) for name in ("query", "key", "value"))
        attended = []
        for head in range(program.n_heads):
            part = slice(head * program.head_features, (head + 1) * program.head_features)
            raised_TT = np.exp(query[:, part] @ key[:, part].T / np.sqrt(program.head_features))
            attended.append(raised_TT / raised_TT.sum(1, keepdims=True) @ value[:, part])
        x_Td = x_Td + linear("output", np.concatenate(attended, 1))
        x_Td = x_Td + linear("mlp_out", np.maximum(linear("mlp_in", x_Td), 0))
    return x_Td


def test_the_module_computes_the_definition_in_float64(tmp_path: Path) -> None:
    task = load_task("tracr-program", {"folder": str(written(tmp_path)), "strength": 2.0})
    model, tokens_NT = task.model(tmp_path).double(), task.examples(tmp_path).batch(range(6))
    arrays = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected = np.stack([reference(arrays, tokens_T, TINY) for tokens_T in tokens_NT.numpy()])
    assert isinstance(model, TracrTransformer)
    with torch.no_grad():
        torch.testing.assert_close(model.residual(tokens_NT), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(task.logits(model, tokens_NT), 2 * torch.from_numpy(expected)[:, 1, 4:])


def test_the_table_describes_the_examples(tmp_path: Path) -> None:
    task = load_task("tracr-program", {"folder": str(written(tmp_path))})
    examples, model = task.examples(tmp_path), task.model(tmp_path)
    table = examples.table()
    tokens_NT = examples.batch(range(6))
    words = [[TINY.vocabulary[token] for token in row] for row in tokens_NT.tolist()]
    assert [text.split() for text in table["text"].to_pylist()] == words
    assert [[token.text for token in row] for row in examples.tokens([2, 0]) or []] == [words[2], words[0]]
    with torch.no_grad():
        assert table["label"].to_pylist() == task.logits(model, tokens_NT).argmax(1).tolist()
    rules = np.stack([table[f"rule_{name}"].to_numpy(zero_copy_only=False) for name in TINY.rules], 1)
    assert (rules.sum(1) == table["n_rules"].to_numpy()).all()
    assert (rules == np.stack([table[f"strength_{name}"].to_numpy() for name in TINY.rules], 1)).all()


def test_a_unit_belongs_to_a_rule_if_it_writes_to_features_of_this_rule_only() -> None:
    model = TracrTransformer(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        layer = model.get_submodule("layers.0")
        layer.mlp_out.weight[0, 0] = layer.mlp_out.weight[1, 0] = 1.0  # unit 0: the first rule
        layer.mlp_out.weight[3, 1] = 1.0  # unit 1: the second rule
        layer.mlp_out.weight[3, 2] = layer.mlp_out.weight[0, 2] = 1.0  # unit 2: both; unit 3 is not used
        layer.output.weight[3, 4] = 1.0  # head 1: the second rule
    masks = rule_masks(TINY, model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for mask in masks.values():
        assert {name: value.shape for name, value in mask.items()} == shapes
    first, second = masks["first"], masks["second"]
    assert first["layers.0.mlp_in.bias"].tolist() == [True, False, False, False]
    assert second["layers.0.mlp_in.weight"].any(1).tolist() == [False, True, False, False]
    assert second["layers.0.mlp_out.weight"].all(0).tolist() == [False, True, False, False]
    assert second["layers.0.query.bias"].tolist() == [False] * 3 + [True] * 3
    assert not first["layers.0.query.weight"].any()
    assert first["tokens.weight"].all(0).tolist() == [True, True, False, False, False, False]
    assert second["layers.1.mlp_out.bias"].tolist() == [False, False, False, True, False, False]


def test_the_fishers_of_a_compiled_program_agree_with_autograd(tmp_path: Path) -> None:
    """Weights of attention and of embeddings of repeated tokens, in a module of a user's kind."""
    task = load_task("tracr-program", {"folder": str(written(tmp_path))})
    model, batch = task.model(tmp_path).double(), task.examples(tmp_path).batch(range(6))
    layout = select_parameters(model)
    fishers = PerExampleFishers(model, task.logits, layout, make_sketch(SketchSpec("identity"), layout, 0))
    factors_NRP = fishers(batch).factors_BRD
    for i in range(6):
        logits_C = task.logits(model, batch[i : i + 1])[0]
        parameters = dict(model.named_parameters())
        wanted = [parameters[name] for name in layout.names]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(logit, wanted, retain_graph=True)])
            for logit in logits_C
        ]
        jacobian_CP, p_C = torch.stack(rows), logits_C.softmax(0)
        fisher_PP = jacobian_CP.T @ (p_C.diag() - p_C.outer(p_C)) @ jacobian_CP
        torch.testing.assert_close(factors_NRP[i].T @ factors_NRP[i], fisher_PP, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("program", "arrays", "said"),
    [
        (replace(TINY, outputs=("out_3:no", "other")), {}, "outputs in"),
        (replace(TINY, hidden_units=5), {}, "does not fit the program in layers.0.mlp_in.bias"),
        (replace(TINY, n_layers=1), {}, "does not fit the program in layers.1."),
        (replace(TINY, position=4), {}, "length does not fit"),
        (TINY, {"example_tokens": torch.full((6, 4), 3)}, "tokens that are not in the vocabulary"),
        (TINY, {"example_rules": torch.ones(6, 3, dtype=torch.bool)}, "has no example_rules"),
        (TINY, {"example_tokens": torch.zeros(6, 4)}, "has no example_tokens"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    program: Program, arrays: dict[str, torch.Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError) as caught:
        TracrProgramTask(str(written(tmp_path, program, **arrays)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"name": "tiny"}', json.dumps({**asdict(TINY), "n_heads": "two"})])
def test_an_unreadable_program_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "program.json").write_text(text)
    with pytest.raises(TaskError, match="export the program again"):
        TracrProgramTask(str(tmp_path))


def test_missing_files_and_bad_options_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"cannot read .*program.json"):
        TracrProgramTask(str(tmp_path))
    written(tmp_path)
    with pytest.raises(TaskError, match="strength must be above 0"):
        TracrProgramTask(str(tmp_path), strength=0)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TaskError, match=r"cannot read .*model.safetensors"):
        TracrProgramTask(str(tmp_path))


@pytest.mark.parametrize("name", ["counts", "order"])
def test_an_exported_program_computes_what_tracr_computes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tracr", reason="tracr is not installed: pip install 'npeff-pipeline[tracr]'")
    from npeff.tasks.planted import tracr_export

    program = tracr_export.PROGRAMS[name]()
    sequences = tracr_export.draw(program, 40, 0)
    tracr_export.export(name, program, sequences, tmp_path)
    task = TracrProgramTask(str(tmp_path))
    model, table = task.model(tmp_path), task.examples(tmp_path).table()
    theirs = tracr_export.compiled(program)
    assert isinstance(model, TracrTransformer)
    for i, words in enumerate(sequences):
        output = theirs.apply([tracr_export.START, *words])
        with torch.no_grad():
            residual_Td = model.residual(task.examples(tmp_path).batch([i]))[0]
        np.testing.assert_allclose(residual_Td, np.asarray(output.transformer_output[0]), rtol=1e-5, atol=1e-5)
        decided = task.program.classes[table["label"][i].as_py()]
        assert decided == output.decoded[1] == program.output(words)[0]
        for rule, values in program.rules.items():
            assert table[f"rule_{rule}"][i].as_py() == bool(values(words)[0])


def test_the_inputs_are_the_embeddings_of_the_letters(tmp_path: Path) -> None:
    loaded = ModelSpec("tracr-program", {"folder": str(written(tmp_path))}, tmp_path, ("*",), (), "cpu").load()
    loaded.check_inputs(range(6))
    tokens_BT = loaded.batch(range(6))
    inputs = loaded.inputs(tokens_BT, 6)
    assert inputs.mask is not None
    assert torch.equal(inputs.mask, tokens_BT != TINY.vocabulary.index("[start]"))
    assert torch.equal(inputs.values, loaded.model.get_parameter("tokens.weight")[tokens_BT])
