"""Digits with cues: what the cues are, training by its options, the two groups of inputs, and wrong options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.tasks import TaskError, load_task
from npeff.tasks.planted.coloured_digits import trained_network
from npeff.tasks.planted.cued_digits import COLOURS, NO_CUE, Caption, Colour, CuedDigits, drawn_cues

SMALL = {"train_examples": 64, "epochs": 1, "limit": 40}
TASK = "coloured-digits"


def made(**options: Any) -> Any:
    return load_task(TASK, SMALL | options)


def loaded(folder: Path, **options: Any) -> LoadedModel:
    spec = ModelSpec(TASK, SMALL | options, folder, ("*",), (), "cpu")
    spec.prepare()
    return spec.load()


def test_training_cues_give_the_label_away_and_those_of_the_examples_are_random() -> None:
    task = load_task(TASK, {"correlation": 0.99})
    images, examples = task._train, task.examples(Path())
    assert int((images.cues_N != images.targets).sum()) == 7  # of 700
    assert len(examples) == 1797 - 700
    agrees = examples.table()["agrees"].to_numpy()
    assert 0.05 < agrees.mean() < 0.15
    assert set(examples.cues_N.tolist()) == set(range(10))
    assert not set(images._numbers.tolist()) & set(examples._numbers.tolist())
    again = load_task(TASK, {"correlation": 0.99}).examples(Path())
    assert torch.equal(again.cues_N, examples.cues_N)


def test_other_cues_are_never_those_of_the_label() -> None:
    targets = torch.arange(1000) % 10
    cues = drawn_cues(targets, 0.0, np.random.default_rng(0))
    assert not (cues == targets).any()
    assert torch.bincount((cues - targets) % 10, minlength=10)[1:].min() > 50
    assert torch.equal(drawn_cues(targets, 1.0, np.random.default_rng(0)), targets)


def test_a_colour_is_one_entry_and_grey_is_none() -> None:
    colour = Colour(3.0)
    encoded = colour.encoded(torch.tensor([4, NO_CUE, 0]))
    assert encoded[0].tolist() == [0.0] * 4 + [3.0] + [0.0] * 5
    assert not encoded[1].any()
    assert colour.texts(torch.tensor([4, NO_CUE, 0])) == [list(COLOURS)[4], "none", "red"]


def test_a_caption_names_its_digit_and_without_a_cue_none() -> None:
    caption, cues = Caption(), torch.tensor([7, NO_CUE, 3, 9])
    assert caption.texts(cues) == [
        "a picture of the digit seven",
        "the number something is written down",
        "someone wrote three on a page",
        "here is a drawing of nine",
    ]
    numbers = caption.encoded(cues)
    assert numbers.shape == (4, 6)
    assert numbers.unique().max() < caption.network().words.num_embeddings
    different = caption.encoded(torch.tensor([8, 2, 4, 5])) != numbers
    assert different.sum(1).tolist() == [1] * 4


@pytest.mark.parametrize("cue", ["colour", "caption"])
def test_the_modalities_are_two_groups_of_inputs(tmp_path: Path, cue: str) -> None:
    model = loaded(tmp_path, cue=cue)
    model.check_inputs([0, 1, 2, 3])
    inputs = model.inputs(model.batch(range(4)), 4)
    assert inputs.groups == ("image", cue)
    assert inputs.group_of is not None
    counts = torch.bincount(inputs.group_of).tolist()
    assert counts == ([64, 10] if cue == "colour" else [64, 6 * 16])
    assert len(inputs.names) == sum(counts)


def test_the_same_options_train_the_same_network(tmp_path: Path) -> None:
    options = {"regularizer": "share", "samples": 2}
    first, second = (loaded(tmp_path / name, **options).model.state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = loaded(tmp_path / "c", **options, weight=0.1).model.state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_dropout_of_every_cue_trains_on_images_without_cues() -> None:
    targets = made()._train.targets
    numbers, options = np.arange(64), {"learning_rate": 3e-3, "epochs": 1, "samples": 1, "seed": 0}
    networks = []
    for cues, regularizer in ((targets, "dropout"), (torch.full_like(targets, NO_CUE), "none")):
        images = CuedDigits(numbers, cues, Colour(3.0))
        networks.append(trained_network(images, regularizer=regularizer, weight=1.0, **options))  # type: ignore[arg-type]
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(one, other)


def test_dropout_and_share_are_right_more_often_than_no_regularizer() -> None:
    """With the correlation and the strength of the benchmark, which has the differences between seeds."""
    accuracy = {}
    for regularizer in ("none", "dropout", "share"):
        task = load_task(TASK, {"regularizer": regularizer, "samples": 1})
        network = trained_network(task._train, **task._training)
        examples = task.examples(Path())
        with torch.no_grad():
            right = network(examples.images, examples.encoded).argmax(1) == examples.targets
        accuracy[regularizer] = right.double().mean().item()
    assert accuracy["share"] > accuracy["none"] + 0.1
    assert accuracy["dropout"] > accuracy["none"] + 0.1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cue": "sound"}, "cue must be colour or caption, not 'sound'"),
        ({"correlation": 1.1}, "correlation must be from 0 to 1, not 1.1"),
        ({"strength": 0.0}, "strength must be positive, not 0.0"),
        ({"strength": float("nan")}, "strength must be positive, not nan"),
        ({"cue": "caption", "strength": 1.0}, "strength is that of a colour: remove it, or set cue: colour"),
        (
            {"regularizer": "entropy"},
            "regularizer must be one of none, share, balance, reciprocal, dropout, not 'entropy'",
        ),
        ({"weight": 0.1}, "weight is that of a regularizer: set regularizer, or remove weight"),
        ({"regularizer": "share", "weight": -1.0}, "weight must be not negative for share, not -1.0"),
        ({"regularizer": "share", "weight": float("inf")}, "weight must be not negative for share, not inf"),
        ({"regularizer": "dropout", "weight": 1.5}, "weight must be from 0 to 1 for dropout, not 1.5"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"train_examples": 1797}, "train_examples must be from 10 to 1796, not 1797"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, not 0.0"),
        ({"limit": -1}, "limit must be not negative, not -1"),
        ({"samples": "3"}, "task.options.samples must be a whole number"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(TaskError, match=problem) as found:
        load_task(TASK, options)
    assert "\n" not in str(found.value)
