"""Digits with a cue that gives the label away in most training images and means nothing later.

The truth is known: in the examples, the cues are random, so a network that uses them is wrong. The task compares
regularizers of the training: the penalties of `npeff.training.FunctionalInformation`, and dropout of the cue.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from npeff.tasks.base import Examples, Inputs, Task
from npeff.tasks.digits import images_of_digits
from npeff.tasks.errors import TaskError
from npeff.tasks.planted.cue_networks import CueNetwork
from npeff.tasks.planted.cued_digits import NO_CUE, Caption, Colour, CuedDigits, drawn_cues
from npeff.tasks.trained_model import train_once, trained, with_weights

Regularizer = Literal["none", "share", "balance", "reciprocal", "dropout"]

_WEIGHTS: dict[str, float] = {"none": 0.0, "share": 1.0, "balance": 0.3, "reciprocal": 1e-10, "dropout": 0.5}
"""The default weight of each regularizer."""
_STRENGTH = 3.0
_LARGEST_NORM = 5.0
"""Largest norm of a gradient: that of ``reciprocal`` has no bound."""
_MODEL_FILE = "coloured-digits-model.safetensors"


class ColouredDigitsTask(Task):
    """A network that reads digits and their cues. The images that it is not trained on are the examples.

    Args:
        cue: ``colour``, or ``caption`` for a short text that names a digit.
        correlation: Fraction of the training images whose cue is that of their class. The cues of the others are any
            others, and those of the examples are random.
        strength: Value of the entry of the colour among the inputs. Pixels are from 0 to 1. None: 3.
        regularizer: ``none``; ``share``, ``balance`` or ``reciprocal``, the forms of
            `npeff.training.FunctionalInformation.penalty`, of which ``share`` has the target ``image``; or ``dropout``,
            which takes the cue away from some images of each batch.
        weight: Weight of the penalty, or the probability of ``dropout``. None: 1 for ``share``, 0.3 for ``balance``,
            1e-10 for ``reciprocal``, 0.5 for ``dropout``.
        samples: Number of draws of the noise for the penalties.
        train_examples: Number of training images.
        epochs: Number of passes over the training images.
        learning_rate: Step size of the training.
        limit: Use only the first ``limit`` of the remaining images.
        seed: Seed of the split, the cues, the initial weights, the noise and the order of training.
    """

    def __init__(
        self,
        cue: Literal["colour", "caption"] = "colour",
        correlation: float = 0.995,
        strength: float | None = None,
        regularizer: Regularizer = "none",
        weight: float | None = None,
        samples: int = 3,
        train_examples: int = 700,
        epochs: int = 20,
        learning_rate: float = 3e-3,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        n_images = len(images_of_digits()[0])
        _check_choices(cue, strength, regularizer, weight)
        for name, value, is_valid, wanted in (
            ("correlation", correlation, 0 <= correlation <= 1, "from 0 to 1"),
            ("samples", samples, samples >= 1, "at least 1"),
            ("train_examples", train_examples, 10 <= train_examples < n_images, f"from 10 to {n_images - 1}"),
            ("epochs", epochs, epochs >= 1, "at least 1"),
            ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "positive"),
            ("limit", limit, limit is None or limit >= 0, "not negative"),
        ):
            if not is_valid:
                raise TaskError(f"coloured-digits: {name} must be {wanted}, not {value}")
        generator = np.random.default_rng(seed)
        order = generator.permutation(n_images)
        train, rest = order[:train_examples], order[train_examples:][:limit]
        kind = Caption() if cue == "caption" else Colour(_STRENGTH if strength is None else strength)
        targets = images_of_digits()[1]
        self._train = CuedDigits(train, drawn_cues(targets[train], correlation, generator), kind)
        self._examples = CuedDigits(rest, drawn_cues(targets[rest], None, generator), kind)
        self._training: dict[str, Any] = {
            "regularizer": regularizer,
            "weight": _WEIGHTS[regularizer] if weight is None else weight,
            "samples": samples,
            "learning_rate": learning_rate,
            "epochs": epochs,
            "seed": seed,
        }

    def prepare(self, cache: Path) -> None:
        train_once(cache / _MODEL_FILE, lambda: trained_network(self._train, **self._training))

    def model(self, cache: Path) -> nn.Module:
        return with_weights(initial_network(self._train.kind, self._training["seed"]), cache / _MODEL_FILE)

    def examples(self, cache: Path) -> Examples:
        return self._examples

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(batch["image"], batch["cue"])
        return logits

    def inputs(self, model: CueNetwork, batch: dict[str, Tensor]) -> Inputs:  # type: ignore[override]
        """Return the pixels and the entries of the cue, which are two groups."""
        kind = self._train.kind
        given = model.modalities(batch["image"], batch["cue"])
        image, cue = given["image"], given[kind.name]
        n_pixels = image[0].numel()

        def logits(values: Tensor) -> Tensor:
            parts = {"image": values[:, :n_pixels].view_as(image), kind.name: values[:, n_pixels:].view_as(cue)}
            return model.classify(parts)

        names = [f"pixel {row + 1}, {column + 1}" for row in range(8) for column in range(8)] + kind.names()
        return Inputs(
            values=torch.cat([image.flatten(1), cue.flatten(1)], dim=1),
            logits=logits,
            names=names,
            groups=("image", kind.name),
            group_of=torch.tensor([0] * n_pixels + [1] * cue[0].numel()),
        )


def initial_network(kind: Colour | Caption, seed: int) -> nn.Module:
    """Return the network for a kind of cue, with its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.network().eval()


def trained_network(
    images: CuedDigits,
    *,
    regularizer: Regularizer,
    weight: float,
    samples: int,
    learning_rate: float,
    epochs: int,
    seed: int,
) -> nn.Module:
    """Train a network on images with cues. Options are those of `ColouredDigitsTask`; `weight` has no default here."""
    kind, generator = images.kind, torch.Generator().manual_seed(seed)
    model: Any = initial_network(kind, seed)
    without, information = kind.encoded(torch.full_like(images.cues_N, NO_CUE)), None
    if regularizer not in ("none", "dropout"):
        from npeff.training.functional_entropy import FunctionalInformation  # which workers do not need

        information = FunctionalInformation(("image", kind.name), samples=samples, generator=generator)

    def loss(batch: Tensor) -> Tensor:
        cue = images.encoded[batch]
        if regularizer == "dropout":
            cue = torch.where(torch.rand(len(batch), 1, generator=generator) < weight, without[batch], cue)
        given = model.modalities(images.images[batch], cue)
        value = nn.functional.cross_entropy(model.classify(given), images.targets[batch])
        if information is None or len(batch) < 2:  # a single example has no deviations
            return value
        found, target = information(model.classify, given), "image" if regularizer == "share" else None
        form: Any = regularizer
        return value + information.penalty(found, form=form, target=target, weight=weight)

    return trained(
        model,
        len(images),
        loss,
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        largest_norm=_LARGEST_NORM,
    )


def _check_choices(cue: str, strength: float | None, regularizer: str, weight: float | None) -> None:
    """Raise an error that names an option that does not fit the others."""
    if cue not in ("colour", "caption"):
        raise TaskError(f"coloured-digits: cue must be colour or caption, not {cue!r}")
    if regularizer not in _WEIGHTS:
        raise TaskError(
            f"coloured-digits: regularizer must be one of {', '.join(get_args(Regularizer))}, not {regularizer!r}"
        )
    if strength is not None and cue != "colour":
        raise TaskError("coloured-digits: strength is that of a colour: remove it, or set cue: colour")
    if strength is not None and not 0 < strength < math.inf:
        raise TaskError(f"coloured-digits: strength must be positive, not {strength}")
    if weight is None:
        return
    if regularizer == "none":
        raise TaskError("coloured-digits: weight is that of a regularizer: set regularizer, or remove weight")
    largest = 1 if regularizer == "dropout" else math.inf
    if not 0 <= weight <= largest or weight == math.inf:
        wanted = "from 0 to 1" if regularizer == "dropout" else "not negative"
        raise TaskError(f"coloured-digits: weight must be {wanted} for {regularizer}, not {weight}")
