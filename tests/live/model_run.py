"""A small run of a task on a table of texts, with a model, up to the verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import npeff
import numpy as np
from npeff.runs.directory import RunDirectory
from tasks import tiny

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
N_ROWS, N_COMPONENTS = 24, 3


def sentences(n: int = N_ROWS) -> list[str]:
    generator = np.random.default_rng(0)
    words = [word for word in tiny.WORDS if word != "##s"]
    return [" ".join(generator.choice(words, size)) for size in generator.integers(2, 7, n)]


def text_run(folder: Path) -> RunDirectory:
    """Classification of texts with a tiny BERT."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(max_position_embeddings=24, num_labels=3, **SMALL, **tiny.SIZE)
    tiny.save_tokenizer(folder / "model", types=True)
    tiny.save_model(folder / "model", AutoModelForSequenceClassification, config)
    texts = sentences()
    columns = {"key": [f"row-{i}" for i in range(N_ROWS)], "text": texts, "class": [i % 3 for i in range(N_ROWS)]}
    data = tiny.write(folder / "texts.parquet", columns)
    options = {"text_columns": ["text"], "label_column": "class", "id_column": "key", "filter": {"class": [0, 1, 2]}}
    return complete(folder, "huggingface-sequence-classification", {"data": data, **options})


def image_run(folder: Path) -> RunDirectory:
    """Classification of images with a tiny ViT."""
    from transformers import AutoModelForImageClassification, ViTConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    tiny.save_model(
        folder / "model", AutoModelForImageClassification, ViTConfig(image_size=8, patch_size=4, **SMALL, **names)
    )
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    columns = {"photo": [tiny.png(i) for i in range(N_ROWS)], "animal": ["cat", "dog"] * (N_ROWS // 2)}
    data = tiny.write(folder / "images.parquet", columns)
    options = {"image_column": "photo", "label_column": "animal"}
    return complete(folder, "huggingface-image-classification", {"data": data, **options})


def complete(folder: Path, task: str, options: dict[str, Any]) -> RunDirectory:
    settings = {
        "run_dir": str(folder / "run"),
        "task": {"name": task, "options": {"model": str(folder / "model"), **options}},
        "fishers": {"sketch": {"kind": "identity"}, "shard_size": 8, "batch_size": 4},
        "factorization": {"n_components": N_COMPONENTS, "held_out_fraction": 0.25},
        "verification": {"top_examples": 4, "baseline_examples": 6, "exact": True},
        "executor": {"kind": "serial"},
    }
    return npeff.run(npeff.RunConfig.model_validate(settings))
