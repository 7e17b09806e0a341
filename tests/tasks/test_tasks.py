"""Tasks by name: the built-in digits, a user's own by import path, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from npeff.tasks import TaskError, load_task, to_device
from PIL import Image


def test_digits_are_held_out_images_and_the_network_knows_them(tmp_path: Path) -> None:
    task = load_task("digits", {"epochs": 5})
    task.prepare(tmp_path)
    examples = task.examples(tmp_path)
    table = examples.table()
    assert len(examples) == len(table) == 1200
    batch = examples.batch(range(1200))
    logits = task.logits(task.model(tmp_path), batch)
    assert logits.shape == (1200, 10)
    assert (logits.argmax(-1).numpy() == table["label"].to_numpy()).mean() > 0.85
    picture = np.asarray(Image.open(io.BytesIO(table["image"][7].as_py())))
    np.testing.assert_allclose(picture, np.round(255 * (1 - batch[7, 0].numpy())))


def test_digits_are_trained_once_and_the_same_way_every_time(tmp_path: Path) -> None:
    models = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        task = load_task("digits", {"epochs": 1})
        task.prepare(folder)
        stamp = next(folder.iterdir()).stat().st_mtime_ns
        task.prepare(folder)
        assert next(folder.iterdir()).stat().st_mtime_ns == stamp
        models.append(task.model(folder).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_training_and_explained_images_are_disjoint() -> None:
    ids = {row.as_py() for row in load_task("digits", {}).examples(Path()).table()["id"]}
    other_ids = {row.as_py() for row in load_task("digits", {"train_examples": 797}).examples(Path()).table()["id"]}
    assert len(ids) == 1200
    assert other_ids < ids, "the same order, cut elsewhere"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("digit", {}, "unknown task 'digit'"),
        ("no_such_package.task:Task", {}, "cannot import task"),
        ("npeff.tasks.digits:Missing", {}, "has no Missing"),
        ("pathlib:Path", {}, "not a subclass"),
        ("digits", {"epoch": 3}, "unexpected keyword argument 'epoch'"),
        ("digits", {"train_examples": 0}, "train_examples must be between"),
        ("digits", {"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(name, options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


TEXTS = {"model": "m", "data": "d.csv", "text_columns": ["a"]}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "huggingface-sequence-classification",
            {**TEXTS, "trust_remote_code": "no"},
            "must be true or false, not 'no'",
        ),
        ("huggingface-sequence-classification", {**TEXTS, "max_length": "128"}, "must be a whole number, not '128'"),
        ("huggingface-sequence-classification", {**TEXTS, "max_length": True}, "must be a whole number, not True"),
        ("huggingface-sequence-classification", {**TEXTS, "limit": 1.5}, "must be a whole number or null, not 1.5"),
        ("huggingface-sequence-classification", {**TEXTS, "text_columns": 5}, "text_columns must be a list, not 5"),
        ("huggingface-sequence-classification", {**TEXTS, "label_names": "ab"}, "must be a list or null, not 'ab'"),
        ("huggingface-sequence-classification", {**TEXTS, "columns": ["a"]}, "must be a mapping or null, not ['a']"),
        ("huggingface-sequence-classification", {**TEXTS, "model": 5}, "task.options.model must be a text, not 5"),
        ("digits", {"seed": "x"}, "task.options.seed must be a whole number, not 'x'"),
        ("digits", {"limit": "1" * 100}, "task.options.limit must be a whole number or null, not str"),
        ("compiled-rules", {"label_noise": "0.1"}, "task.options.label_noise must be a number, not '0.1'"),
    ],
)
def test_an_option_of_another_type_is_refused(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(TaskError) as refused:
        load_task(name, options)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {"trust_remote_code": False, "limit": None, "filter": {"a": 1}, "label_names": ["a", "b"]},
        {"label_names": (1, 2), "columns": {"a": "b"}, "revision": "main", "label_values": "names"},
    ],
)
def test_an_option_of_its_type_is_accepted(more: dict[str, object]) -> None:
    load_task("huggingface-sequence-classification", {**TEXTS, **more})


def test_a_path_that_a_run_of_version_0_1_has_stored_is_found_at_its_present_place() -> None:
    assert type(load_task("pipeline.tasks.digits:DigitsTask", {})) is type(load_task("digits", {}))
    stored = load_task("pipeline.tasks.heuristics:PlantedHeuristicsTask", {})
    assert type(stored) is type(load_task("planted-heuristics", {}))


def test_a_task_that_imports_the_package_by_its_former_name_is_told_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task_of_old.py").write_text("from pipeline.tasks import Task\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match=r"imported as npeff: from npeff\.tasks import"):
        load_task("task_of_old:MyTask", {})


def test_batches_of_any_nesting_reach_the_device() -> None:
    batch = {"a": torch.zeros(2), "b": [torch.ones(1), (torch.ones(2), "text")]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][0].device.type == moved["b"][1][0].device.type == "meta"
    assert moved["b"][1][1] == "text"
