"""What the components of a method say of the rules: a rule is found if a component tells its examples.

A method gives coefficients (N, K) and components (K, D). There are three scores of an example at a component: its
coefficient, the evidence e_ij = h_jᵀF̂_i h_j, and the evidence along the whitened component. For each rule and score,
the component with the highest AUC on the fitted examples is chosen; everything else is measured on the others.

Legend: N examples, F fitted, M scored, K components, R rank, D sketch, P parameters, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from npeff.directions import lift_weights
from npeff.factorization.estimator import NPEFF
from scipy.stats import rankdata, spearmanr
from torch import Tensor
from verify_stage.baselines import Found

from several_rules.methods import gradient_clusters, gradient_nmf, pooled_eigenvectors, random_components
from several_rules.truths import SketchedData, Truth

LAMBDA = 0.05
"""λ of the whitening."""
FOUND = 0.95
"""AUC from which a rule is found."""
RESAMPLES = 200
READOUTS = ("coefficients", "evidence", "whitened")


def npeff_components(data: SketchedData, n_components: int, seed: int) -> Found:
    fitted = NPEFF(n_components, random_state=seed).fit(data.factors_NRD[torch.from_numpy(data.fit_N)].numpy())
    return fitted.transform(data.factors_NRD.numpy()), fitted.components_


METHODS: dict[str, Callable[[SketchedData, int, int], Found]] = {
    "npeff": npeff_components,
    "gradient-nmf": gradient_nmf,
    "gradient-kmeans": gradient_clusters,
    "fisher-pca": pooled_eigenvectors,
    "random": random_components,
}


def whitening(factors_FRD: Tensor, components_KD: Tensor) -> Tensor:
    """Return C = Γ (M + λ·mean(diag M)·Γ)⁻¹ (K, K), with Γ = HHᵀ and M = mean_i (Â_iHᵀ)ᵀ(Â_iHᵀ).

    The rows of C·H are natural-gradient steps in the span of the components: each moves what its component moves and
    as little as possible of what all examples share.
    """
    gamma_KK = components_KD @ components_KD.T
    products_FRK = factors_FRD.double() @ components_KD.T
    m_KK = torch.einsum("frk,frl->kl", products_FRK, products_FRK) / len(factors_FRD)
    damped_KK = m_KK + LAMBDA * m_KK.diagonal().mean() * gamma_KK
    return gamma_KK @ torch.linalg.pinv(damped_KK, hermitian=True)


def evidence(factors_NRD: Tensor, components_KD: Tensor) -> np.ndarray:
    """(N, K): ‖Â_i h_j‖² for unit h_j."""
    unit_KD = torch.nn.functional.normalize(components_KD)
    return (factors_NRD.double() @ unit_KD.T).square().sum(1).numpy()


def aucs(active_M: np.ndarray, scores_MK: np.ndarray, weights_SM: np.ndarray) -> np.ndarray:
    """(S, K): AUC of each score under weights of the examples; a tie counts half. NaN where a group is empty."""
    found = []
    for scores_M in scores_MK.T:
        values, groups_M = np.unique(scores_M, return_inverse=True)
        groups_Mu = np.eye(len(values))[groups_M]
        positive_Su, negative_Su = (weights_SM * active_M) @ groups_Mu, (weights_SM * ~active_M) @ groups_Mu
        below_Su = negative_Su.cumsum(1) - negative_Su / 2
        total_S = positive_Su.sum(1) * negative_Su.sum(1)
        found.append((positive_Su * below_Su).sum(1) / np.where(total_S > 0, total_S, np.nan))
    return np.stack(found, 1)


@dataclass(frozen=True)
class Scores:
    """Of one method, K and draw; over the rules unless stated otherwise."""

    found: dict[str, dict[str, float]]
    """Share of found rules by readout, on the held-out examples: `exactly` with the given number of active rules, and
    `all`."""
    resampled: dict[str, np.ndarray]
    """The share on the first of these in resamples of the examples (S,), by readout."""
    aucs: dict[str, list[float]]
    spearman: dict[str, float]
    """Median over rules: score against strength, on the held-out examples on which the rule is active."""
    energy: dict[str, float]
    """Median over rules: share of the direction's squared entries in the rule's own weights."""


def scored(truth: Truth, found: Found, n_active: int | None, seed: int) -> Scores:
    """Score the coefficients and components of a method on one draw.

    The share of found rules is that on the held-out examples with `n_active` active rules, or on all of them.
    """
    fit_N = truth.data.fit_N
    factors_NRD = truth.data.factors_NRD
    coefficients_NK, components = found
    components_KD = torch.from_numpy(np.asarray(components, np.float64))
    fitted_FRD = factors_NRD[torch.from_numpy(fit_N)]
    white_KK = whitening(fitted_FRD, components_KD)
    by_readout = {
        "coefficients": np.asarray(coefficients_NK, np.float64),
        "evidence": evidence(factors_NRD, components_KD),
        "whitened": evidence(factors_NRD, white_KK @ components_KD),
    }
    directions = _directions(truth, np.asarray(coefficients_NK, np.float64)[fit_N], components_KD, white_KK)
    rng = np.random.default_rng((seed, 2))
    results: dict[str, list] = {name: [] for name in ("found", "resampled", "aucs", "spearman", "energy")}
    for readout, scores_NK in by_readout.items():
        chosen_r = best_components(truth.active_Nr[fit_N], scores_NK[fit_N])
        exactly_N = ~fit_N & (truth.counts_N == n_active if n_active else True)
        sampled_rS = _held_out_aucs(truth, scores_NK, chosen_r, exactly_N, rng)
        all_r = _held_out_aucs(truth, scores_NK, chosen_r, ~fit_N, None)[:, 0]
        results["found"].append({"exactly": _share(sampled_rS[:, 0]), "all": _share(all_r)})
        results["resampled"].append(np.array([_share(sampled_r) for sampled_r in sampled_rS[:, 1:].T]))
        results["aucs"].append([float(auc) for auc in sampled_rS[:, 0]])
        results["spearman"].append(_spearman(truth, scores_NK, chosen_r, ~fit_N))
        energy_KP = directions["whitened" if readout == "whitened" else "own"]
        own_r = [float(energy_KP[best][truth.masks_rP[rule]].sum()) for rule, best in enumerate(chosen_r)]
        results["energy"].append(float(np.median(own_r)))
    return Scores(**{name: dict(zip(READOUTS, values, strict=True)) for name, values in results.items()})


def best_components(active_Fr: np.ndarray, scores_FK: np.ndarray) -> list[int]:
    """The component with the highest AUC for each rule. The AUC grows with the mean rank of the positive examples."""
    return [int(best) for best in (active_Fr.T.astype(float) @ rankdata(scores_FK, axis=0)).argmax(1)]


def _share(aucs_r: np.ndarray) -> float:
    """Share of found rules; a rule without positive or negative examples is not counted."""
    known_r = aucs_r[~np.isnan(aucs_r)]
    return float((known_r >= FOUND).mean()) if len(known_r) else float("nan")


def _held_out_aucs(
    truth: Truth, scores_NK: np.ndarray, chosen_r: list[int], held_N: np.ndarray, rng: np.random.Generator | None
) -> np.ndarray:
    """(r, 1 + S): the AUCs of the chosen components, on the examples and on resamples of them."""
    n_held = int(held_N.sum())
    weights_SM = np.ones((1, n_held))
    if rng is not None:
        draws_SM = rng.multinomial(n_held, np.full(n_held, 1 / n_held), size=RESAMPLES)
        weights_SM = np.concatenate([weights_SM, draws_SM])
    return np.stack(
        [
            aucs(truth.active_Nr[held_N, rule], scores_NK[held_N][:, [best]], weights_SM)[:, 0]
            for rule, best in enumerate(chosen_r)
        ]
    )


def _spearman(truth: Truth, scores_NK: np.ndarray, chosen_r: list[int], held_N: np.ndarray) -> float:
    """Median over the rules whose strength varies."""
    found = []
    for rule, best in enumerate(chosen_r):
        on_N = held_N & truth.active_Nr[:, rule]
        strengths_M, scores_M = truth.strengths_Nr[on_N, rule], scores_NK[on_N, best]
        if len(strengths_M) > 2 and np.ptp(strengths_M) > 1e-6 and np.ptp(scores_M) > 0:
            found.append(float(spearmanr(strengths_M, scores_M).statistic))
    return float(np.median(found)) if found else float("nan")


def _directions(
    truth: Truth, coefficients_FK: np.ndarray, components_KD: Tensor, white_KK: Tensor
) -> dict[str, Tensor]:
    """Squared entries (K, P) of the unit lifted directions, own and whitened."""
    fitted_FRD = truth.data.factors_NRD[torch.from_numpy(truth.data.fit_N)]
    coefficients = torch.from_numpy(coefficients_FK)
    weights_KFR = lift_weights(
        fitted_FRD,
        coefficients,
        components_KD,
        coefficients.T @ coefficients,
        range(len(components_KD)),
        torch.ones(len(fitted_FRD), dtype=torch.float64),
    )
    lifted_KP = weights_KFR.flatten(1).float() @ truth.rows_FRP.flatten(0, 1)
    own_KP = torch.nn.functional.normalize(lifted_KP)
    kinds = {"own": own_KP, "whitened": torch.nn.functional.normalize(white_KK.float() @ own_KP)}
    return {kind: directions_KP.square() for kind, directions_KP in kinds.items()}
