"""Models with quantized weights and an adapter: rows, tables of parameters, stages, edits and refusals."""

from __future__ import annotations

import importlib.util
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import npeff
import pytest
import torch
import yaml
from in_process import command
from npeff.fisher import PerExampleFishers
from npeff.gradients import LabelSpec, UnsupportedModelError, is_quantized, left_out, select_parameters
from npeff.models.sharding import _check_ordinary
from npeff.models.single_precision import in_single_precision
from npeff.runs.directory import RunDirectory
from npeff.sketches import SketchSpec, make_sketch
from npeff.stages.edited_model import update_of, write_edited_model
from npeff.stages.pipeline import stored_direction
from npeff.store.tables import read_table
from npeff.tasks import TaskError
from npeff.tasks.checks import check_task

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")
pytest.importorskip("peft", reason="needs pip install 'npeff-pipeline[hf]'")

import peft
import tiny
from npeff.tasks.huggingface import quantization
from npeff.tasks.huggingface.options import Quantization
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, **tiny.SIZE}
TEXTS = ["a small cat", "the dog sleeps and the cat sings", "a bird", "the tree is near the cat ?"]
KINDS = get_args(Quantization)


def needs(kind: str) -> Any:
    package = quantization._PACKAGES[kind]
    missing = importlib.util.find_spec(package) is None
    return pytest.param(
        kind, marks=pytest.mark.skipif(missing, reason=f"needs {package}: pip install 'npeff-pipeline[quantization]'")
    )


INSTALLED = [needs(kind) for kind in KINDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder and a classifier, each with a LoRA adapter, and a table."""
    folder = tmp_path_factory.mktemp("quantized")
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=32, **SMALL)
    decoder = tiny.save_model(folder / "decoder", AutoModelForCausalLM, config)
    tiny.save_tokenizer(folder / "decoder", "[CLS] $A")
    save_adapter(decoder, folder / "decoder-lora", ["q_proj", "down_proj"], "CAUSAL_LM")
    config = BertConfig(max_position_embeddings=32, num_labels=3, **SMALL)
    classifier = tiny.save_model(folder / "classifier", AutoModelForSequenceClassification, config)
    tiny.save_tokenizer(folder / "classifier", types=True)
    save_adapter(classifier, folder / "classifier-lora", ["query", "value"])
    tiny.write(folder / "data.parquet", {"text": TEXTS * 10, "label": [0, 1, 2, 0] * 10})
    return folder


def save_adapter(model: Any, folder: Path, layers: list[str], task_type: str | None = None, **options: Any) -> None:
    options = {"r": 2, "target_modules": layers, "init_lora_weights": False, **options}
    peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, **options)).save_pretrained(folder)


def load(folder: Path, kind: str | None, model: str = "classifier", **options: Any) -> tiny.Loaded:
    family, column = ("sequence-classification", "text_columns") if model == "classifier" else ("causal-lm", None)
    columns = {"text_columns": ["text"]} if column else {"text_column": "text", "examples": "positions"}
    given = {"adapter": str(folder / f"{model}-lora"), "quantization": kind, **columns, **options}
    return tiny.load(family, folder / model, folder / "data.parquet", **given)


@pytest.mark.parametrize("model", ["classifier", "decoder"])
@pytest.mark.parametrize("kind", INSTALLED)
def test_rows_are_those_of_autograd_through_the_quantized_layers(folder: Path, kind: str, model: str) -> None:
    """The definition: one example and one class at a time, in float32, by autograd through the same modules."""
    loaded = load(folder, kind, model)
    layout = select_parameters(loaded.model, ["*lora_*", "*orm*", "*query*.bias"] if model == "classifier" else ["*"])
    compute = PerExampleFishers(
        loaded.model,
        loaded.task.logits,
        layout,
        make_sketch(SketchSpec("identity"), layout, 0),
        LabelSpec("exact"),
        lambda index: (loaded.batch([index]), loaded.targets([index])),
    )
    few = [0, 1, 3]
    found = compute(loaded.batch(few), few, loaded.targets(few))
    compute.collector.check_independence(loaded.batch(few), few, loaded.targets(few))
    parameters = [dict(loaded.model.named_parameters())[name].requires_grad_() for name in layout.names]
    for row, index in enumerate(few):
        logits = loaded.task.logits(loaded.model, loaded.batch([index])).flatten(0, -2)[0]
        log_p = logits.log_softmax(0)
        rows = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in log_p]
        filled = [[torch.zeros_like(p) if g is None else g for g, p in zip(r, parameters, strict=True)] for r in rows]
        rows_CP = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in filled]).double()
        rows_CP = rows_CP * log_p.detach().double().exp().sqrt()[:, None]
        factor_RP, expected_PP = found.factors_BRD[row].double(), rows_CP.T @ rows_CP
        assert (factor_RP.T @ factor_RP - expected_PP).norm() < 2e-5 * expected_PP.norm()
        assert expected_PP.norm() > 1e-3


@pytest.mark.parametrize("kind", INSTALLED)
def test_quantized_weights_are_left_out_with_the_reason_and_change_the_logits_little(folder: Path, kind: str) -> None:
    loaded, whole = load(folder, kind, "decoder"), load(folder, None, "decoder")
    reasons = left_out(loaded.model, select_parameters(loaded.model))
    assert len(reasons) == 7, "the linear layers of one block"
    assert {why.reason for why in reasons.values()} == {"is quantized: a quantized weight has no gradient"}
    assert all(why.unsupported for why in reasons.values())
    assert not any(map(is_quantized, whole.model.parameters()))
    found, expected = loaded.logits([0, 1]), whole.logits([0, 1])
    assert 0 < (found - expected).norm() / expected.norm() < (0.5 if kind == "bitsandbytes-4bit" else 0.05)
    tiny.check_batches(loaded)
    with pytest.raises(UnsupportedModelError, match="cannot be divided among processes"):
        _check_ordinary(loaded.model)
    with pytest.raises(UnsupportedModelError, match=r"matches only parameters without a gradient: .*up_proj.* is quan"):
        select_parameters(loaded.model, ["*up_proj*"])


@pytest.mark.parametrize("kind", [kind for kind in INSTALLED if "4bit" in kind.values[0]])
def test_4_bit_weights_keep_the_form_that_has_gradients(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a processor with AVX512-BF16, a prediction would change the weights to a form without gradients."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    loaded = load(folder, kind, "decoder")
    layers = [module for module in loaded.model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 7
    assert not any(module.support_avx512bf16_for_cpu for module in layers)


def test_8_bit_numbers_are_quantized_weights_whatever_holds_them() -> None:
    assert is_quantized(torch.zeros(2, dtype=torch.int8))
    assert is_quantized(torch.zeros(2, dtype=torch.float8_e4m3fn))
    assert not is_quantized(torch.zeros(2, dtype=torch.bool))
    assert not is_quantized(torch.zeros(2, dtype=torch.bfloat16))
    jagged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    assert not is_quantized(jagged), "its offsets are integers, and its values are not"


def run_file(folder: Path, path: Path, kind: str, model: str = "decoder", **sections: Any) -> Path:
    columns = {"text_column": "text"} if model == "decoder" else {"text_columns": ["text"], "label_column": "label"}
    options = {"model": str(folder / model), "adapter": str(folder / f"{model}-lora"), "quantization": kind, **columns}
    options |= {"data": str(folder / "data.parquet"), "max_length": 16}
    task = {"decoder": "huggingface-causal-lm", "classifier": "huggingface-sequence-classification"}[model]
    content = {
        "run_dir": str(path / "run"),
        "task": {"name": task, "options": options},
        "parameters": {"include": ["*lora_*", "*norm*" if model == "decoder" else "*LayerNorm*"]},
        "fishers": {"labels": "sampled", "rank": 3, "sketch": {"dim": 32}},
        "factorization": {"n_components": 2, "max_iterations": 10, "stability_examples": 0},
        "verification": {"top_examples": 4, "baseline_examples": 8, "epsilon": 0.05},
        "executor": {"kind": "serial"},
    } | sections
    (path / "run.yaml").write_text(yaml.safe_dump(content))
    return path / "run.yaml"


@pytest.mark.parametrize("kind", INSTALLED[:1])
def test_a_run_from_its_file_to_the_report(folder: Path, tmp_path: Path, kind: str) -> None:
    file = run_file(folder, tmp_path, kind)
    assert command("validate", file) == 0
    assert command("run", file) == 0
    run = RunDirectory.open(tmp_path / "run")
    parameters = read_table(run.table("parameters"), "parameters").to_pylist()
    taken = {row["parameter"] for row in parameters if row["taken"]}
    assert taken
    assert all("lora_" in name or "norm" in name for name in taken)
    reasons = {row["parameter"]: row["reason"] for row in parameters if not row["taken"]}
    assert reasons["base_model.model.model.layers.0.self_attn.k_proj.weight"].startswith("is quantized")
    assert reasons["base_model.model.model.embed_tokens.weight"] == "matches nothing in parameters.include"
    assert run.report.exists()
    assert set(stored_direction(run, 0)) == taken


@pytest.mark.parametrize("kind", INSTALLED)
def test_an_edited_model_is_written_without_quantized_weights_and_read_again(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    run = RunDirectory.create(npeff.RunConfig.from_yaml(run_file(folder, tmp_path, kind)))
    loaded, edited = load(folder, kind, "decoder"), load(folder, kind, "decoder")
    before = {name: value.detach().clone() for name, value in edited.model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for name, value in edited.model.named_parameters():
            if name in before:
                value += 0.5
    write_edited_model(edited.model, run.repaired, "repair", {"edits": []})
    stored = load_file(run.repaired / "model.safetensors")
    assert before.keys() < stored.keys()
    assert not any(map(is_quantized, stored.values()))
    update = update_of(run, loaded.model, "repair")
    assert {name for name, value in update.items() if value.any()} == before.keys()
    assert all((update[name] - 0.5).abs().max() < 1e-6 for name in before)


@pytest.mark.parametrize("kind", INSTALLED[:1])
def test_a_step_of_the_adapter_and_its_export(
    folder: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = run_file(folder, tmp_path, kind, "classifier")
    assert command("fishers", file) == 0
    assert command("step", file, "--step-size", "0.1") == 0
    capfd.readouterr()
    assert command("export", tmp_path / "run", tmp_path / "out", "--what", "lora", "--edited", "step") == 2
    assert "has an adapter already" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", INSTALLED)
def test_input_gradients_in_half_precision_are_refused(folder: Path, kind: str) -> None:
    loaded = load(folder, kind, "decoder", dtype="bfloat16")
    with pytest.raises(UnsupportedModelError, match=r"quantized weights in half precision: set task\.options\.dtype"):
        in_single_precision(loaded.model)
    assert loaded.logits([0]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_refused_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    package = quantization._PACKAGES[kind]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else SimpleNamespace())
    with pytest.raises(TaskError) as caught:
        load(folder, kind)
    assert str(caught.value) == (
        f"quantization: {kind} needs the package {package}: pip install 'npeff-pipeline[quantization]'"
    )


@pytest.mark.parametrize("kind", INSTALLED[:1])
def test_other_refusals_are_one_line(folder: Path, tmp_path: Path, kind: str) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, bos_token_id=2, eos_token_id=3, **tiny.SIZE)
    tiny.save_model(tmp_path / "gpt2", AutoModelForCausalLM, config)
    tiny.save_tokenizer(tmp_path / "gpt2", "[CLS] $A")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "classifier")
    save_adapter(model, tmp_path / "dora", ["query"], use_dora=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "classifier")
    save_adapter(model, tmp_path / "own", ["query"], modules_to_save=["key"])
    (tmp_path / "decoder").symlink_to(folder / "decoder")
    for options, message in (
        ({"adapter": str(tmp_path / "dora")}, "has use_dora, which reads the weights of the model, on a model with"),
        ({"adapter": str(tmp_path / "own")}, "cannot load adapter|replaces a layer that is quantized"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            load(folder, kind, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(TaskError, match=r"quantizes no layer of .*, whose linear layers are not torch\.nn\.Linear"):
        tiny.load("causal-lm", tmp_path / "gpt2", folder / "data.parquet", text_column="text", quantization=kind)
    stored = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    options = load(folder, None).task.options  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match="are quantized already: remove quantization"):
        quantization.quantization_arguments(replace(options, quantization=kind), stored)


def test_the_option_is_checked_without_a_model() -> None:
    given = {"model": "m", "data": "d", "text_column": "t"}
    for kind in KINDS:
        check_task("huggingface-causal-lm", {**given, "quantization": kind}, files=False)
    with pytest.raises(TaskError, match="quantization must be one of torchao-int8, bitsandbytes-8bit, bitsandb"):
        check_task("huggingface-causal-lm", {**given, "quantization": "int2"}, files=False)


@pytest.mark.parametrize("kind", INSTALLED[:1])
def test_a_first_run_file_names_the_option(folder: Path, tmp_path: Path, kind: str) -> None:
    made = tmp_path / "new.yaml"
    data = str(folder / "data.parquet")
    assert command("init", "--model", str(folder / "decoder"), "--data", data, "--text", "text", "-o", made) == 0
    (line,) = (line for line in made.read_text().splitlines() if "quantization" in line)
    commented = re.sub(r"# (quantization: \S+).*", r"\1", line)
    made.write_text(made.read_text().replace(line, commented))
    assert npeff.RunConfig.from_yaml(made).task.options["quantization"] == kind


def test_log_lines_that_say_nothing_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    for logger, line in (
        ("torchao", "Failed to load /a/_C_mxfp8.so: Could not load this library"),
        ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported"),
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from torch.float32 to float16"),
    ):
        logging.getLogger(logger).warning(line)
        logging.getLogger(logger).warning("another line")
    assert [record.getMessage() for record in caplog.records] == ["another line"] * 3
