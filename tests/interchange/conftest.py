"""A small run of a model of texts, to export and to share."""

from __future__ import annotations

import npeff
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chromium import browser
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from synthetic_run import make_run, run, written_run
from tasks import tiny

__all__ = ["browser", "make_run", "run", "written_run"]


@pytest.fixture(scope="session")
def lifted_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of a tiny BERT with two lifted components. Its repaired and stepped models are the tests' own."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("lifted")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(max_position_embeddings=16, num_labels=3, **small, **tiny.SIZE)
    tiny.save_tokenizer(folder / "model", types=True)
    tiny.save_model(folder / "model", transformers.AutoModelForSequenceClassification, config)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(tiny.WORDS[:9], 5)) for _ in range(24)]
    pq.write_table(pa.table({"text": texts, "label": rng.integers(0, 3, 24)}), folder / "data.parquet")
    options = {"model": str(folder / "model"), "data": str(folder / "data.parquet"), "text_columns": ["text"],
               "label_column": "label"}  # fmt: skip
    document = {
        "run_dir": str(folder / "run"),
        "task": {"name": "huggingface-sequence-classification", "options": options},
        "fishers": {"sketch": {"dim": 64}, "shard_size": 12},
        "factorization": {"n_components": 2, "max_iterations": 5, "stability_examples": 0},
        "verification": {"top_examples": 4, "baseline_examples": 4, "correlation_examples": 4},
        "executor": {"kind": "serial"},
    }
    made = RunDirectory.create(RunConfig.model_validate(document))
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift):
        stage(made)
    return made
