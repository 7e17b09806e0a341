"""Every built-in Hugging Face task through the whole pipeline: tiny models, every kind of labels, the identity sketch.

What a run stores is compared with a direct computation: one example at a time, without padding, by plain autograd, from
the definition of its labels. Legend: T predictions of an example, C classes, R rows, P parameters.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from npeff.runs.directory import RunDirectory
from npeff.storage.checksums import read_json
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from npeff.tasks import IGNORED
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import transformers
from tasks import tiny
from transformers import BertConfig, GPT2Config, GptOssConfig, MixtralConfig, T5Config, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

N_ROWS, N_COMPONENTS, SEED, CHECKED = 12, 2, 5, (0, 3, 7)
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
BERT = {"max_position_embeddings": 24, **SMALL, **tiny.SIZE}
GPT2 = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=24, bos_token_id=2, eos_token_id=3, **tiny.SIZE)
T5 = T5Config(
    d_model=8,
    d_ff=12,
    d_kv=4,
    num_layers=1,
    num_heads=2,
    pad_token_id=tiny.PAD,
    eos_token_id=tiny.END,
    decoder_start_token_id=tiny.START,
    **tiny.SIZE,
)


def named(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def rows() -> dict[str, list[Any]]:
    """One table for all tasks: random sentences in which each word is one token, tags, choices and images."""
    generator = np.random.default_rng(0)
    words = [word for word in tiny.WORDS if word != "##s"]
    sentences = [generator.choice(words, size).tolist() for size in generator.integers(2, 7, N_ROWS)]
    columns: dict[str, list[Any]] = {
        "key": [f"row-{number}" for number in range(N_ROWS)],
        "text": [" ".join(sentence) for sentence in sentences],
        "words": sentences,
        "tags": [generator.integers(0, 4, len(sentence)).tolist() for sentence in sentences],
        "class": generator.integers(0, 2, N_ROWS).tolist(),
        "kind": [f"kind-{number % 3}" for number in range(N_ROWS)],
    }
    for name in ("A", "B", "C"):
        columns[name] = [" ".join(generator.choice(words, size)) for size in generator.integers(1, 4, N_ROWS)]
    columns["image"] = []
    for pixels in generator.integers(0, 255, (N_ROWS, 8, 8, 3), np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        columns["image"].append(file.getvalue())
    return columns


ROWS = rows()


@dataclass(frozen=True)
class Family:
    """A task, its model, its labels, and what a user knows of its examples."""

    task: str
    factory: str
    config: Any
    options: dict[str, Any]
    rank: int
    """Rows of every example's factor."""
    labels: dict[str, Any] = field(default_factory=lambda: {"labels": "exact"})
    template: str = "[CLS] $A [SEP]"
    include: str = "*"
    adapter: bool = False
    positions: Callable[[int], range] | None = None
    """Numbers of a row's predictions, given its number of words, where each is an example."""

    def ids(self) -> list[str]:
        if self.positions is None:
            return ROWS["key"]
        chosen = list(zip(ROWS["key"], ROWS["words"], strict=True))[: self.options["limit"]]
        return [f"{key}:{number}" for key, words in chosen for number in self.positions(len(words))]


CLASSIFY = "sequence-classification", "AutoModelForSequenceClassification"
SEQUENCE = {"text_columns": ["text", "A"], "label_column": "class"}
TOKENS = {"words_column": "words", "tags_column": "tags"}
POSITIONS = {"examples": "positions", "limit": 4}
TAGGER = BertConfig(**BERT, **named("a", "b", "c", "d"))
DECODER = {"num_key_value_heads": 1, "head_dim": 4, "num_local_experts": 3, "num_experts_per_tok": 2}
THREE = named("no", "yes", "neither")
MIXTRAL = MixtralConfig(pad_token_id=tiny.PAD, **SMALL, **DECODER, **tiny.SIZE, **THREE)
GPT_OSS = GptOssConfig(pad_token_id=tiny.PAD, eos_token_id=tiny.END, **SMALL, **DECODER, **tiny.SIZE, **THREE)
CLASSIFIER = BertConfig(**BERT, **THREE)
SAMPLED = {"labels": "sampled", "rank": 2}
FAMILIES = {
    "sequence classification": Family(*CLASSIFY, CLASSIFIER, SEQUENCE, rank=2),
    "mixture of experts": Family(*CLASSIFY, MIXTRAL, SEQUENCE, rank=2),
    "mixture of experts, transposed": Family(*CLASSIFY, GPT_OSS, SEQUENCE, rank=2),
    "adapter": Family(
        "sequence-classification",
        "AutoModelForSequenceClassification",
        CLASSIFIER,
        SEQUENCE,
        rank=2,
        include="*lora_*",
        adapter=True,
    ),
    "multiple choice": Family(
        "multiple-choice",
        "AutoModelForMultipleChoice",
        BertConfig(**BERT),
        {"prompt_column": "text", "choice_columns": ["A", "B", "C"], "label_column": "class"},
        rank=2,
    ),
    "image classification": Family(
        "image-classification",
        "AutoModelForImageClassification",
        ViTConfig(image_size=8, patch_size=4, **SMALL, **named("cat", "dog")),
        {"image_column": "image", "label_column": "class"},
        rank=1,
    ),
    "token classification, sequences": Family(
        "token-classification", "AutoModelForTokenClassification", TAGGER, TOKENS, rank=2, labels=SAMPLED
    ),
    "token classification, positions": Family(
        "token-classification",
        "AutoModelForTokenClassification",
        TAGGER,
        TOKENS | POSITIONS,
        rank=2,
        labels={"labels": "truncated", "rank": 2},
        positions=range,
    ),
    "causal LM, sequences": Family(
        "causal-lm",
        "AutoModelForCausalLM",
        GPT2,
        {"text_column": "text"},
        rank=2,
        labels=SAMPLED,
        template="[CLS] $A",
    ),
    "causal LM, positions": Family(
        "causal-lm",
        "AutoModelForCausalLM",
        GPT2,
        {"text_column": "text", **POSITIONS},
        rank=2,
        labels=SAMPLED,
        template="[CLS] $A",
        positions=lambda n_words: range(1, n_words + 1),
    ),
    "causal LM, empirical": Family(
        "causal-lm",
        "AutoModelForCausalLM",
        GPT2,
        {"text_column": "text"},
        rank=1,
        labels={"labels": "empirical"},
        template="[CLS] $A",
    ),
    "seq2seq LM": Family(
        "seq2seq-lm",
        "AutoModelForSeq2SeqLM",
        T5,
        {"source_column": "text", "target_column": "A"},
        rank=2,
        labels=SAMPLED,
        template="$A [SEP]",
    ),
}


@dataclass(frozen=True)
class Finished:
    family: Family
    run: RunDirectory
    options: dict[str, Any]

    def table(self, name: str) -> list[dict[str, Any]]:
        return read_table(self.run.table(name), name).to_pylist()


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """Whatever is not on this machine is not there: a socket that is opened is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the task went to the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.getaddrinfo", refuse)
        patch.setattr("socket.create_connection", refuse)
        yield


SLOW = (
    "token classification, sequences",
    "causal LM, empirical",
    "causal LM, sequences",
    "multiple choice",
    "mixture of experts, transposed",
)
"""Families that differ from another one in few lines."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, family in FAMILIES.items()
    ],
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of one family, done."""
    family, folder = request.param, tmp_path_factory.mktemp("family")
    if family.adapter:
        peft = pytest.importorskip("peft", reason="needs pip install peft")
    model = tiny.save_model(folder / "model", getattr(transformers, family.factory), family.config)
    if "image_column" in family.options:
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    else:
        tiny.save_tokenizer(folder / "model", family.template, types="Bert" in type(model).__name__)
    data = tiny.write(folder / "data.parquet", ROWS)
    options = {"model": str(folder / "model"), "data": data, "id_column": "key", **family.options}
    if family.adapter:
        lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
        options["adapter"] = str(folder / "adapter")
    config = npeff.RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "seed": SEED,
            "task": {"name": f"huggingface-{family.task}", "options": options},
            "parameters": {"include": [family.include]},
            "fishers": {
                **family.labels,
                "sketch": {"kind": "identity"},
                "store_dtype": "float32",
                "shard_size": 5,
                "batch_size": 3,
            },
            "factorization": {"n_components": N_COMPONENTS, "tolerance": 1e-8, "n_starts": 2},
            "verification": {"top_examples": 2, "baseline_examples": 3},
            "executor": {"kind": "serial"},
        }
    )
    return Finished(family, npeff.run(config), options)


def test_every_stage_is_complete(finished: Finished) -> None:
    run = finished.run
    for stage in ("fishers", "factorize", "lift", "verify"):
        assert read_json(run.record_file(stage))["stage"] == stage
    recorded = read_json(run.path / "stages" / "fishers.json")
    n_examples = len(finished.family.ids())
    assert (recorded["n_examples"], recorded["n_invalid"]) == (n_examples, 0)
    assert recorded["n_shards"] == math.ceil(n_examples / 5)


def test_ids_and_columns_of_the_data_travel_into_tables_and_answers(finished: Finished) -> None:
    ids, examples = finished.family.ids(), finished.table("examples")
    assert [row["id"] for row in examples] == ids
    kinds = dict(zip(ROWS["key"], ROWS["kind"], strict=True))
    assert [row["kind"] for row in examples] == [kinds[key.split(":")[0]] for key in ids]
    store = npeff.ComponentStore.open(finished.run.path)
    coefficients_NK = np.nan_to_num(store.coefficients.compute())
    for component in range(N_COMPONENTS):
        top = store.top_examples(component, n=3).to_pylist()
        best = np.argsort(-coefficients_NK[:, component], kind="stable")[: len(top)]
        assert top, "a component that no example uses would make this test empty"
        assert [row["id"] for row in top] == [ids[example] for example in best]
        assert [row["kind"] for row in top] == [examples[example]["kind"] for example in best]
        found = store.example(ids[best[0]]).to_pylist()
        assert next(row["rank"] for row in found if row["component"] == component) == 0


def test_stored_fishers_are_those_of_a_direct_computation(finished: Finished) -> None:
    family, examples = finished.family, finished.table("examples")
    store = FisherStore.open(finished.run.fishers)
    options = {name: value for name, value in finished.options.items() if name not in ("model", "data")}
    loaded = tiny.load(family.task, Path(finished.options["model"]), finished.options["data"], **options)
    parameters = dict(loaded.model.named_parameters())
    chosen = [parameters[name].requires_grad_() for name in store.attrs["parameter_layout"]["names"]]
    assert store.dim == sum(parameter.numel() for parameter in chosen)
    if family.adapter:
        assert all("lora_" in name for name in store.attrs["parameter_layout"]["names"])
    labels = loaded.column("label")
    for example in CHECKED:
        batch, row = loaded.batch([example]), examples[example]
        logits, targets = loaded.task.logits(loaded.model, batch)[0], loaded.task.targets(batch)
        if targets is None:
            logits_TC, targets_T = logits[None], torch.tensor([labels[example]])
            assert row["label"] == labels[example]
            assert row["prediction"] == int(logits.argmax())
            assert row["correct"] == (row["prediction"] == row["label"])
        else:
            made = targets[0] != IGNORED
            logits_TC, targets_T = logits[made], targets[0][made]
            assert (row["label"], row["prediction"], row["correct"], row["logits"]) == (None, None, None, None)
        directions_RTC, kept_trace = directions(family.labels, example, logits_TC.detach(), targets_T)
        factor_RP = torch.stack(
            [gradient((direction_TC * logits_TC).sum(), chosen) for direction_TC in directions_RTC.to(logits_TC)]
        ).double()
        stored = store.read_rows([example])
        norm = float(stored["frobenius_norms"][0])
        assert row["fisher_norm"] == norm == pytest.approx(float((factor_RP @ factor_RP.T).norm()), rel=1e-4)
        assert row["fisher_rank"] == family.rank == len(factor_RP)
        assert row["kept_trace"] == (None if kept_trace is None else pytest.approx(kept_trace, abs=1e-6))
        loss = torch.nn.functional.cross_entropy(logits_TC.detach().double(), targets_T)
        assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
        stored_RP = torch.from_numpy(stored["factors"][0]).double() * norm**0.5
        assert distance_of_fishers(stored_RP, factor_RP) < 1e-4 * norm


def test_directions_are_the_components_and_were_verified(finished: Finished) -> None:
    assert all(row["lift_cosine"] > 0.999 for row in finished.table("components"))
    verified = finished.table("verification")
    assert {(row["component"], row["examples"], row["sign"]) for row in verified} == {
        (component, examples, sign)
        for component in range(N_COMPONENTS)
        for examples in ("fit", "held_out")
        for sign in (1, -1)
    }
    for row in verified:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert row["epsilon"] > 0
        assert row["accuracy_top_before"] is not None, "labels are known"
        if row["reached_target"]:
            assert row["kl_top"] == pytest.approx(row["target_kl"], rel=0.15)


def test_the_report_shows_the_examples(finished: Finished) -> None:
    page, examples = finished.run.report.read_text(), finished.table("examples")
    page += re.sub(r"<[^>]+>", "", page)  # tokens of a text are marked by their shares
    for top in finished.table("top_examples"):
        example = examples[top["example"]]
        image = example["image"]
        shown = html.escape(example["text"]) if image is None else base64.b64encode(image).decode()
        assert shown in page, example["id"]


def directions(
    labels: dict[str, Any], example: int, logits_TC: Tensor, targets_T: Tensor
) -> tuple[Tensor, float | None]:
    """What an example's rows are the gradients of, (R, T, C) float64 as factors of the logits, and the kept trace."""
    p_TC = logits_TC.double().softmax(-1)
    kind, rank = labels["labels"], labels.get("rank", 1)
    if kind in ("exact", "truncated"):
        (p_C,) = p_TC
        values, vectors = torch.linalg.eigh(p_C.diag() - p_C[:, None] * p_C)
        rank = len(p_C) - 1 if kind == "exact" else rank
        return (vectors * values.clamp_min(0).sqrt()).T[-rank:, None], float(values[-rank:].sum() / values.sum())
    drawn_TR = targets_T[:, None]
    if kind == "sampled":
        key = np.array([SEED, example], np.uint64)
        uniforms_TR = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random((len(p_TC), rank)))
        drawn_TR = (p_TC.cumsum(-1)[:, None] <= uniforms_TR[:, :, None]).sum(-1)
    one_hot_RTC = torch.nn.functional.one_hot(drawn_TR.T, p_TC.shape[-1])
    return (one_hot_RTC - p_TC) / rank**0.5, None


def gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """(P,)"""
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def distance_of_fishers(a_RP: Tensor, b_RP: Tensor) -> float:
    """‖AᵀA − BᵀB‖_F, within the span of the rows."""
    _, r = torch.linalg.qr(torch.cat([a_RP, b_RP]).T)
    a, b = r[:, : len(a_RP)], r[:, len(a_RP) :]
    return float((a @ a.T - b @ b.T).norm())
