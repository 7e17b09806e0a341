"""Tiny text models with their inputs, and what must hold for the inputs of every text task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.tasks import Inputs
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LongformerConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

TEXTS = ["a small cat", "the dog sleeps and the cat sings", "dog", "a bird sings in the small tree near the dog"]
OTHERS = ["the cat is small ?", "a dog", "the bird", "the tree"]
PAIR = ["text", "other"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 40, "eos_token_id": tiny.END}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.START,
    "eos_token_id": tiny.END,
    "decoder_start_token_id": tiny.END,
    "scale_embedding": True,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": tiny.PAD}
CLASSIFIERS: dict[str, Any] = {
    "bert": BertConfig(**SMALL, **tiny.SIZE, num_labels=3),
    "roberta": RobertaConfig(**SMALL, **tiny.SIZE, num_labels=3, pad_token_id=0, max_position_embeddings=42),
    "distilbert": DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=3, **tiny.SIZE),
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, num_labels=3, bos_token_id=2, **tiny.SIZE),
    "llama": LlamaConfig(**LLAMA, **tiny.SIZE, num_labels=3),
    "gemma": GemmaConfig(**LLAMA, **tiny.SIZE, num_labels=3),
    "xlnet": XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=3, **tiny.SIZE),
    "longformer": LongformerConfig(
        **SMALL, **tiny.SIZE, num_labels=3, attention_window=8, pad_token_id=0, max_position_embeddings=50
    ),
    "bart": BartConfig(**BART, **tiny.SIZE, num_labels=3),
    "t5": T5Config(**T5, **tiny.SIZE, num_labels=3, eos_token_id=tiny.END, decoder_start_token_id=tiny.PAD),
}


def spec(family: str, folder: Path, data: str, **options: Any) -> ModelSpec:
    return ModelSpec(
        f"huggingface-{family}", {"model": str(folder), "data": data, **options}, Path("unused"), ("*",), (), "cpu"
    )


def classifier(folder: Path, config: Any, **options: Any) -> LoadedModel:
    template = {"xlnet": "$A [SEP] [CLS]", "t5": "$A [SEP]"}.get(config.model_type, "[CLS] $A [SEP]")
    tiny.save_model(folder, AutoModelForSequenceClassification, config)
    tiny.save_tokenizer(folder, template, types=config.model_type == "bert")
    data = tiny.write(folder / "data.parquet", {"text": TEXTS, "other": OTHERS})
    return spec("sequence-classification", folder, data, **{"text_columns": PAIR, **options}).load()


def check_equal(loaded: LoadedModel, indices: list[int]) -> tuple[Any, Inputs]:
    """The logits at the embeddings of a batch are those of its tokens, to the last bits."""
    loaded.check_inputs(indices)
    batch = loaded.batch(indices)
    inputs = loaded.inputs(batch, len(indices))
    with torch.no_grad():
        torch.testing.assert_close(inputs.logits(inputs.values), loaded.logits(loaded.model, batch), rtol=1e-6, atol=0)
        changed = inputs.logits(inputs.values.flip(-1))
        assert not torch.allclose(changed, inputs.logits(inputs.values), atol=1e-3)
        torch.testing.assert_close(loaded.logits(loaded.model, batch), inputs.logits(inputs.values), rtol=1e-6, atol=0)
    return batch, inputs


def tokens_of(inputs: Inputs, loaded: LoadedModel, indices: list[int]) -> list[list[tuple[str | None, bool, str]]]:
    """Text, mask and group of each position that is no padding."""
    assert inputs.mask is not None
    assert inputs.present is not None
    tokens = loaded.input_tokens(indices)
    assert tokens is not None
    group_of = torch.full_like(inputs.mask, -1, dtype=torch.int64) if inputs.group_of is None else inputs.group_of
    found = []
    for row, mask, present, groups in zip(tokens, inputs.mask, inputs.present, group_of, strict=True):
        assert int(present.sum()) == len(row)
        names = [inputs.groups[group] if group >= 0 else "" for group in groups[present].tolist()]
        found.append(list(zip((token.text for token in row), mask[present].tolist(), names, strict=True)))
        assert not mask[~present].any()
        assert (groups[~present] == -1).all()
    return found


def made(
    folder: Path, family: str, factory: Any, config: Any, template: str, columns: dict[str, Any], **options: Any
) -> LoadedModel:
    tiny.save_model(folder, factory, config)
    tiny.save_tokenizer(folder, template, types=config.model_type == "bert")
    return spec(family, folder, tiny.write(folder / "data.parquet", columns), **options).load()
