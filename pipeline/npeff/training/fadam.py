"""FAdam: Adam as a natural gradient method with a diagonal empirical Fisher (Hwang 2024, arXiv 2405.12807).

With the gradient g of a batch's mean loss, f the running mean of its squares, and step t = 1, 2, …:

    β̂2 = β2 (1 − β2^(t−1)) / (1 − β2^t);   f ← β̂2 f + (1 − β̂2) g²
    ḡ = g / (f^p + ε̂);   ḡ ← ḡ / max(1, RMS(ḡ) / c);   m ← β1 m + (1 − β1) ḡ
    w̄ = θ / (f^p + ε̂);   w̄ ← w̄ / max(1, RMS(w̄) / c);   θ ← θ − η (m + λ w̄)

RMS is over the entries of one tensor. f is Adam's v / (1 − β2^t), so that FAdam differs from Adam in three points: the
momentum is that of preconditioned gradients, it is clipped for each tensor, and the decay is preconditioned and clipped
as well. f is the square of the gradient of a *batch mean*. It is not the Fisher, and not the mean of squared gradients
of examples (Kunstner et al. 2019).

Sources. The last version of the paper was not at hand. Public implementations were compared, and they disagree on ε̂:
ε max(1, RMS(g)) in lessw2020/FAdam_PyTorch, ε min(1, RMS(g)) in earlier forms of it and of pytorch_optimizer, and
min(ε, 0.01 RMS(g))^(2p) in pytorch_optimizer 4.1.0. `epsilon="rms"` is the last of them, with ε^(2p) for a gradient of
zeros, and `epsilon="fixed"` is ε^(2p). All but pytorch_optimizer 4.1.0 multiply by c what is below the limit, too. Here
c is a limit only.

An entry whose gradient has always been zero (a dead unit, an embedding that is not used) has f = 0 and w̄ = θ / ε̂, which
is very large. The limit on RMS(w̄) then gives almost all of the decay of a tensor to such entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from npeff.training.checks import is_count, is_number
from npeff.training.diagonals import Tensors, check_diagonal, check_shape, named_tensors
from npeff.training.errors import TrainingError

_RMS_FACTOR = 0.01
"""The factor of RMS(g) in the adaptive ε̂."""

_MOMENTS = ("fisher", "momentum")

_PIECE = 2**17
"""Number of entries of a large tensor that are updated together on a CPU."""


class FAdam(Optimizer):
    """Natural gradient steps with a diagonal empirical Fisher, momentum and preconditioned decay.

    All options except the last three may differ between parameter groups. The state of parameters in half precision
    is float32.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Step size η.
        betas: β1 of the momentum and β2 of the Fisher.
        eps: ε.
        epsilon: ``rms`` for an ε̂ that is smaller for small gradients, ``fixed`` for a constant.
        clip: Limit c on the RMS of a tensor's natural gradient and decay. None for no limit.
        power: Exponent p of the Fisher.
        weight_decay: λ.
        debias_momentum: Divide m by 1 − β1^t as Adam does. Without it, the first 1/(1 − β1) steps are shorter.
        foreach: Update all tensors of a group on a GPU, and all small ones on a CPU, together. False takes less memory
            and gives the same values.
        initial_fisher: A diagonal Fisher from which f starts, by parameter name: a mapping or a safetensors file, such
            as a run's ``diagonal_fisher.safetensors``. Its entries are means over examples of squared gradients. They
            are divided by ``batch_size``, which gives the expected square of the mean of that many independent
            gradients with mean zero. ``params`` must be named. Other parameters start as without it.
        initial_steps: Number of steps that the initial Fisher counts for in the running mean.
        batch_size: Number of examples of a batch, for the initial Fisher.

    Raises:
        TrainingError: An option is out of bounds, a parameter is complex, or the initial Fisher does not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        epsilon: Literal["fixed", "rms"] = "rms",
        clip: float | None = 1.0,
        power: float = 0.5,
        weight_decay: float = 0.1,
        debias_momentum: bool = False,
        foreach: bool = True,
        initial_fisher: Tensors | None = None,
        initial_steps: int = 100,
        batch_size: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "epsilon": epsilon,
            "clip": clip,
            "power": power,
            "weight_decay": weight_decay,
            "debias_momentum": debias_momentum,
            "foreach": foreach,
        }
        super().__init__(params, defaults)
        if initial_fisher is not None:
            self._start_from(initial_fisher, initial_steps, batch_size)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own options.

        Raises:
            TrainingError: An option is out of bounds, or a parameter is complex.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise TrainingError("FAdam does not support complex parameters: train their real views, or use another one")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Computes the loss and the gradients again.

        Returns:
            The loss of the closure; None without a closure.

        Raises:
            TrainingError: A gradient is sparse. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if any(p.grad.is_sparse for parameters in moving for p in parameters):
            raise TrainingError("FAdam does not support sparse gradients: set sparse=False in the embedding")
        for group, parameters in zip(self.param_groups, moving, strict=True):
            for together in _together(parameters, group["foreach"]):
                self._update(group, together)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of another optimizer of the same parameters.

        Args:
            state_dict: The output of `state_dict`.
        """
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            dtype = _state_dtype(parameter)
            if parameter.dtype == dtype or number not in state_dict["state"]:
                continue
            for name in _MOMENTS:  # torch has rounded them to the dtype of the parameter
                value = state_dict["state"][number][name]
                self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)

    def _start_from(self, source: Tensors, initial_steps: int, batch_size: int | None) -> None:
        what = "initial_fisher"
        if not is_count(initial_steps):
            raise TrainingError(f"initial_steps must be a whole number of at least 1, not {initial_steps!r}")
        if batch_size is None or not is_count(batch_size):
            raise TrainingError(
                f"initial_fisher needs batch_size, the number of examples of a batch (at least 1), not {batch_size!r}"
            )
        if any("param_names" not in group for group in self.param_groups):
            raise TrainingError("initial_fisher needs names: give model.named_parameters() to FAdam")
        fisher = named_tensors(source, what).values
        check_diagonal(fisher, what)
        pairs = [zip(group["param_names"], group["params"], strict=True) for group in self.param_groups]
        own = {name: parameter for pair in pairs for name, parameter in pair}
        for name, values in fisher.items():
            if name not in own:
                raise TrainingError(
                    f"{what}: {name!r} is no parameter of the optimizer", "rename the entry or leave it out"
                )
            check_shape(name, tuple(values.shape), own[name], what)
        for name, values in fisher.items():
            state = self._state_of(own[name])
            state["fisher"].copy_(values.to(state["fisher"]) / batch_size)
            state["initial_steps"] = initial_steps

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"], state["initial_steps"] = 0, 0
            for name in _MOMENTS:
                state[name] = torch.zeros_like(
                    parameter, dtype=_state_dtype(parameter), memory_format=torch.preserve_format
                )
        return state

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update parameters of one dtype on one device."""
        states = [self._state_of(parameter) for parameter in parameters]
        for state in states:
            state["step"] += 1
        dtype = _state_dtype(parameters[0])
        gradients = [parameter.grad.to(dtype) for parameter in parameters if parameter.grad is not None]
        values = [parameter.to(dtype) for parameter in parameters]  # the parameters themselves if they have this dtype
        fishers, momenta = ([state[name] for state in states] for name in _MOMENTS)
        pieces = _pieces([values, gradients, fishers, momenta])
        beta1, beta2 = group["betas"]
        kept = [_debiased(beta2, state["step"] + state["initial_steps"]) for state in states]
        added, epsilons = [1 - beta for beta in kept], _epsilons(group, gradients)
        rate, decay, clip = float(group["lr"]), group["weight_decay"], group["clip"]
        bases, steps, decays = [], [], []
        for theta, g, f, _ in pieces:
            torch._foreach_mul_(f, kept)
            torch._foreach_addcmul_(f, g, g, added)
            base = torch._foreach_sqrt(f) if group["power"] == 0.5 else torch._foreach_pow(f, group["power"])
            torch._foreach_add_(base, epsilons)
            bases.append(base)
            if clip is not None:
                steps.append(torch._foreach_norm(torch._foreach_div(g, base)))
            if clip is not None and decay:
                decays.append(torch._foreach_norm(torch._foreach_div(theta, base)))
        of_steps = [(1 - beta1) * scale for scale in _scales(steps, values, clip)]
        of_decays = [-rate * decay * scale for scale in _scales(decays, values, clip)]
        debiasing = group["debias_momentum"]
        rates = [-rate / (1 - beta1 ** state["step"]) if debiasing else -rate for state in states]
        for (theta, g, _, m), base in zip(pieces, bases, strict=True):
            torch._foreach_mul_(m, beta1)
            torch._foreach_addcdiv_(m, g, base, of_steps)
            if decay:
                torch._foreach_addcdiv_(theta, theta, base, of_decays)
            if len(set(rates)) == 1:
                torch._foreach_add_(theta, m, alpha=rates[0])
            else:
                torch._foreach_add_(theta, torch._foreach_mul(m, rates))
        if parameters[0].dtype != dtype:
            torch._foreach_copy_(parameters, values)


def _together(parameters: list[Tensor], foreach: bool) -> list[list[Tensor]]:
    """Divide parameters into lists that are updated together: those of one dtype on one device.

    On a CPU, a large tensor is alone in its list.
    """
    found: dict[Any, list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        alone = not foreach or (parameter.device.type == "cpu" and parameter.numel() > _PIECE)
        found.setdefault((parameter.device, parameter.dtype, number if alone else None), []).append(parameter)
    return list(found.values())


def _pieces(columns: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """Divide a large tensor on a CPU, with its gradient and its state, into pieces that fit into the cache.

    Operations on lists pass over the memory of all tensors once for each operation. On a CPU this takes twice as long.
    """
    first = columns[0][0]
    large = len(columns[0]) == 1 and first.device.type == "cpu" and first.numel() > _PIECE
    if not large or not all(column[0].is_contiguous() for column in columns):
        return [columns]
    split = (column[0].view(-1).split(_PIECE) for column in columns)
    return [[[part] for part in parts] for parts in zip(*split, strict=True)]


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _debiased(beta2: float, step: int) -> float:
    """Return β̂2 of a step. It is 0 in the first step, so that f does not depend on its initial value."""
    return beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)


def _epsilons(group: dict[str, Any], gradients: list[Tensor]) -> list[float]:
    """Return ε̂ of each tensor."""
    eps, exponent = group["eps"], 2 * group["power"]
    if group["epsilon"] == "fixed":
        return [eps**exponent] * len(gradients)
    rms = _rms([torch._foreach_norm(gradients)], gradients)
    return [(min(eps, _RMS_FACTOR * each) if each > 0 else eps) ** exponent for each in rms]


def _scales(norms: list[Any], tensors: list[Tensor], clip: float | None) -> list[float]:
    """Return 1 / max(1, RMS / c) of each tensor, from the norms of its pieces; 1 without norms."""
    if clip is None or not norms:
        return [1.0] * len(tensors)
    return [1 / max(1.0, rms / clip) for rms in _rms(norms, tensors)]


def _rms(norms: list[Any], tensors: list[Tensor]) -> list[float]:
    # one transfer for all tensors: on a GPU, each transfer waits for the work before it
    together = torch.stack([torch.stack(list(of_piece)) for of_piece in norms])
    norms_T = torch.linalg.vector_norm(together, dim=0).tolist()
    return [norm / math.sqrt(max(tensor.numel(), 1)) for norm, tensor in zip(norms_T, tensors, strict=True)]


def _check_options(options: dict[str, Any]) -> None:
    """Raise an error that names an option that is out of bounds."""
    betas = options["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)):
        raise TrainingError(f"betas must be two numbers from 0 to below 1, not {betas!r}")
    for name in ("lr", "weight_decay"):
        if not (is_number(options[name]) and options[name] >= 0):
            raise TrainingError(f"{name} must be a number that is not negative, not {options[name]!r}")
    for name in ("eps", "power", "clip"):
        if options[name] is None and name == "clip":
            continue
        if not (is_number(options[name]) and options[name] > 0):
            raise TrainingError(f"{name} must be a number above 0, not {options[name]!r}")
    if options["eps"] ** (2 * options["power"]) < torch.finfo(torch.float32).tiny:
        raise TrainingError("eps to the power 2 · power is 0 in float32: give a larger eps")
    if options["epsilon"] not in ("fixed", "rms"):
        raise TrainingError(f"epsilon must be 'fixed' or 'rms', not {options['epsilon']!r}")
