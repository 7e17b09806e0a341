"""The benchmark's language model: what it is trained on, what its examples are, and that the task reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from methods_stage import runs, topics
from npeff.tasks import load_task


def test_no_paragraph_is_both_trained_on_and_held_out() -> None:
    trained, held_out = topics.split_topics()
    one, other = (
        {part.strip() for text in side.values() for part in text.split("\n\n")} - {""} for side in (trained, held_out)
    )
    assert one
    assert other
    assert not one & other
    assert not trained.keys() & held_out.keys()


def test_examples_are_drawn_windows_of_the_held_out_text_that_do_not_overlap() -> None:
    held_out = topics.split_topics()[1]
    rows = topics.drawn_examples(held_out).to_pylist()
    assert len(rows) == topics.N_EXAMPLES == len({row["id"] for row in rows})
    for row in rows:
        start = int(row["id"].removeprefix(f"{row['topic']}-"))
        assert start % topics.CONTEXT == 0
        assert held_out[row["topic"]][start : start + topics.CONTEXT] == row["prompt"] + row["text"]
        assert len(row["text"]) == 1


def test_a_token_is_one_of_the_most_frequent_characters() -> None:
    tokenizer = topics.tokenizer_of("aab\n\n\n " + "".join(chr(1000 + number) for number in range(100)))
    assert len(tokenizer) == topics.CHARACTERS + 2
    assert tokenizer("\n\na b?")["input_ids"] == [2, 2, 3, 4, 5, 1]


@pytest.mark.slow
def test_the_task_predicts_the_last_characters_and_training_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topics, "STEPS", 4)
    monkeypatch.setattr(topics, "WINDOWS", 4)
    monkeypatch.setattr(topics, "N_EXAMPLES", 20)
    problem = runs.pydoc(tmp_path, None)
    config, former = problem.config(0), topics.prepared(tmp_path / "pydoc")
    assert topics.prepared(tmp_path / "other") | {"training_cpu_s": 0} == former | {"training_cpu_s": 0}
    task = load_task(config.task.name, config.task.options)
    examples, model = task.examples(tmp_path), task.model(tmp_path)
    table = examples.table()
    assert len(examples) == 20
    assert set(table["position"].to_pylist()) == {topics.CONTEXT - 1}
    logits = task.logits(model, examples.batch(range(20)))
    loss = torch.nn.functional.cross_entropy(logits.detach(), torch.tensor(table["label"].to_pylist()))
    assert float(loss) < former["loss"]["uniform"] + 0.5


def test_the_sketch_of_the_digits_does_not_depend_on_the_run_file(tmp_path: Path) -> None:
    sketch = runs.digits(tmp_path, None).config(0).fishers.sketch
    assert (sketch.kind, sketch.dim) == ("tensorsketch", 4096)
