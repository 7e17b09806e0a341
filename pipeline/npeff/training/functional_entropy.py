"""Functional Fisher information of the modalities of a model, as a regularizer (Gat, Schwartz, Schwing & Hazan 2020).

For an example x and inputs z ~ N(x, Σ), where Σ is diagonal, let f(z) = −Σ_y p(y | x) log p(y | z): the cross entropy
between the prediction for x and that for z. The log-Sobolev inequality bounds the functional entropy of f, and the
Poincaré inequality its variance (NeurIPS 2020, arXiv 2010.10802). Both bounds are sums over the modalities m:

    Ent(f) ≤ Σ_m I_m,   I_m = ½ E[⟨Σ_m ∇_m f, ∇_m f⟩ / f]        estimate="entropy"
    Var(f) ≤ Σ_m I_m,   I_m =   E[⟨Σ_m ∇_m f, ∇_m f⟩]            estimate="variance"

The mean is over the examples of a batch and the draws of z. Each example has its own f and its own gradient, so that
I_m does not depend on the number of examples. A penalty of I changes what a model depends on.

Differences from the code that the authors published. It divides the gradient of a batch's mean loss by that loss, so
that its I_m is proportional to 1 / (examples · draws)², and its weights do not transfer between batch sizes. It leaves
out Σ_m and ½, uses the binary cross entropy of each class, and takes the 2-norm of the reciprocals, which is their sum
up to a factor of √M. As in the paper and in that code, p(y | x) is not detached: it is a part of f, and the penalty
changes it too. The full text of the paper was not at hand for this; the abstract and the code were.

Legend: B examples, S draws, M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from npeff.errors import first_line
from npeff.training.checks import is_count, is_number
from npeff.training.errors import TrainingError

Form = Literal["share", "balance", "reciprocal"]

_ESTIMATES = ("entropy", "variance")
_FORMS = ("share", "balance", "reciprocal")


class FunctionalInformation:
    """The functional Fisher information I_m of each modality, with a gradient for the parameters of the model.

    A call costs one pass forward for the predictions, and a pass forward and backward of S times as many examples. The
    gradient of the result needs second derivatives of the model. Batch normalization in training mode connects the
    examples of a batch, and I_m is then only an approximation.

    Args:
        modalities: Names of the modalities, which are entries of the inputs.
        samples: Number S of draws of the noise.
        noise: The standard deviations, whose squares are the diagonal of Σ. ``std``: those of each entry over the
            examples of the batch, so that constant entries have no noise. For noise that does not depend on the batch,
            give a tensor (M,) of one standard deviation for each modality, or a mapping from names to tensors that
            broadcast to the inputs, such as the deviations in the training set.
        estimate: ``entropy`` or ``variance``, see above.
        generator: Source of the noise; None for the default one of torch.

    Raises:
        TrainingError: An option is out of bounds.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        *,
        samples: int = 3,
        noise: Literal["std"] | Tensor | Mapping[str, Tensor] = "std",
        estimate: Literal["entropy", "variance"] = "entropy",
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(modalities, str) or not modalities or not all(isinstance(name, str) for name in modalities):
            raise TrainingError(f"modalities must be a list of names of inputs, not {modalities!r}")
        if len(set(modalities)) < len(modalities):
            raise TrainingError(f"modalities must have different names, not {', '.join(modalities)}")
        if not is_count(samples):
            raise TrainingError(f"samples must be a whole number of at least 1, not {samples!r}")
        if estimate not in _ESTIMATES:
            raise TrainingError(f"estimate must be 'entropy' or 'variance', not {estimate!r}")
        self.modalities = tuple(modalities)
        self._samples, self._estimate, self._generator = samples, estimate, generator
        self._noise = _given_noise(self.modalities, noise)
        self._is_checked = False

    def __call__(self, logits: Callable[[dict[str, Any]], Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Estimate the information of each modality from the examples of a batch.

        With gradients disabled (`torch.no_grad`), the result has none, and less memory is needed.

        Args:
            logits: Function that takes inputs like those given, of S·B examples, and returns logits (S·B, C). An
                example must not depend on the others.
            inputs: Tensors by name, each with the B examples on axis 0. The modalities are floating point. Text is
                given as the embeddings of its tokens. The other entries, such as masks, are not changed.

        Returns:
            The information (M,) in nats, in the order of the modalities.

        Raises:
            TrainingError: A modality is missing, is no floating-point tensor, or has no effect on the logits; or the
                model has an operation without a second derivative.
        """
        wanted = torch.is_grad_enabled()
        values = self._values(inputs)
        n_examples = len(values[0])
        deviations = self._deviations(values)
        p_BC = _logits_of(logits, dict(inputs), n_examples).softmax(-1)
        with torch.enable_grad():
            repeated = {name: _repeated(name, each, self._samples, n_examples) for name, each in inputs.items()}
            drawn = [self._drawn(value, deviation) for value, deviation in zip(values, deviations, strict=True)]
            repeated.update(zip(self.modalities, drawn, strict=True))
            log_p = _logits_of(logits, repeated, self._samples * n_examples).log_softmax(-1)
            f = -(p_BC.repeat(self._samples, 1) * log_p).sum(-1)
            gradients = self._gradients(f, drawn, create_graph=wanted)
            squares = [_square(g, each) for g, each in zip(gradients, deviations, strict=True)]
            information = torch.stack([self._mean(square, f) for square in squares])
        if not wanted:
            return information.detach()
        if not self._is_checked:
            _check_second_derivatives(information, drawn)
            self._is_checked = True
        return information

    def penalty(self, information: Tensor, *, form: Form = "share", target: str | None = None, weight: float) -> Tensor:
        """Return a penalty, a number to add to the loss.

        Args:
            information: What a call returned.
            form: ``share``: −weight · log(I_target / Σ_m I_m), so that the model depends on one modality rather than on
                the others. ``balance``: −weight · Σ_m log(I_m / Σ_m I_m), so that it depends on all alike, which does
                not remove a bias. ``reciprocal``: weight · Σ_m 1 / I_m, the form of the paper, so that it depends more
                on every modality.
            target: The modality of ``share``.
            weight: Factor λ.

        Raises:
            TrainingError: An option is out of bounds, there are fewer than two modalities for ``share`` or ``balance``,
                or the target is unknown.
        """
        if form not in _FORMS:
            raise TrainingError(f"form must be one of {', '.join(_FORMS)}, not {form!r}")
        if not is_number(weight) or weight < 0:
            raise TrainingError(f"weight must be a number that is not negative, not {weight!r}")
        n, names = len(self.modalities), ", ".join(self.modalities)
        if not isinstance(information, Tensor) or information.shape != (n,):
            raise TrainingError(f"information must be a tensor with one entry for each modality ({names})")
        if form != "reciprocal" and n < 2:
            raise TrainingError(f"form={form!r} compares modalities, and there is only {names}: give two or more")
        if form != "share" and target is not None:
            raise TrainingError(f"target applies to form='share': remove it, or choose that form instead of {form!r}")
        if form == "share" and target not in self.modalities:
            raise TrainingError(f"form='share' needs a target that is one of the modalities ({names}), not {target!r}")
        positive = information.clamp_min(torch.finfo(information.dtype).tiny)
        if form == "reciprocal":
            return weight * (1 / positive).sum()
        log_shares = positive.log() - positive.sum().log()
        return -weight * (log_shares.sum() if target is None else log_shares[self.modalities.index(target)])

    def _values(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the modalities of a batch."""
        if not isinstance(inputs, Mapping):
            raise TrainingError(f"inputs must be a mapping from names to tensors, not {type(inputs).__name__}")
        if torch.is_inference_mode_enabled():
            raise TrainingError("the information needs gradients of the inputs: use torch.no_grad, not inference mode")
        for name in self.modalities:
            if name not in inputs:
                raise TrainingError(f"inputs have no {name!r}: they have {', '.join(map(str, inputs)) or 'nothing'}")
            value = inputs[name]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TrainingError(
                    f"modality {name!r} must be a floating-point tensor, not {kind}",
                    "give the embeddings of tokens and categories",
                )
        values: list[Tensor] = [inputs[name] for name in self.modalities]
        if any(value.dim() == 0 or len(value) != len(values[0]) or not len(value) for value in values):
            shapes = ", ".join(f"{name} {tuple(inputs[name].shape)}" for name in self.modalities)
            raise TrainingError(f"the modalities must have the same number of examples on axis 0, not {shapes}")
        return values

    def _deviations(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the standard deviations of the noise of each modality, which broadcast to its values."""
        if self._noise is None:
            if len(values[0]) < 2:
                raise TrainingError("noise='std' needs at least 2 examples in a batch: give the standard deviations")
            return [value.detach().std(0) for value in values]
        found = []
        for name, value in zip(self.modalities, values, strict=True):
            deviation = self._noise[name].to(value.device, value.dtype)
            try:
                fits = torch.broadcast_shapes(deviation.shape, value.shape) == value.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise TrainingError(
                    f"noise: the standard deviations of {name!r} have the shape {tuple(deviation.shape)}, which does "
                    f"not broadcast to the values {tuple(value.shape)}"
                )
            found.append(deviation)
        return found

    def _drawn(self, value: Tensor, deviation: Tensor) -> Tensor:
        """Return S draws of the inputs around a modality (S·B, ...), from which gradients can be computed."""
        shape = (self._samples, *value.shape)
        device = value.device if self._generator is None else self._generator.device
        normal = torch.randn(shape, generator=self._generator, device=device, dtype=value.dtype).to(value.device)
        drawn = (value + normal * deviation).flatten(0, 1)
        return drawn if drawn.requires_grad else drawn.requires_grad_()

    def _gradients(self, f: Tensor, drawn: Sequence[Tensor], *, create_graph: bool) -> list[Tensor]:
        found: Sequence[Tensor | None] = [None] * len(drawn)
        if f.requires_grad:
            found = torch.autograd.grad(f.sum(), drawn, create_graph=create_graph, allow_unused=True)
        for name, gradient in zip(self.modalities, found, strict=True):
            if gradient is None:
                raise TrainingError(
                    f"the logits do not depend on {name!r} by differentiable operations",
                    "compute them from the inputs that the function is given",
                )
        return [gradient for gradient in found if gradient is not None]

    def _mean(self, squares: Tensor, f: Tensor) -> Tensor:
        """Return I_m from ⟨Σ_m ∇_m f, ∇_m f⟩ of each draw."""
        if self._estimate == "variance":
            return squares.mean()
        is_zero = f <= 0  # its gradient is zero too
        return torch.where(is_zero, 0.0, squares / torch.where(is_zero, 1.0, f)).mean() / 2


def _given_noise(modalities: Sequence[str], noise: object) -> dict[str, Tensor] | None:
    """Return the standard deviations by modality; None for those of the batch."""
    if isinstance(noise, str) and noise == "std":
        return None
    if isinstance(noise, Tensor) and noise.shape == (len(modalities),):
        noise = dict(zip(modalities, noise, strict=True))
    if not isinstance(noise, Mapping) or set(noise) != set(modalities):
        raise TrainingError(
            "noise must be 'std', a tensor with one standard deviation for each modality, or a mapping with a tensor "
            f"for each of {', '.join(modalities)}"
        )
    for name, value in noise.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TrainingError(f"noise: the standard deviations of {name!r} must be a floating-point tensor")
        if not bool((value.isfinite() & (value >= 0)).all()) or not bool((value > 0).any()):
            raise TrainingError(
                f"noise: the standard deviations of {name!r} must be finite, not negative, and not all 0"
            )
    return {name: value.detach() for name, value in noise.items()}


def _logits_of(logits: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any], n_examples: int) -> Tensor:
    found = logits(inputs)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != n_examples:
        kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise TrainingError(f"the function must return logits (examples, classes) of {n_examples} examples, not {kind}")
    return found


def _repeated(name: str, value: Any, samples: int, n_examples: int) -> Any:
    """Return S copies of an input, one after another."""
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != n_examples:
        raise TrainingError(
            f"inputs: {name!r} must be a tensor with the {n_examples} examples on axis 0",
            "keep what all examples share in the function of the logits",
        )
    return value.repeat(samples, *[1] * (value.dim() - 1))


def _square(gradient: Tensor, deviation: Tensor) -> Tensor:
    """Return ⟨Σ g, g⟩ of the gradient g of each draw."""
    if deviation.dim() == gradient.dim() and len(deviation) > 1:  # one for each example
        deviation = deviation.repeat(len(gradient) // len(deviation), *[1] * (deviation.dim() - 1))
    return (gradient * deviation).square().flatten(1).sum(1)


def _check_second_derivatives(information: Tensor, drawn: Sequence[Tensor]) -> None:
    """Check that the gradient of the information can be computed, by that for the inputs."""
    try:
        torch.autograd.grad(information.sum(), drawn, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise TrainingError(
            f"the model has an operation without a second derivative, such as fused attention ({first_line(error)})",
            "use eager attention (attn_implementation='eager'), and no cuDNN RNN",
        ) from None
