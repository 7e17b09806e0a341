"""LoRA adapters: PEFT loads them, and the logits are those of the edited model to the stated error."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import command, refused
from npeff.interchange.export_lora import export_lora
from npeff.interchange.lora import lora_update, target_modules, tensors
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.edited_model import write_edited_model
from npeff.stages.pipeline import stored_direction
from safetensors.torch import save_file
from tasks import tiny
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'npeff-pipeline[hf]'")


@pytest.fixture
def run(lifted_run: RunDirectory) -> RunDirectory:
    return lifted_run


def base_model(run: RunDirectory) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(run.config.task.options["model"]).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[tiny.START, *(4 + (3 * i + j) % 9 for j in range(5)), tiny.END] for i in range(24)])
    with torch.no_grad():
        return model(ids).logits.double()


def stepped(run: RunDirectory, component: int, epsilon: float) -> Any:
    model = base_model(run)
    direction = stored_direction(run, component)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in direction:
                parameter += epsilon * torch.from_numpy(np.array(direction[name]))
    return model


def test_the_logits_of_the_adapter_are_those_of_the_edited_model_to_the_stated_error(
    run: RunDirectory, tmp_path: Path
) -> None:
    found = export_lora(run, tmp_path / "adapter", component=1, epsilon=0.5, rank=16)
    adapted = peft.PeftModel.from_pretrained(base_model(run), str(tmp_path / "adapter")).eval()
    before, edited = logits(base_model(run)), logits(stepped(run, 1, 0.5))
    relative = float((logits(adapted) - edited).norm() / (edited - before).norm())
    assert 0 < relative <= 2 * found.logits.relative  # on other texts of the same words
    assert found.update.truncation_error < 1e-6
    names = {name for name, _ in base_model(run).named_parameters()} - {each.parameter for each in found.update.layers}
    assert set(found.update.omitted) <= names
    assert found.update.error == pytest.approx(found.update.omitted_share)
    readme = (tmp_path / "adapter/README.md").read_text()
    assert f"| left out of the update (norm ÷ norm) | {found.update.error:.3g} |" in readme
    assert f"| error of the logits ÷ their change, on 24 examples | {found.logits.relative:.3g} |" in readme


def test_with_full_rank_and_linear_weights_only_nothing_is_left_out(run: RunDirectory, tmp_path: Path) -> None:
    edited = base_model(run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in edited.modules():
            if isinstance(module, nn.Linear):
                module.weight += 0.1 * torch.randn(module.weight.shape, generator=generator)
    write_edited_model(edited, run.repaired, "repair", {"edits": []})
    found = export_lora(run, tmp_path / "adapter", edited="repair", rank=24)
    adapted = peft.PeftModel.from_pretrained(base_model(run), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(adapted), logits(edited), atol=1e-5, rtol=0)
    assert found.update.error < 1e-6
    assert found.logits.largest < 1e-5
    assert found.update.omitted == {}
    less = export_lora(run, tmp_path / "less", edited="repair", error=0.3)
    assert less.update.rank < 16
    assert max(layer.error for layer in less.update.layers) <= 0.3
    assert less.update.error == pytest.approx(less.update.truncation_error)
    with_less = peft.PeftModel.from_pretrained(base_model(run), str(tmp_path / "less")).eval()
    before, after = logits(base_model(run)), logits(edited)
    assert float((logits(with_less) - after).norm() / (after - before).norm()) <= 2 * less.logits.relative


def test_the_error_is_the_part_of_the_update_that_the_factors_lack() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    torch.manual_seed(0)
    update = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in model.named_parameters()}
    found = lora_update(model, update, error=0.01, rank=2)
    made = {layer.parameter: layer.update.double() for layer in found.layers}
    lacking = [float((update[name] - made.get(name, torch.zeros(()))).norm()) for name in update]
    whole = [float(value.norm()) for value in update.values()]
    assert found.error == pytest.approx(np.linalg.norm(lacking) / np.linalg.norm(whole), rel=1e-5)
    smallest = lora_update(model, update, error=0.6, rank=None)
    below = lora_update(model, update, error=0.6, rank=smallest.rank - 1)
    assert max(layer.error for layer in smallest.layers) <= 0.6 < max(layer.error for layer in below.layers)


def test_layers_that_store_their_weight_transposed_and_shared_weights(tmp_path: Path) -> None:
    """GPT-2 has Conv1D layers, and its output layer shares its weight with the embedding."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=12, **tiny.SIZE)).eval()
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            if name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight")):
                parameter += 0.1 * torch.randn(parameter.shape)
    names = dict(model.named_parameters())
    update = {name: value.detach() - names[name].detach() for name, value in edited.named_parameters()}
    found = lora_update(model, update, error=0.0, rank=None)
    assert {layer.transposed for layer in found.layers} == {True}
    config = {"peft_type": "LORA", "r": found.rank, "lora_alpha": found.rank, "fan_in_fan_out": True,
              "target_modules": target_modules(model, found), "task_type": "CAUSAL_LM"}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors(found)), tmp_path / "adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    ids = torch.arange(10)[None]
    torch.testing.assert_close(adapted(ids).logits, edited(ids).logits, atol=1e-5, rtol=0)
    update["transformer.wte.weight"] = torch.ones(len(tiny.VOCABULARY), 16)
    shared = lora_update(model, update, error=0.1, rank=None)
    assert list(shared.omitted) == ["transformer.wte.weight"]


def test_a_layer_whose_name_ends_another_name_is_the_only_one_that_is_adapted() -> None:
    model = nn.ModuleDict({"out": nn.Linear(3, 3), "head": nn.ModuleDict({"out": nn.Linear(3, 3)})})
    found = lora_update(model, {"out.weight": torch.eye(3)}, error=0.1, rank=None)
    pattern = target_modules(model, found)
    assert isinstance(pattern, str)
    assert [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)] == ["out"]
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ConfigError, match="changes no weight of a linear layer"):
        lora_update(attention, {"a.out_proj.weight": torch.eye(4)}, error=0.1, rank=None)


def test_updates_that_an_adapter_cannot_express_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for update, said in (
        ({"1.weight": torch.ones(3)}, "changes no weight of a linear layer, only 1.weight"),
        ({"0.weight": torch.zeros(3, 3)}, "the update is zero"),
        ({"0.weight": torch.full((3, 3), float("nan"))}, "is not finite"),
    ):
        with pytest.raises(ConfigError, match=said):
            lora_update(model, update, error=0.1, rank=None)


def test_the_command_prints_the_errors_and_refuses_what_does_not_fit(
    run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = ("export", run.path, tmp_path / "a", "--what", "lora")
    assert command(*begin, "-c", "0", "--epsilon", "-0.3") == 0
    assert "relative error of the change of the logits" in capfd.readouterr().out
    assert "exists and is not an empty folder" in refused(capfd, *begin, "-c", "0", "--epsilon", "-0.3")
    other = ("export", run.path, tmp_path / "b", "--what", "lora")
    for options, said in (
        ((), "--what lora needs --component with --epsilon, or --edited"),
        (("-c", "0"), "--what lora needs --component with --epsilon, or --edited"),
        (("-c", "0", "--epsilon", "1", "--edited", "step"), "needs --component with --epsilon, or --edited"),
        (("-c", "0", "--epsilon", "1", "--rank", "1", "--error", "0.1"), "not both"),
        (("-c", "9", "--epsilon", "1"), "has no component 9"),
        (("-c", "0", "--epsilon", "0"), "a step of length 0 changes nothing"),
        (("--edited", "step"), "has no edited model of step: run `npeff step"),
    ):
        assert said in refused(capfd, *other, *options)
    assert not (tmp_path / "b").exists()


def test_an_edited_model_of_other_parameters_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    write_edited_model(nn.Linear(2, 2), run.stepped, "step", {})
    with pytest.raises(Exception, match="is not an edited model of this run"):
        export_lora(run, tmp_path / "a", edited="step")
    (run.stepped / "model.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match="has no edited model of step"):
        export_lora(run, tmp_path / "a", edited="step")
