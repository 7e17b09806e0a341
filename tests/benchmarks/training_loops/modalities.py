"""Regularizers of functional information with equal tuning, on digits with a colour or a caption that gives them away.

The images are divided once: 700 for training, 300 for validation, 797 for the test. A seed draws the cues of the
training images, the initial weights, the order and the noise. The options are chosen by the mean accuracy on biased and
on grey validation images, with other seeds than those that are reported. The unbiased test images choose nothing.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from npeff.input_fisher.attribution import input_information
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import Moments
from npeff.input_fisher.noise import InputNoise, factor_covariance
from npeff.statistics.paired_bootstrap import paired_difference
from npeff.tasks.digits import images_of_digits
from npeff.tasks.planted.coloured_digits import ColouredDigitsTask, initial_network, trained_network
from npeff.tasks.planted.cued_digits import NO_CUE, Caption, Colour, CuedDigits, drawn_cues
from npeff.training import FunctionalInformation
from torch import Tensor, nn

TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
CORRELATION, STRENGTH, SAMPLES, EPOCHS = 0.995, 3.0, 3, 20
TRAIN, VALIDATION = 700, 300
RATES, WEIGHTS, PROBABILITIES = (1e-3, 3e-3, 1e-2), (0.1, 0.3, 1.0, 3.0), (0.25, 0.5, 0.75, 0.9)
ROUNDS = 15


def _trials(**lists: Any) -> list[dict[str, Any]]:
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


METHODS: dict[str, list[dict[str, Any]]] = {
    "none": _trials(weight=[0.0], learning_rate=[5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2], epochs=[10, EPOCHS]),
    "dropout": _trials(weight=PROBABILITIES, learning_rate=RATES, epochs=[EPOCHS]),
    "share": _trials(weight=WEIGHTS, learning_rate=RATES, epochs=[EPOCHS]),
    "balance": _trials(weight=WEIGHTS, learning_rate=RATES, epochs=[EPOCHS]),
    "reciprocal": _trials(weight=[10.0**e for e in range(-12, 1)], learning_rate=[3e-3], epochs=[EPOCHS]),
}


class Data:
    """The images with cues of one kind."""

    def __init__(self, kind: Colour | Caption) -> None:
        self.kind = kind
        targets = images_of_digits()[1]
        order = np.random.default_rng(0).permutation(len(targets))
        self.train, validation, test = np.split(order, [TRAIN, TRAIN + VALIDATION])
        self.targets = targets
        generator = np.random.default_rng(1)
        self.validation = self.conditions(validation, generator)
        self.test = self.conditions(test, generator)

    def conditions(self, numbers: np.ndarray, generator: np.random.Generator) -> dict[str, CuedDigits]:
        """The same images with cues as in training, with random ones, and without."""
        targets = self.targets[numbers]
        cues = {
            "biased": drawn_cues(targets, CORRELATION, generator),
            "unbiased": drawn_cues(targets, None, generator),
            "grey": torch.full_like(targets, NO_CUE),
        }
        return {name: CuedDigits(numbers, drawn, self.kind) for name, drawn in cues.items()}

    def trained(self, method: Any, options: dict[str, Any], seed: int) -> nn.Module:
        cues = drawn_cues(self.targets[self.train], CORRELATION, np.random.default_rng(seed))
        images = CuedDigits(self.train, cues, self.kind)
        return trained_network(images, regularizer=method, samples=SAMPLES, seed=seed, **options)


@torch.no_grad()
def correct(model: nn.Module, images: CuedDigits) -> np.ndarray:
    """Whether each prediction is right."""
    found: Tensor = model(images.images, images.encoded).argmax(1) == images.targets
    return found.double().numpy()


def image_share(model: nn.Module, images: CuedDigits) -> float:
    """The mean share of the image, of the first 200 images, as `npeff inputs` computes it by default."""
    task = ColouredDigitsTask(cue=images.kind.name)  # for its inputs
    first = task.inputs(model, images.batch(range(200)))
    flat = FlatInputs.of(first.values.detach(), first.logits, None)
    everything = task.inputs(model, images.batch(range(len(images))))
    moments = Moments.of(FlatInputs.of(everything.values, everything.logits, None), "full")
    noise = InputNoise(moments.mean_PF, factor_covariance(moments, "full", 1e-4), 0.15)
    with torch.no_grad():
        classes = flat.logits(flat.values_BPF).argmax(1)
    found = input_information(flat, noise, range(200), samples=32, before=classes, classes_B=classes)
    of_image = found.positions_BP[:, :64].sum(1) / found.positions_BP.sum(1)
    return float(of_image.nanmean())


def measured(data: Data, model: nn.Module) -> dict[str, Any]:
    accuracies = {name: float(correct(model, images).mean()) for name, images in data.test.items()}
    return accuracies | {"share": image_share(model, data.test["unbiased"])}


def compared(found: dict[str, Any], methods: Sequence[str], save: Callable[[], None]) -> None:
    """Tune each method on the coloured digits, and measure it with other seeds, also with captions.

    Args:
        found: The results, which are added to. Methods with results are not measured again.
        methods: The methods to measure.
        save: Called after each method.
    """
    colour, caption = (found.setdefault(cue, {}) for cue in ("colour", "caption"))
    data = Data(Colour(STRENGTH))
    for method, trials in METHODS.items():
        if method in colour or method not in methods:
            continue
        tried = []
        for options in trials:
            models = [data.trained(method, options, seed) for seed in TUNING_SEEDS]
            score = np.mean([correct(m, data.validation[name]).mean() for m in models for name in ("biased", "grey")])
            row = {"options": options, "validation": float(score)}
            if method == "reciprocal":
                each = [measured(data, model) for model in models]
                row["test"] = {name: float(np.mean([of[name] for of in each])) for name in each[0]}
            tried.append(row)
            print(method, row, flush=True)
        options = max(tried, key=lambda row: row["validation"])["options"]
        colour[method] = _of_seeds(data, method, options) | {"trials": tried}
        save()
    texts = Data(Caption())
    for method in ("none", "dropout", "share"):  # with the options that were chosen for colours
        if method not in caption and method in colour and method in methods:
            caption[method] = _of_seeds(texts, method, colour[method]["options"])
            save()
    for cue in (colour, caption):
        _add_differences(cue)


def _of_seeds(data: Data, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Measure a method with all seeds. ``right``: whether each unbiased prediction is right, by seed."""
    models = [data.trained(method, options, seed) for seed in SEEDS]
    of_seeds = [measured(data, model) for model in models]
    mean = {name: float(np.mean([each[name] for each in of_seeds])) for name in of_seeds[0]}
    print(data.kind.name, method, options, mean, flush=True)
    right = [correct(model, data.test["unbiased"]).astype(int).tolist() for model in models]
    return {"options": options, "mean": mean, "of_seeds": of_seeds, "right": right}


def _add_differences(found: dict[str, Any]) -> None:
    """Add paired bootstraps over the images, of unbiased accuracies."""
    right = {method: np.array(row["right"], float) for method, row in found.items()}
    if not {"none", "dropout"} <= right.keys():
        return
    for method, values in right.items():
        images = np.tile(np.arange(values.shape[1]), len(values))
        for other in ("none", "dropout"):
            interval = paired_difference(values.ravel(), right[other].ravel(), images)
            found[method][f"minus {other}"] = [interval.mean, interval.low, interval.high]


def cost() -> dict[str, Any]:
    """Times of a step with and without a penalty, in alternating rounds of ten steps."""
    found = {}
    for kind in (Colour(STRENGTH), Caption()):
        data = Data(kind)
        images = CuedDigits(data.train, data.targets[data.train], kind)
        steps = {str(samples): _step(images, kind, samples) for samples in (0, 1, 3)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(ROUNDS + 2):
            for name, step in steps.items():
                began = time.process_time()
                for _ in range(10):
                    step()
                if turn >= 2:
                    seconds[name].append((time.process_time() - began) / 10)
        ratios = {
            name: [value / plain for value, plain in zip(values, seconds["0"], strict=True)]
            for name, values in seconds.items()
        }
        found[kind.name] = {
            "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
            "relative": {name: [statistics.median(of), min(of), max(of)] for name, of in ratios.items()},
        }
    return found


def _step(images: CuedDigits, kind: Colour | Caption, samples: int) -> Callable[[], None]:
    model: Any = initial_network(kind, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    made = FunctionalInformation(("image", kind.name), samples=samples) if samples else None
    batch = images.batch(range(32))

    def step() -> None:
        optimizer.zero_grad()
        given = model.modalities(batch["image"], batch["cue"])
        loss = nn.functional.cross_entropy(model.classify(given), images.targets[:32])
        if made is not None:
            loss = loss + made.penalty(made(model.classify, given), target="image", weight=1.0)
        loss.backward()
        optimizer.step()

    return step
