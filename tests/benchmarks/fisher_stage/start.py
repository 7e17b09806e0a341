"""What it takes to begin: the whole command on a model so small that its Fishers cost next to nothing.

``npeff fishers`` and ``bergson build`` read the same texts and the same language model of 0.8 million parameters, with
their defaults, and write one row an example. Neither is told how many threads to use.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from process_tree import Cost, measured
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fisher_stage import causal_model
from fisher_stage.causal_model import WORDS, Size
from fisher_stage.workload import median_and_spread

SIZE = Size(width=96, length=32, n_texts=400, steps=20, layers=2, positions=2048)
"""0.8 million parameters, 0.2 of them in layers; bergson needs as many positions as a batch has tokens."""
RUN = """
run_dir: {folder}/run
task:
  name: huggingface-causal-lm
  options: {{model: {model}, data: {texts}, text_column: text}}
parameters: {{include: ["transformer.h.*.attn.*.weight", "transformer.h.*.mlp.*.weight"]}}
fishers: {{labels: sampled, rank: 1, sketch: {{kind: tensorsketch, dim: 1024}}}}
factorization: {{n_components: 8}}
"""


def start(bergson_python: Path | None, rounds: int) -> dict[str, Any]:
    """Every round runs the one command and then the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, texts = folder / "model", folder / "texts.jsonl"
        _make(model, texts)
        costs: dict[str, list[Cost]] = {"npeff fishers": [], "npeff fishers, with Ray": []}
        if bergson_python is None:
            print("start: without bergson, which has no environment")
        else:
            costs["bergson build"] = []
        for done in range(rounds):
            for who, found in costs.items():
                own = folder / f"{who.replace(' ', '-')}-{done}"
                own.mkdir()
                command = [str(bergson_python), "-m", "bergson", "build", str(own / "index"), "--model", str(model)]
                command += ["--dataset", str(texts), "--projection_dim", "16"]
                if who.startswith("npeff"):
                    run = RUN.format(folder=own, model=model, texts=texts)
                    (own / "run.yaml").write_text(run + "executor: {kind: ray}\n" * ("Ray" in who))
                    command = [sys.executable, "-m", "npeff", "fishers", str(own / "run.yaml")]
                offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "CUDA_VISIBLE_DEVICES": ""}
                found.append(measured(command, offline, own))
    spreads = {
        who: {key: median_and_spread(np.array([asdict(cost)[key] for cost in found])) for key in asdict(found[0])}
        for who, found in costs.items()
    }
    _show(spreads, rounds)
    return {"size": asdict(SIZE), "rounds": rounds, "costs": spreads}


def _make(model: Path, texts: Path) -> None:
    """Save the model, with a tokenizer whose tokens are words, and its texts."""
    torch.set_num_threads(1)
    causal_model.make(model, SIZE)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(model)
    with np.load(model / "data.npz") as arrays:
        rows = arrays["input_ids"].tolist()
    lines = [json.dumps({"text": " ".join(f"w{token}" for token in row)}) + "\n" for row in rows]
    texts.write_text("".join(lines))


def _show(spreads: dict[str, dict[str, dict[str, float]]], rounds: int) -> None:
    print(f"start, {SIZE.n_texts} texts of {SIZE.length} tokens, medians of {rounds} rounds (least to most)")
    for who, found in spreads.items():
        cpu, wall = found["cpu_s"], found["wall_s"]
        print(
            f"  {who:<24} CPU {cpu['median']:6.1f} s ({cpu['least']:.1f} to {cpu['most']:.1f})  "
            f"wall {wall['median']:6.1f} s ({wall['least']:.1f} to {wall['most']:.1f})  "
            f"memory {found['peak_memory_bytes']['median'] / 2**20:6.0f} MiB  "
            f"processes {found['processes']['median']:.0f}"
        )
