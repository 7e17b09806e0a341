"""Sequence-to-sequence language models: tiny T5 and BART, against the models called directly on one pair at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.tasks import IGNORED, TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import AutoModelForSeq2SeqLM, BartConfig, MBartConfig, T5Config

SOURCES = ["the dog sleeps near the tree", "a cat", "is the bird small ?"]
TARGETS = ["a bird", "the cat is in the tree and sings", "the small bird is in a tree"]
COLUMNS = {"source": SOURCES, "target": TARGETS, "kind": ["x", "y", "x"]}
SPECIAL = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.END, "decoder_start_token_id": tiny.START}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32, **LAYERS}
CONFIGS = {
    "t5": T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, **SPECIAL, **tiny.SIZE),
    "bart": BartConfig(bos_token_id=2, forced_eos_token_id=None, **BART, **SPECIAL, **tiny.SIZE),
    "mbart": MBartConfig(bos_token_id=2, forced_eos_token_id=None, **BART, **SPECIAL, **tiny.SIZE),
}


@pytest.fixture(scope="module", params=[("t5", "right"), ("bart", "left"), ("mbart", "right")], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, side = request.param
    folder = tmp_path_factory.mktemp(name)
    tiny.save_model(folder, AutoModelForSeq2SeqLM, CONFIGS[name])
    tiny.save_tokenizer(folder, "$A [SEP]", side=side)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    return tiny.write(tmp_path / "data.parquet", COLUMNS)


def load(model: Path, data: str, **options: Any) -> tiny.Loaded:
    return tiny.load("seq2seq-lm", model, data, **{"source_column": "source", "target_column": "target", **options})


def ids_of(text: str) -> list[int]:
    return [*map(tiny.token, text.replace("sleeps", "sleep ##s").split()), tiny.END]


def called_directly(loaded: tiny.Loaded, source: str, decoder_input: list[int]) -> torch.Tensor:
    """Logits (T, C) for one source and the tokens that the decoder has before it, without padding."""
    with torch.no_grad():
        return loaded.model(
            input_ids=torch.tensor([ids_of(source)]), decoder_input_ids=torch.tensor([decoder_input])
        ).logits[0]


def decoder_input(loaded: tiny.Loaded, target: str) -> list[int]:
    """What the model was trained to begin a target with, and all of it but the last token."""
    first = tiny.END if loaded.model.config.model_type == "mbart" else tiny.START
    return [first, *ids_of(target)[:-1]]


def test_a_row_predicts_every_token_of_its_target(model: Path, data: str) -> None:
    loaded = load(model, data)
    tiny.check_batches(loaded)
    targets = loaded.targets(range(3))
    assert targets is not None
    for index, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        expected = called_directly(loaded, source, decoder_input(loaded, target))
        torch.testing.assert_close(loaded.predictions(range(3))[index], expected, rtol=1e-5, atol=1e-5)
        assert targets[index][targets[index] != IGNORED].tolist() == ids_of(target)
    assert loaded.column("text") == [f"{a}\n{b}" for a, b in zip(SOURCES, TARGETS, strict=True)]
    assert loaded.column("label") == [None] * 3
    assert loaded.examples.class_names == ()


def test_a_position_is_predicted_from_the_source_and_its_prefix(model: Path, data: str) -> None:
    loaded = load(model, data, examples="positions")
    tiny.check_batches(loaded)
    expected = [(row, t) for row, target in enumerate(TARGETS) for t in range(len(ids_of(target)))]
    assert loaded.column("id") == [f"{row}:{t}" for row, t in expected]
    assert loaded.column("label") == [ids_of(TARGETS[row])[t] for row, t in expected]
    assert loaded.column("kind") == [COLUMNS["kind"][row] for row, _ in expected]
    logits = loaded.logits(range(len(expected)))
    for example, (row, t) in zip(logits, expected, strict=True):
        prefix = decoder_input(loaded, TARGETS[row])[: t + 1]
        torch.testing.assert_close(example, called_directly(loaded, SOURCES[row], prefix)[-1], rtol=1e-5, atol=1e-5)
    assert loaded.column("text")[1] == "the dog sleeps near the tree\na [bird]"
    assert loaded.column("token")[1] == "bird"
    shown = [text.partition("\n")[2] for text in loaded.column("text")]
    assert loaded.examples.prediction_texts([(index, 0) for index in range(len(expected))]) == shown
    assert load(model, data).examples.prediction_texts(expected) == shown


def test_sources_and_targets_are_cut(model: Path, data: str) -> None:
    loaded = load(model, data, max_length=3)
    assert loaded.batch(range(3))["inputs"]["input_ids"].shape == (3, 3)
    assert loaded.logits(range(3)).shape[:2] == (3, 3)
    assert loaded.lengths() == [6, 6, 6]


def test_a_mistake_is_one_line(model: Path, data: str) -> None:
    with pytest.raises(TaskError, match="has no column 'goal': it has source, target, kind"):
        load(model, data, target_column="goal")
