"""Adapters: every kind of the installed PEFT, on every task, against the same adapter loaded by PEFT alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.tasks import TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")
pytest.importorskip("peft", reason="needs pip install peft")

import peft
import tiny
import transformers
from npeff.tasks.huggingface.adapters import SUPPORTED
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, T5Config, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BERT = BertConfig(max_position_embeddings=32, num_labels=3, **SMALL, **tiny.SIZE)
LLAMA = LlamaConfig(num_key_value_heads=2, max_position_embeddings=32, **SMALL, **tiny.SIZE)
SPECIAL = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.END, "decoder_start_token_id": tiny.START}
T5 = T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, **SPECIAL, **tiny.SIZE)
COLUMNS = {
    "text": ["a small cat", "the dog sleeps and the cat sings"],
    "words": [["a", "small", "cat"], ["the", "dog", "sleeps", "and", "the", "cat", "sings"]],
    "target": ["the bird", "a tree"],
}


@dataclass(frozen=True)
class Family:
    """A task, its model and its options, and the layers that an adapter changes."""

    factory: str
    config: Any
    options: dict[str, Any]
    layers: tuple[str, str]
    task_type: str | None = None


FAMILIES = {
    "sequence-classification": Family(
        "AutoModelForSequenceClassification", BERT, {"text_columns": ["text"]}, ("query", "value"), "SEQ_CLS"
    ),
    "token-classification": Family(
        "AutoModelForTokenClassification",
        BERT,
        {"words_column": "words", "examples": "positions"},
        ("query", "value"),
        "TOKEN_CLS",
    ),
    "multiple-choice": Family(
        "AutoModelForMultipleChoice",
        BERT,
        {"prompt_column": "text", "choice_columns": ["text", "target"]},
        ("query", "value"),
    ),
    "image-classification": Family(
        "AutoModelForImageClassification",
        ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL),
        {"image_column": "image"},
        ("q_proj", "v_proj"),
    ),
    "causal-lm": Family(
        "AutoModelForCausalLM",
        LLAMA,
        {"text_column": "text", "examples": "positions"},
        ("q_proj", "v_proj"),
        "CAUSAL_LM",
    ),
    "seq2seq-lm": Family(
        "AutoModelForSeq2SeqLM",
        T5,
        {"source_column": "text", "target_column": "target"},
        ("q", "v"),
        "SEQ_2_SEQ_LM",
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_layers": 1, "adapter_len": 2},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [4, 6]},
    "VBLORA": {"vector_length": 8, "num_vectors": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 8},
}
"""Options that a kind needs for so small a model."""
KINDS = sorted(kind.value for kind in peft.PeftType)
CHANGE_LAYERS = [kind for kind in KINDS if kind in SUPPORTED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of each family, and a table for all tasks."""
    folder = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        tiny.save_model(folder / name, getattr(transformers, family.factory), family.config)
        if name == "image-classification":
            ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / name)
        else:
            template = "$A [SEP]" if name == "seq2seq-lm" else "[CLS] $A [SEP]"
            tiny.save_tokenizer(folder / name, template, types=family.config is BERT)
    images = [tiny.png(number) for number in range(2)]
    tiny.write(folder / "data.parquet", COLUMNS | {"image": images})
    return folder


def save_adapter(family: Family, model: Path, adapter: Path, kind: str, **options: Any) -> None:
    """Save an adapter whose weights are random, so that it changes the logits."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = OPTIONS.get(kind, {}) | options
    if "target_modules" in config_class.__dataclass_fields__ and kind not in ("ADAPTION_PROMPT", "TRAINABLE_TOKENS"):
        options.setdefault("target_modules", list(family.layers))
    torch.manual_seed(1)
    base = getattr(transformers, family.factory).from_pretrained(model)
    adapted = peft.get_peft_model(base, config_class(**{"task_type": family.task_type, **options}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(adapter)


def expected(model: Any, name: str, loaded: tiny.Loaded) -> list[torch.Tensor]:
    """The logits of each example, from a model that is called on one row without padding."""
    rows = [tiny.ids_of(text) for text in COLUMNS["text"]]
    ends = [[tiny.START, *row, tiny.END] for row in rows]
    found = []
    for row in range(2):
        if name == "image-classification":
            found.append(model(pixel_values=loaded.batch([row])["pixel_values"]).logits)
        elif name == "multiple-choice":
            choices = [tiny.ids_of(COLUMNS[column][row]) for column in ("text", "target")]
            pairs = [[*ends[row], *choice, tiny.END] for choice in choices]
            types = [[0] * len(ends[row]) + [1] * (len(choice) + 1) for choice in choices]
            one = [
                model(input_ids=torch.tensor([[pair]]), token_type_ids=torch.tensor([[kinds]])).logits
                for pair, kinds in zip(pairs, types, strict=True)
            ]
            found.append(torch.cat(one, dim=1))
        elif name == "seq2seq-lm":
            labels = torch.tensor([[*tiny.ids_of(COLUMNS["target"][row]), tiny.END]])
            found.append(
                model(
                    input_ids=torch.tensor([[*rows[row], tiny.END]]),
                    decoder_input_ids=torch.cat([torch.tensor([[tiny.START]]), labels[:, :-1]], dim=1),
                ).logits[0]
            )
        else:
            logits = model(input_ids=torch.tensor([ends[row]])).logits
            if name == "token-classification":
                first = [place for place, piece in enumerate(ends[row][1:-1], 1) if piece != tiny.token("##s")]
                found += list(logits[0, first][:, None])
            elif name == "causal-lm":
                found += list(logits[0, :-1][:, None])
            else:
                found.append(logits)
    return found


def combined(kind: str) -> list[str]:
    """The tasks whose tiny model PEFT combines with this kind of adapter."""
    if kind == "ADAPTION_PROMPT":  # for the attention of Llama and GPT-2 only
        return ["causal-lm"]
    if kind == "TRAINABLE_TOKENS":  # for embeddings of tokens only; the tagger's adapter needs a task type
        return ["sequence-classification", "causal-lm", "seq2seq-lm", "multiple-choice"]
    return list(FAMILIES)


COMBINATIONS = [(kind, name) for kind in CHANGE_LAYERS for name in combined(kind)]
QUICK = [("LORA", name) for name in FAMILIES] + [
    ("ADALORA", "seq2seq-lm"),
    ("ADAPTION_PROMPT", "causal-lm"),
    ("IA3", "token-classification"),
    ("TRAINABLE_TOKENS", "sequence-classification"),
]


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in COMBINATIONS],
)
def test_the_logits_with_an_adapter_are_those_of_peft(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    check_logits(name, kind, folder, tmp_path / "adapter")


def check_logits(name: str, kind: str, folder: Path, adapter: Path, **options: Any) -> None:
    family = FAMILIES[name]
    save_adapter(family, folder / name, adapter, kind, **options)
    loaded = tiny.load(name, folder / name, folder / "data.parquet", **family.options, adapter=str(adapter))
    base = getattr(transformers, family.factory).from_pretrained(folder / name).eval()
    with torch.no_grad():
        before = expected(base, name, loaded)
        after = expected(peft.PeftModel.from_pretrained(base, adapter).eval(), name, loaded)
    found = loaded.predictions(range(len(loaded.examples)))
    assert len(found) == len(after)
    for row, logits in zip(after, found, strict=True):
        torch.testing.assert_close(logits, row, rtol=1e-4, atol=1e-5)
    assert not all(torch.allclose(*pair, atol=1e-4) for pair in zip(before, after, strict=True)), "nothing to compare"


VARIANTS = [
    ("sequence-classification", {"bias": "all"}),  # whose file has the bias of the classifier twice
    ("causal-lm", {"use_dora": True, "use_rslora": True}),
    ("causal-lm", {"init_lora_weights": "pissa"}),
    ("causal-lm", {"layer_replication": [(0, 1), (0, 1)]}),
    ("seq2seq-lm", {"modules_to_save": ["shared"], "lora_bias": True}),
    ("causal-lm", {"trainable_token_indices": {"embed_tokens": [4, 6], "lm_head": [5]}}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_the_logits_with_a_variant_of_lora_are_those_of_peft(
    name: str, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    check_logits(name, "LORA", folder, tmp_path / "adapter", **options)


SHARING = ["ADAPTION_PROMPT", "LORA", "SHIRA", "TINYLORA", "VBLORA", "VERA"]
"""Kinds of which PEFT does not report some missing weights, and one of which it reports all."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SHARING else pytest.mark.slow) for kind in CHANGE_LAYERS]
)
def test_an_adapter_that_lacks_a_weight_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    save_adapter(FAMILIES["causal-lm"], folder / "causal-lm", tmp_path, kind)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    assert weights
    for lacking in weights if len(weights) > 1 else ():
        save_file({name: value for name, value in weights.items() if name != lacking}, file)
        check_refused(folder, "causal-lm", tmp_path, "use a complete adapter, and the model that it was trained on")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_setting_that_peft_would_ignore_is_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(FAMILIES["causal-lm"], folder / "causal-lm", tmp_path, "LORA")
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"new_scale": 7.0, "peft_version": "99.0"}))
    said = "has settings that the installed peft does not know, new_scale: install peft 99.0, or delete them from"
    check_refused(folder, "causal-lm", tmp_path, said)
    file.write_text(json.dumps(settings | {"new_scale": None, "use_new": False}))
    options = {**FAMILIES["causal-lm"].options, "adapter": str(tmp_path)}
    tiny.load("causal-lm", folder / "causal-lm", folder / "data.parquet", **options)


@pytest.mark.parametrize("files", ["the adapter only", "the model too"])
def test_a_model_that_is_or_contains_an_adapter_is_refused(files: str, folder: Path, tmp_path: Path) -> None:
    """The library would load the adapter without any of the checks."""
    save_adapter(FAMILIES["causal-lm"], folder / "causal-lm", tmp_path, "LORA")
    for file in (folder / "causal-lm").iterdir():
        if files == "the model too" or file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TaskError, match="contains a PEFT adapter: set model to the model without it, and adapter to"):
        tiny.load("causal-lm", tmp_path, folder / "data.parquet", **FAMILIES["causal-lm"].options)


VIRTUAL = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SUPPORTED])
def test_any_other_kind_is_refused_by_name(kind: str, folder: Path, tmp_path: Path) -> None:
    name = list(FAMILIES)[KINDS.index(kind) % len(FAMILIES)]
    options = {"num_virtual_tokens": 2} if kind in VIRTUAL - {"CPT"} else {}
    options |= {"cpt_token_ids": [4, 5], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]} if kind == "CPT" else {}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **options)
    config.save_pretrained(tmp_path)
    said = f"is of the kind {kind}, which {'puts virtual tokens in front of the text' if kind in VIRTUAL else ''}"
    check_refused(folder, name, tmp_path, said)


def test_a_kind_that_is_unknown_is_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "FUTURE"}))
    check_refused(folder, "causal-lm", tmp_path, "the installed peft does not know the kind 'FUTURE': use an adapter")
    monkeypatch.setattr("npeff.tasks.huggingface.adapters.SUPPORTED", ("IA3",))  # as if LoRA were new
    save_adapter(FAMILIES["causal-lm"], folder / "causal-lm", tmp_path / "lora", "LORA")
    said = "is of the kind LORA, which is not among those that were compared with PEFT: use an adapter"
    check_refused(folder, "causal-lm", tmp_path / "lora", said)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("LORA", {"alora_invocation_tokens": [4]}, "LORA with alora_invocation_tokens, which is active only after"),
        ("LORA", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4, which changes the model at"),
        ("PVERA", {"sample_at_inference": True}, "PVERA with sample_at_inference, which gives random logits"),
    ],
)
def test_an_option_of_a_kind_that_is_not_compared_is_refused(
    kind: str, options: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if config_class is None:
        pytest.skip(f"this version of PEFT has no {kind}")
    config_class(task_type="CAUSAL_LM", **options).save_pretrained(tmp_path)
    check_refused(folder, "causal-lm", tmp_path, said)


@pytest.mark.parametrize("larger", ["adapter", "model"])
def test_an_adapter_of_another_model_is_refused(larger: str, folder: Path, tmp_path: Path) -> None:
    """Of a model with fewer or more layers, of the same sizes."""
    family = FAMILIES["causal-lm"]
    config = LlamaConfig.from_dict(LLAMA.to_dict() | {"num_hidden_layers": 2})
    tiny.save_model(tmp_path / "deep", getattr(transformers, family.factory), config)
    tiny.save_tokenizer(tmp_path / "deep", "[CLS] $A [SEP]")
    deep, shallow = tmp_path / "deep", folder / "causal-lm"
    save_adapter(family, deep if larger == "adapter" else shallow, tmp_path / "adapter", "LORA")
    said = "the model has no place for the weights" if larger == "adapter" else "Found missing adapter keys"
    check_refused(folder, "causal-lm", tmp_path / "adapter", said, model=deep if larger == "model" else shallow)


def check_refused(folder: Path, name: str, adapter: Path, said: str, model: Path | None = None) -> None:
    options = {**FAMILIES[name].options, "adapter": str(adapter)}
    with pytest.raises(TaskError) as caught:
        tiny.load(name, model or folder / name, folder / "data.parquet", **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
