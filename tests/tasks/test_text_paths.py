"""Straight lines between texts in the space of embeddings, for several kinds of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from npeff.input_fisher.path import fisher_path
from npeff.models.loaded import LoadedModel
from npeff.stages.scale.curves import Curves
from npeff.stages.scale.plan import Request, chosen
from npeff.tasks import TaskError
from text_models import CLASSIFIERS, made
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config


def texts(folder: Path, name: str, columns: dict[str, list[str]]) -> LoadedModel:
    return made(
        folder,
        "sequence-classification",
        AutoModelForSequenceClassification,
        CLASSIFIERS[name],
        "[CLS] $A [SEP]",
        columns,
        text_columns=list(columns),
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "longformer"])
def test_a_line_between_texts_leads_from_one_prediction_to_the_other(name: str, tmp_path: Path) -> None:
    loaded = texts(tmp_path, name, {"text": ["the cat sings", "the dog sings", "a bird"]})
    curves = Curves(loaded, None)
    curves.check(0, 1)
    curve = curves.of(0, 1)
    values, velocity = curve.points(np.array([0.0, 0.5, 1.0]))
    logits = curve.logits(values)
    with torch.no_grad():
        ends = [loaded.logits(loaded.model, loaded.batch([example])) for example in (0, 1)]
    torch.testing.assert_close(logits[[0, 2]], torch.cat(ends), rtol=1e-4, atol=1e-5)
    used = loaded.flat_inputs(loaded.batch([0])).used_BP[0]
    assert (velocity[:, ~used] == 0).all()  # special tokens stay
    path = fisher_path(curve)
    assert path.tolerance_met
    assert path.distance <= path.chord_sum * (1 + 1e-12)
    s, step = 0.5, 1e-3
    near, _ = curve.points(np.array([s - step, s + step]))
    loaded.single_precision_model.double()
    with torch.no_grad():
        around = curves.of(0, 1).logits(near.double())
        p = around.mean(0).softmax(-1)
        change = (around[1] - around[0]) / (2 * step)
        expected = float((p * change.square()).sum() - (p * change).sum().square())
    assert path.fisher_n[path.s_n == s] == pytest.approx(expected, rel=1e-3)


def test_texts_of_different_lengths_or_segments_are_refused_and_not_drawn(tmp_path: Path) -> None:
    first, second = ["the cat", "the dog", "the small cat", "a bird"], ["sings", "sings", "sings", "a tree"]
    columns = {"text": first, "other": second}
    loaded = texts(tmp_path, "bert", columns)
    curves = Curves(loaded, None)
    curves.check(0, 1)
    problem = r"cannot connect the examples '0' and '2', because their inputs have different lengths: choose examples"
    with pytest.raises(TaskError, match=problem) as found:
        curves.check(0, 2)
    assert "\n" not in str(found.value)
    with pytest.raises(TaskError, match="different lengths"):  # of the same length, with another place of [SEP]
        curves.check(2, 3)
    request = Request(0, [0, 1, 2, 0], [0, 1, 2, 3], 5, None, {})
    assert [set(pair[1:]) for pair in chosen(request, loaded, curves)] == [{0, 1}]
    with pytest.raises(TaskError, match="no two examples of different predicted classes have inputs of the same shape"):
        chosen(Request(0, [0, 0, 2, 0], [0, 1, 2, 3], 5, None, {}), loaded, curves)


def test_predictions_at_all_tokens_count(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=40, bos_token_id=tiny.START, **tiny.SIZE)
    loaded = made(
        tmp_path,
        "causal-lm",
        AutoModelForCausalLM,
        config,
        "[CLS] $A [SEP]",
        {"text": ["the cat sings", "the dog sings"]},
        text_column="text",
    )
    curves = Curves(loaded, None)
    curve = curves.of(0, 1)
    assert curve.made_T is not None
    path = fisher_path(curve, points=8)
    assert path.tolerance_met
    logits = curve.logits(curve.points(np.array([0.0, 1.0]))[0])[:, curve.made_T].softmax(-1).detach()
    angles = 2 * torch.arccos((logits[0] * logits[1]).double().sqrt().sum(-1).clamp(max=1))
    assert path.distance == pytest.approx(float(angles.square().sum().sqrt()), rel=1e-2)
