"""Embeddings of texts: means over the tokens of a text, whatever the batch; other folders are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from npeff.tasks import TaskError
from npeff.tasks.huggingface.embedding import TextEmbedder
from transformers import AutoModel, BertConfig

CONFIG = BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=12,
    **tiny.SIZE,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    tiny.save_tokenizer(folder, types=True)
    tiny.save_model(folder, AutoModel, CONFIG)
    return folder


def test_an_embedding_is_the_unit_mean_of_the_hidden_states_whatever_the_batch(folder: Path) -> None:
    texts = [
        "the small cat sings",
        "a dog",
        "",
        "the bird sleep near the tree and the small cat and the dog in the tree",
    ]
    embedder, model = TextEmbedder(folder), AutoModel.from_pretrained(folder).eval()
    found = embedder.embed(texts, batch_size=3)
    assert found.shape == (4, 16)
    for text, row in zip(texts, found, strict=True):
        pieces = [tiny.token(word) for word in text.split()] or [tiny.UNKNOWN]
        ids = torch.tensor([[tiny.START, *pieces[:8], tiny.END]])  # 10 of 12 positions
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, torch.nn.functional.normalize(mean, dim=0).numpy(), atol=1e-6)
    assert embedder.embed([]).shape[0] == 0


def test_a_folder_without_such_a_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is not a folder: give a local folder"):
        TextEmbedder(tmp_path / "missing")
    with pytest.raises(TaskError, match="cannot load a sentence-embedding model from"):
        TextEmbedder(tmp_path)
    tiny.save_tokenizer(tmp_path, pad=False, types=True)
    tiny.save_model(tmp_path, AutoModel, CONFIG)
    with pytest.raises(TaskError, match="has no padding token"):
        TextEmbedder(tmp_path)
