"""Probabilities of the classes as functions of the inputs, and their gradients.

Legend: B examples, P positions, F features, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npeff.errors import NpeffError
from npeff.input_fisher.flat_inputs import FlatInputs


class FaithfulnessError(NpeffError, ValueError):
    """Attributions that cannot be computed or compared. The message contains the fix."""


def probabilities(inputs: FlatInputs, values_BPF: Tensor) -> Tensor:
    """Return the probabilities (B, C) of the classes for these values of the inputs, float64.

    Raises:
        FaithfulnessError: The examples have several predictions.
    """
    logits = inputs.logits(values_BPF)
    if logits.dim() == 3 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.dim() != 2:
        raise FaithfulnessError(
            f"the faithfulness of attributions needs one prediction per example, and these have {logits.shape[1]}: "
            "give the task a logits method that returns (B, C)"
        )
    return logits.double().softmax(-1)


def probability_gradients(inputs: FlatInputs, values_BPF: Tensor, classes_B: Tensor) -> Tensor:
    """Return the gradients (B, P, F), float64, of the probability of a class of each example. Zero at unused positions.

    It costs one forward pass and one backward pass to the inputs. It must not be called in inference mode.

    Args:
        inputs: The inputs of a batch.
        values_BPF: The values at which the gradients are taken.
        classes_B: The classes.
    """
    with torch.enable_grad():
        values_BPF = values_BPF.detach().requires_grad_()
        chosen_B = probabilities(inputs, values_BPF).gather(1, classes_B[:, None])
        (gradients_BPF,) = torch.autograd.grad(chosen_B.sum(), values_BPF)
    return gradients_BPF.double() * inputs.used_BP[..., None]
