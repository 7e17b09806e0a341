"""Kronecker-factored Fishers (K-FAC): for the weights of a layer, F ≈ G ⊗ A with A = E aaᵀ and G = E δδᵀ.

a are the inputs of the layer, with a 1 appended if it has a bias, and δ the gradients of the label rows at its outputs
(Martens & Grosse, arXiv 1503.05671). If a layer is applied at several positions, such as those of a convolution or of a
sequence, the terms of different positions are taken as independent (Grosse & Martens, arXiv 1602.01407):

    A = mean over examples and positions of a_t a_tᵀ,    G = mean over examples of Σ_t Σ_r δ_tr δ_trᵀ.

Only positions with a gradient count, so that padding has no effect. Parameters of other layers have their diagonal.

Legend: B batch, T positions, R rank, o outputs and i inputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from npeff.fisher import diagonal_sum
from npeff.gradients import Collected, ParameterLayout, UnsupportedModelError
from npeff.gradients.layer_rules import convolution, linear, rule_for
from npeff.gradients.outer import Outer
from npeff.training.checks import check_gradients, checked_damping
from npeff.training.natural_gradient import Direction


@dataclass(frozen=True)
class Layer:
    """The parameters of a layer that have one Kronecker product, with their names in the layout."""

    weight: str
    bias: str | None
    inputs_first: bool
    """Whether the weight is stored as inputs × outputs."""


def kronecker_layers(model: nn.Module, layout: ParameterLayout) -> list[Layer]:
    """Return the layers of a model that have a Kronecker product: linear layers, and convolutions with one group.

    Layers that share a parameter with another module have none.
    """
    names = {id(value): name for name, value in model.named_parameters() if name in layout.names}
    owned: dict[str, int] = {}
    for module in model.modules():
        for value in module._parameters.values():
            if id(value) in names:
                owned[names[id(value)]] = owned.get(names[id(value)], 0) + 1
    found = []
    for module in model.modules():
        own = {key: names[id(value)] for key, value in module._parameters.items() if id(value) in names}
        alone = all(owned[name] == 1 for name in own.values()) and getattr(module, "groups", 1) == 1
        if alone and "weight" in own and (rule := rule_for(module, own)) in (linear, convolution):
            inputs_first = rule is linear and not isinstance(module, nn.Linear)
            found.append(Layer(own["weight"], own.get("bias"), inputs_first))
    return found


@dataclass
class KroneckerSums:
    """Sums over examples, from which the factors are made."""

    layers: list[Layer]
    shapes: dict[str, tuple[int, ...]]
    """Shapes of all parameters."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Σ a aᵀ by the name of the weight, float64."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Σ δ δᵀ by the name of the weight, float64."""
    positions: dict[str, int] = field(default_factory=dict)
    """Number of positions with a gradient, by the name of the weight."""
    diagonals: dict[str, Tensor] = field(default_factory=dict)
    """Σ f of the other parameters, float64."""
    n_examples: int = 0

    @classmethod
    def empty(cls, layers: list[Layer], layout: ParameterLayout, device: torch.device | None = None) -> KroneckerSums:
        """Return the sums over no example, for the parameters of a layout."""
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        sums = cls(layers, dict(shapes))
        for layer in layers:
            shape = shapes.pop(layer.weight)
            n_outputs = shape[-1] if layer.inputs_first else shape[0]
            n_inputs = math.prod(shape) // n_outputs + (layer.bias is not None)
            sums.inputs[layer.weight] = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=device)
            sums.outputs[layer.weight] = torch.zeros(n_outputs, n_outputs, dtype=torch.float64, device=device)
            sums.positions[layer.weight] = 0
            if layer.bias is not None:
                del shapes[layer.bias]
        for name, shape in shapes.items():
            sums.diagonals[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        return sums

    @torch.no_grad()
    def add(self, collected: Collected, used_B: Tensor) -> None:
        """Add the examples of a batch that are marked in ``used_B``.

        Raises:
            UnsupportedModelError: The rows of a layer are no outer products, for example because the layer is used in
                another way besides its call.
        """
        scales_B = collected.labels.scales_B
        used_B = used_B.to(scales_B.device)
        for layer in self.layers:
            part = collected.contributions.get(layer.weight)
            if part is None:  # the logits do not depend on it
                continue
            if not isinstance(part, Outer):
                raise UnsupportedModelError(
                    f"the rows of {layer.weight!r} are no outer products in some batch, so that K-FAC does not apply: "
                    "use another kind of natural gradient"
                )
            self._add_layer(layer, part.examples(used_B), scales_B[used_B])
        totals = {name: values[None] for name, values in self.diagonals.items()}
        others = {name: part for name, part in collected.contributions.items() if name in totals}
        diagonal_sum(others, scales_B, used_B[None].double(), totals)
        self.n_examples += int(used_B.sum())

    def _add_layer(self, layer: Layer, part: Outer, scales_B: Tensor) -> None:
        live_BT = part.live_BGT()[:, 0]
        inputs_ni = part.inputs_BGTi[:, 0][live_BT]
        if layer.bias is not None:
            inputs_ni = torch.cat([inputs_ni, inputs_ni.new_ones(len(inputs_ni), 1)], dim=1)
        self.inputs[layer.weight] += inputs_ni.T @ inputs_ni
        self.positions[layer.weight] += len(inputs_ni)
        for deltas_BGTo in part.deltas:
            deltas_no = (deltas_BGTo[:, 0] * scales_B.to(deltas_BGTo)[:, None, None])[live_BT]
            self.outputs[layer.weight] += deltas_no.T @ deltas_no

    def cpu(self) -> KroneckerSums:
        """Return the sums on the CPU."""
        inputs, outputs, diagonals = (
            {name: values.cpu() for name, values in each.items()}
            for each in (self.inputs, self.outputs, self.diagonals)
        )
        return replace(self, inputs=inputs, outputs=outputs, diagonals=diagonals)

    def merge(self, other: KroneckerSums) -> None:
        """Add the sums over other examples."""
        pairs = [(self.inputs, other.inputs), (self.outputs, other.outputs), (self.diagonals, other.diagonals)]
        for mine, theirs in pairs:
            for name, values in theirs.items():
                mine[name] += values.to(mine[name].device)
        for name, count in other.positions.items():
            self.positions[name] += count
        self.n_examples += other.n_examples


class KroneckerPreconditioner:
    """The natural gradient with one Kronecker product for each layer: (G ⊗ A + λI)⁻¹ g.

    The inverse of the damped product is exact, by the eigenvectors of both factors. It is not the product of two damped
    factors.

    Args:
        sums: Sums over the examples of the Fisher. At least one example.
        damping: λ.

    Raises:
        TrainingError: The damping is not a finite number above 0.
    """

    def __init__(self, sums: KroneckerSums, *, damping: float) -> None:
        self._damping = checked_damping(damping)
        self._layers = sums.layers
        self._inputs = {
            name: torch.linalg.eigh(values / max(1, sums.positions[name])) for name, values in sums.inputs.items()
        }
        n_examples = max(1, sums.n_examples)
        self._outputs = {name: torch.linalg.eigh(values / n_examples) for name, values in sums.outputs.items()}
        self._diagonals = {name: values / n_examples for name, values in sums.diagonals.items()}
        self._shapes = sums.shapes

    def precondition(self, gradients: Mapping[str, Tensor]) -> Direction:
        """See `npeff.training.natural_gradient.Preconditioner.precondition`."""
        check_gradients(gradients, self._shapes)
        found = {}
        for layer in self._layers:
            weight = gradients[layer.weight]
            matrix_oi = weight.double().T if layer.inputs_first else weight.double().flatten(1)
            if layer.bias is not None:
                matrix_oi = torch.cat([matrix_oi, gradients[layer.bias].double()[:, None]], dim=1)
            solved_oi = self._solved(layer.weight, matrix_oi)
            if layer.bias is not None:
                found[layer.bias] = solved_oi[:, -1].to(gradients[layer.bias])
                solved_oi = solved_oi[:, :-1]
            found[layer.weight] = (solved_oi.T if layer.inputs_first else solved_oi).reshape(weight.shape).to(weight)
        for name, f in self._diagonals.items():
            g = gradients[name]
            found[name] = (g.double() / (f.to(g.device) + self._damping)).to(g)
        return {name: found[name] for name in gradients}

    def _solved(self, weight: str, matrix_oi: Tensor) -> Tensor:
        (lambda_o, of_o), (lambda_i, of_i) = self._outputs[weight], self._inputs[weight]
        matrix_oi = matrix_oi.to(of_o.device)
        # rounding errors of eigenvalues may be negative
        denominators_oi = lambda_o.clamp_min(0)[:, None] * lambda_i.clamp_min(0) + self._damping
        solved_oi: Tensor = of_o @ ((of_o.T @ matrix_oi @ of_i) / denominators_oi) @ of_i.T
        return solved_oi
