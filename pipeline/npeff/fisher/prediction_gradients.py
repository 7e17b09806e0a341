"""Gradients of the prediction, recovered from the Fisher factors of exact labels.

Legend: N examples, C classes, R rank = C − 1, D any coordinates of the rows, such as those of a sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_weights(logits_NC: Tensor) -> Tensor:
    """Compute the weights c (N, R), float64, of the rows of a Fisher factor in the gradient of log p(y).

    y is the class with the largest logit. With the factor A = LᵀJ of `npeff.gradients.exact_label_factor`, the gradient
    is (e_y − p)ᵀJ = cᵀA with L c = e_y − p. The columns of L are whitened contrasts of class j with the classes after
    it, so that c has a closed form, with the tail sums q_j = Σ_{k≥j} p_k:

        c_j = −√(p_j / (q_j q_{j+1}))  for j < y,    c_y = √(q_{y+1} / (p_y q_y)),    0 for j > y.

    The sums q are at least p_y ≥ 1/C where they are divided by, so no weight overflows for a saturated prediction.

    Args:
        logits_NC: Logits.

    Returns:
        Weights (N, C − 1), float64.
    """
    log_p_NC = torch.log_softmax(logits_NC.double(), dim=-1).clamp_min(-1e300)
    log_q_NC = log_p_NC.flip(-1).logcumsumexp(-1).flip(-1)
    log_p_NR, log_q_NR, log_next_NR = log_p_NC[:, :-1], log_q_NC[:, :-1], log_q_NC[:, 1:]
    y_N1 = log_p_NC.argmax(dim=-1, keepdim=True)
    place_R = torch.arange(log_p_NR.shape[1], device=logits_NC.device)
    before_NR = -torch.exp(0.5 * (log_p_NR - log_q_NR - log_next_NR))
    at_NR = torch.exp(0.5 * (log_next_NR - log_p_NR - log_q_NR))
    zero_NR = torch.zeros_like(at_NR)
    return torch.where(place_R < y_N1, before_NR, torch.where(place_R == y_N1, at_NR, zero_NR))


def prediction_gradients(factors_NRD: Tensor, logits_NC: Tensor | None) -> Tensor:
    """Compute unit gradients (N, D), float64, of the log-probability of a class of each example.

    Args:
        factors_NRD: Fisher factors, of any length.
        logits_NC: Logits of factors with exact labels: the class is the predicted one. None for factors of one row
            with empirical labels: the row is the gradient for the given label.

    Returns:
        Gradients of length 1, or 0 where the factor is zero.
    """
    if logits_NC is None:
        gradients_ND = factors_NRD[:, 0].double()
    else:
        weights_NR = prediction_weights(logits_NC)
        # the squares of the weights of a saturated prediction would underflow in the length
        weights_NR = torch.nn.functional.normalize(weights_NR, p=torch.inf, dim=1, eps=1e-300)
        gradients_ND = torch.einsum("nr,nrd->nd", weights_NR, factors_NRD.double())
    return torch.nn.functional.normalize(gradients_ND, dim=1, eps=1e-300)
