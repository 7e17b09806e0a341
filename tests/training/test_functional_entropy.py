"""The information of each modality is its definition, and its penalty moves a model; what cannot be used is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from npeff.training import FunctionalInformation, TrainingError
from torch import Tensor, nn

NAMES = ("image", "colour")
SHAPES = {"image": (2, 3), "colour": (4,)}
DEVIATIONS = {"image": torch.tensor([0.5, 1.0, 2.0]).double(), "colour": torch.tensor(0.7).double()}


def batch(n: int = 5, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, *shape, generator=generator).double() for name, shape in SHAPES.items()}


class Linear(nn.Module):
    """Logits that are the sum of linear functions of the modalities."""

    def __init__(self, n_classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.colour = (
            nn.Parameter(torch.randn(n_classes, math.prod(shape), generator=generator).double() / 2)
            for shape in SHAPES.values()
        )

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["image"].flatten(1) @ self.image.T + inputs["colour"] @ self.colour.T


class Smooth(Linear):
    """The same, and a product of both modalities."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        image, colour = inputs["image"].flatten(1) @ self.image.T, inputs["colour"] @ self.colour.T
        return torch.tanh(image) * colour + image + colour


class Fixed(FunctionalInformation):
    """Draws that depend on the example alone."""

    def _drawn(self, value: Tensor, deviation: Tensor) -> Tensor:
        drawn = torch.cat(
            [value + deviation * torch.sin((draw + 1) * (value + 3) * 5) for draw in range(self._samples)]
        )
        return drawn if drawn.requires_grad else drawn.requires_grad_()


def by_definition(model: Linear, inputs: dict[str, Tensor], drawn: dict[str, Tensor], estimate: str) -> list[float]:
    """Each example and draw alone, with dense Jacobians of the logits."""
    found = []
    p_BC = model(inputs).softmax(-1).detach()
    n, total = len(p_BC), len(drawn["image"])
    for name in NAMES:
        deviation = DEVIATIONS[name].expand(SHAPES[name]).flatten()
        values = []
        for row in range(total):
            point = {key: value[row : row + 1].detach() for key, value in drawn.items()}
            f = -(p_BC[row % n] * model(point).log_softmax(-1)[0]).sum().detach()

            def logits(value: Tensor, name: str = name, point: dict[str, Tensor] = point) -> Tensor:
                return model({**point, name: value})[0]

            jacobian = torch.autograd.functional.jacobian(logits, point[name]).flatten(1)
            gradient = jacobian.T @ (model(point).softmax(-1)[0].detach() - p_BC[row % n])
            square = float((deviation * gradient).square().sum())
            values.append(square / float(f) / 2 if estimate == "entropy" else square)
        found.append(sum(values) / total)
    return found


@pytest.mark.parametrize("model", [Linear(), Smooth()], ids=["linear", "smooth"])
@pytest.mark.parametrize("estimate", ["entropy", "variance"])
def test_the_information_is_its_definition(model: Linear, estimate: Any) -> None:
    inputs = batch()
    made = Fixed(NAMES, samples=4, noise=DEVIATIONS, estimate=estimate)
    drawn = {name: made._drawn(inputs[name], DEVIATIONS[name]) for name in NAMES}
    np.testing.assert_allclose(made(model, inputs).tolist(), by_definition(model, inputs, drawn, estimate), rtol=1e-10)


def test_two_classes_with_linear_logits_have_the_closed_form() -> None:
    """The log odds of z are Gaussian, and every draw has the shares of their variances."""
    model, inputs = Linear(2), batch(1)
    generator = torch.Generator().manual_seed(3)
    noise, n = torch.tensor([0.6, 0.9], dtype=torch.float64), 50_000
    found = FunctionalInformation(NAMES, samples=n, noise=noise, generator=generator)(model, inputs).detach()
    odds = [0.6 * (model.image[1] - model.image[0]).detach(), 0.9 * (model.colour[1] - model.colour[0]).detach()]
    variances = torch.stack([each.square().sum() for each in odds])
    torch.testing.assert_close(found / found.sum(), variances / variances.sum(), rtol=1e-10, atol=0)
    before = model(inputs)[0].detach()
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    at = float(before[1] - before[0]) + math.sqrt(float(variances.sum())) * nodes
    p, q = 1 / (1 + np.exp(-at)), float(before.softmax(0)[1])
    f = -(q * np.log(p) + (1 - q) * np.log1p(-p))
    values = (p - q) ** 2 / f / 2 * float(variances.sum())
    mean = (weights * values).sum() / weights.sum()
    spread = math.sqrt((weights * (values - mean) ** 2).sum() / weights.sum())
    assert float(found.sum()) == pytest.approx(mean, abs=4 * spread / math.sqrt(n))


def test_the_information_does_not_depend_on_the_batch_size() -> None:
    model, inputs = Smooth(), batch(8)
    made = Fixed(NAMES, samples=3, noise=DEVIATIONS)
    whole = made(model, inputs)
    for size in (1, 2, 4):
        parts = [made(model, {name: value[i : i + size] for name, value in inputs.items()}) for i in range(0, 8, size)]
        torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-12, atol=0)
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    torch.testing.assert_close(made(model, twice), whole, rtol=1e-12, atol=0)


def test_the_unit_of_a_modality_changes_nothing() -> None:
    model, inputs = Linear(), batch()
    found = []
    for factor in (1.0, 1000.0):
        generator = torch.Generator().manual_seed(0)
        scaled = {**inputs, "colour": factor * inputs["colour"]}
        made = FunctionalInformation(NAMES, noise="std", generator=generator)

        def logits(given: dict[str, Tensor], factor: float = factor) -> Tensor:
            return model({**given, "colour": given["colour"] / factor})

        found.append(made(logits, scaled))
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "share", "target": "image"},
        {"form": "balance"},
        {"form": "reciprocal"},
    ],
    ids=lambda options: options["form"],
)
@pytest.mark.parametrize("estimate", ["entropy", "variance"])
def test_the_gradient_of_the_penalty_is_that_of_finite_differences(options: dict[str, Any], estimate: Any) -> None:
    """Also of the predictions of the examples themselves, which are not detached."""
    model, inputs, step = Smooth(), batch(), 1e-6
    made = Fixed(NAMES, noise=DEVIATIONS, estimate=estimate)

    def penalty() -> Tensor:
        return made.penalty(made(model, inputs), weight=0.7, **options)

    penalty().backward()
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        expected = []
        for entry in range(len(flat)):
            before, sides = float(flat[entry]), []
            for sign in (1, -1):
                flat[entry] = before + sign * step
                sides.append(penalty().item())
            flat[entry] = before
            expected.append((sides[0] - sides[1]) / (2 * step))
        assert parameter.grad is not None
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(parameter.grad.view(-1).numpy(), expected, rtol=1e-4, atol=1e-6 * scale)


def test_the_penalties_are_their_formulas() -> None:
    made, information = FunctionalInformation(NAMES), torch.tensor([0.2, 0.6]).double()
    share = made.penalty(information, target="colour", weight=2.0)
    assert share.item() == pytest.approx(-2 * math.log(0.75))
    balance = made.penalty(information, form="balance", weight=2.0)
    assert balance.item() == pytest.approx(-2 * (math.log(0.75) + math.log(0.25)))
    reciprocal = made.penalty(information, form="reciprocal", weight=2.0)
    assert reciprocal.item() == pytest.approx(2 * (1 / 0.2 + 1 / 0.6))
    for form in ("share", "balance", "reciprocal"):
        target = "image" if form == "share" else None
        nothing = torch.zeros(2, requires_grad=True)
        found = made.penalty(nothing, form=form, target=target, weight=1.0)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(found, nothing)
        assert found.isfinite()
        assert gradient.isfinite().all()


def test_a_certain_prediction_has_no_information() -> None:
    model, inputs = Linear(), {name: value.float() for name, value in batch().items()}
    certain = torch.tensor([300.0, 0.0, -300.0])

    def logits(given: dict[str, Tensor]) -> Tensor:
        return model({name: value.double() for name, value in given.items()}).float() + certain

    found = FunctionalInformation(NAMES)(logits, inputs)
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_share_raises_the_share_of_its_target() -> None:
    inputs, shares = batch(64), {}
    for target in NAMES:
        model, generator = Smooth(), torch.Generator().manual_seed(0)
        made = FunctionalInformation(NAMES, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            information = made(model, inputs)
            made.penalty(information, target=target, weight=1.0).backward()
            optimizer.step()
        shares[target] = (information[0] / information.sum()).item()
    assert shares["image"] > 0.85  # 0.76 before
    assert shares["colour"] < 0.5


def test_measuring_without_gradients_gives_the_same_values() -> None:
    model, inputs = Smooth(), batch()
    made = Fixed(NAMES, noise=DEVIATIONS)
    expected = made(model, inputs)
    with torch.no_grad():
        found = made(model, inputs)
    assert torch.equal(found, expected.detach())
    assert not found.requires_grad
    assert expected.requires_grad


class TextAndImage(nn.Module):
    """Attention over the embeddings of a text, whose padding is masked, and an image."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.fused = nn.Embedding(20, 8), fused
        self.image, self.head = nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        text = given["text"]
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(*[text[:, None]] * 3)[:, 0]
        else:
            scores = (text @ text.mT / math.sqrt(8)).masked_fill(~given["mask"][:, None], -torch.inf)
            mixed = scores.softmax(-1) @ text
        weights = given["mask"].to(text) / given["mask"].sum(1, keepdim=True)
        return self.head(torch.cat([(weights[..., None] * mixed).sum(1), self.image(given["image"]).tanh()], dim=1))


def text_and_image(model: TextAndImage) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (6, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 5])[:, None]
    return {"text": model.words(tokens), "image": torch.randn(6, 6, generator=generator), "mask": mask}


def test_embedded_text_is_a_modality_and_its_table_has_a_gradient() -> None:
    model = TextAndImage(fused=False)
    made = FunctionalInformation(("text", "image"), generator=torch.Generator().manual_seed(0))
    information = made(model, text_and_image(model))
    assert (information > 0).all()
    made.penalty(information, target="image", weight=1.0).backward()
    assert model.words.weight.grad is not None
    assert model.words.weight.grad.abs().sum() > 0


def test_kernels_without_a_second_derivative_are_refused_at_the_first_call() -> None:
    model = TextAndImage(fused=True)
    made = FunctionalInformation(("text", "image"))
    with torch.no_grad():
        assert (made(model, text_and_image(model)) > 0).all()  # which needs none
    assert_refused(
        lambda: made(model, text_and_image(model)),
        "without a second derivative, such as fused attention .* use eager attention",
    )


def assert_refused(call: Callable[[], Any], problem: str) -> None:
    with pytest.raises(TrainingError, match=problem) as found:
        call()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        (("image",), {"samples": 0}, "samples must be a whole number of at least 1, not 0"),
        (("image",), {"samples": 2.0}, "samples must be a whole number"),
        ("image", {}, "modalities must be a list of names"),
        ((), {}, "modalities must be a list of names"),
        (("image", "image"), {}, "different names"),
        (NAMES, {"estimate": "mean"}, "estimate must be 'entropy' or 'variance'"),
        (NAMES, {"noise": 0.1}, "noise must be 'std', a tensor .* image, colour"),
        (NAMES, {"noise": torch.ones(3)}, "noise must be 'std', a tensor"),
        (NAMES, {"noise": {"image": torch.ones(1)}}, "noise must be 'std', a tensor"),
        (NAMES, {"noise": {"image": torch.ones(1), "colour": torch.ones(1).long()}}, "'colour' must be a floating"),
        (NAMES, {"noise": torch.tensor([1.0, -1.0])}, "'colour' must be finite, not negative"),
        (NAMES, {"noise": torch.tensor([0.0, 1.0])}, "'image' must be finite, not negative, and not all 0"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments: Any, options: dict[str, Any], problem: str) -> None:
    assert_refused(lambda: FunctionalInformation(arguments, **options), problem)


def test_wrong_inputs_are_refused_in_one_line() -> None:
    model, inputs, made = Linear(), batch(), FunctionalInformation(NAMES)
    tokens = {**inputs, "colour": torch.ones(5, 4).long()}
    assert_refused(lambda: made(model, tokens), "'colour' must be a floating-point tensor, not torch.int64: give the")
    assert_refused(
        lambda: made(model, {**inputs, "colour": [1.0]}), "'colour' must be a floating-point tensor, not list"
    )
    assert_refused(lambda: made(model, {"image": inputs["image"]}), "inputs have no 'colour': they have image")
    assert_refused(lambda: made(model, inputs["image"]), "inputs must be a mapping")  # type: ignore[arg-type]
    assert_refused(lambda: made(model, batch(1)), "needs at least 2 examples in a batch")
    fewer = {**inputs, "colour": inputs["colour"][:3]}
    assert_refused(lambda: made(model, fewer), r"number of examples on axis 0, not image \(5, 2, 3\), colour \(3, 4\)")
    assert_refused(lambda: made(model, {**inputs, "rate": torch.tensor(0.1)}), "'rate' must be a tensor with the 5")
    assert_refused(lambda: made(lambda given: model(given).sum(1), inputs), r"must return logits \(examples, classes\)")
    blind = Fixed(NAMES, noise=DEVIATIONS)
    for logits in (lambda given: model({**given, "colour": inputs["colour"].repeat(len(given["image"]) // 5, 1)}),
                   lambda given: model(given).detach()):  # fmt: skip
        assert_refused(lambda logits=logits: blind(logits, inputs), "the logits do not depend on '")  # type: ignore[misc]
    wide = FunctionalInformation(NAMES, noise={"image": torch.ones(7), "colour": torch.ones(1)})
    assert_refused(
        lambda: wide(model, inputs), r"'image' have the shape \(7,\), which does not broadcast to .*\(5, 2, 3\)"
    )
    with torch.inference_mode():
        assert_refused(lambda: made(model, inputs), "use torch.no_grad, not inference mode")


def test_wrong_penalties_are_refused_in_one_line() -> None:
    made, information = FunctionalInformation(NAMES), torch.ones(2)
    assert_refused(
        lambda: made.penalty(information, target="sound", weight=1),
        r"one of the modalities \(image, colour\), not 'sound'",
    )
    assert_refused(lambda: made.penalty(information, weight=1), r"needs a target .* \(image, colour\), not None")
    assert_refused(
        lambda: made.penalty(information, form="balance", target="image", weight=1), "target applies to form"
    )
    assert_refused(lambda: made.penalty(information, form="sum", weight=1), "form must be one of share, balance")  # type: ignore[arg-type]
    assert_refused(lambda: made.penalty(information, target="image", weight=-1), "weight must be a number that is not")
    assert_refused(lambda: made.penalty(torch.ones(3), target="image", weight=1), "one entry for each modality")
    alone = FunctionalInformation(["image"])
    for form in ("share", "balance"):
        assert_refused(lambda form=form: alone.penalty(torch.ones(1), form=form, weight=1), "there is only image")  # type: ignore[misc]
    assert alone.penalty(torch.ones(1), form="reciprocal", weight=3).item() == 3
