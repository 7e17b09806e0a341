"""Trained rules: a network that learned twelve rules, several of which are active on an example.

An example has a value for each of 32 cues, which is zero for a cue that is absent. Rule r reads the cues 2r and 2r + 1.
It is active if both are present. They then have the same value, and the rule increases the logit of one class by its
push times this value. Twelve rules push four classes, so rules are not classes. The other eight cues mean nothing. One
of the two cues of a rule without the other is a decoy. The network is trained on the probabilities of this program.
Where it computes the rules in its weights is not known, except that the weights of the first layer at the cues of a
rule belong to this rule.

Legend: N examples, B batch, E cues, R rules, C classes, w width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from npeff.tasks.base import Examples, Inputs, Task
from npeff.tasks.errors import TaskError
from npeff.tasks.planted.active_rules import check_active, draw_count
from npeff.tasks.trained_model import train_once, with_weights

N_RULES, N_FILLERS = 12, 8
CLASSES = ("stay", "left", "right", "back")
PUSHES = tuple(2.0 + 0.1 * rule for rule in range(N_RULES))
"""Increase of the logit of class r mod 4 by rule r, for value 1."""
RULES = tuple(f"pair_{rule:02d}" for rule in range(N_RULES))
_CUES = 2 * N_RULES + N_FILLERS
_NAMES = (
    *(f"{'ab'[side]}{rule:02d}" for rule in range(N_RULES) for side in range(2)),
    *(f"filler{filler:02d}" for filler in range(N_FILLERS)),
)
"""Names of the cues."""
_LEAST, _LARGEST = 0.7, 1.3
"""Bounds of the value of a cue. Two cues together exceed the largest value of one, so that one unit can tell them."""
_MOST_ACTIVE = 6
_FILLER_SHARE = 0.25
"""Probability that a cue that means nothing is present."""
_BATCH, _LEARNING_RATE, _TRAINING_DECOYS = 256, 5e-3, 0.3
_MODEL_FILE = "trained-rules-model.safetensors"


def draw_cues(counts_N: Sequence[int] | np.ndarray, decoy_share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the cues of examples.

    Args:
        counts_N: Number of active rules of each example.
        decoy_share: Probability of a decoy for a rule that is not active.
        rng: Source of the draws.

    Returns:
        Values (N, E), float32.
    """
    n_examples = len(counts_N)
    order_NR = rng.permuted(np.tile(np.arange(N_RULES), (n_examples, 1)), axis=1)
    active_NR = order_NR < np.asarray(counts_N)[:, None]
    side_NR2 = np.arange(2) == rng.integers(2, size=(n_examples, N_RULES, 1))
    decoy_NR = ~active_NR & (rng.random((n_examples, N_RULES)) < decoy_share)
    present_NR2 = active_NR[:, :, None] | (decoy_NR[:, :, None] & side_NR2)
    fillers_NE: np.ndarray = rng.random((n_examples, N_FILLERS)) < _FILLER_SHARE
    pairs_NR2 = present_NR2 * rng.uniform(_LEAST, _LARGEST, (n_examples, N_RULES, 1))
    fillers_NE = fillers_NE * rng.uniform(_LEAST, _LARGEST, fillers_NE.shape)
    return np.concatenate([pairs_NR2.reshape(n_examples, -1), fillers_NE], axis=1).astype(np.float32)


def strengths(cues_NE: np.ndarray) -> np.ndarray:
    """Return by how much each rule increases the logit of its class (N, R), float64; 0 if it is not active."""
    pairs_NR2 = cues_NE[:, : 2 * N_RULES].reshape(-1, N_RULES, 2).astype(np.float64)
    return np.asarray(np.array(PUSHES) * pairs_NR2.min(axis=2))


def program_logits(cues_NE: np.ndarray) -> np.ndarray:
    """Return the logits (N, C) of the program that the network is trained on, float64."""
    classes_RC = np.eye(len(CLASSES))[np.arange(N_RULES) % len(CLASSES)]
    return np.asarray(strengths(cues_NE) @ classes_RC)


class TrainedRulesTask(Task):
    """A multilayer perceptron that is trained on a program of twelve rules, and examples with several active rules.

    The label of an example is its class according to the program. The table has the columns ``rule_NAME`` (whether the
    rule is active) and ``strength_NAME`` (the increase of a logit by the rule) for each rule, and ``n_rules``.

    Args:
        seed: Seed of the examples, the initial weights and the training.
        n_examples: Number of examples N.
        n_active: Number of active rules of each example.
        at_most: Draw the number of active rules uniformly from 1 to `n_active` instead.
        decoy_share: Probability of a decoy for a rule that is not active.
        steps: Number of training steps, each on 256 new examples with zero to six active rules.
        width: Width of the two hidden layers.
    """

    def __init__(
        self,
        seed: int = 0,
        n_examples: int = 1500,
        n_active: int = 3,
        at_most: bool = True,
        decoy_share: float = 0.15,
        steps: int = 1500,
        width: int = 64,
    ) -> None:
        for name, number, least, most in (
            ("seed", seed, 0, 2**63 - 1),
            ("n_examples", n_examples, 1, 100_000),
            ("steps", steps, 1, 100_000),
            ("width", width, 1, 1024),
        ):
            if not isinstance(number, int) or not least <= number <= most:
                raise TaskError(
                    f"trained-rules: {name} must be a whole number between {least} and {most}, not {number!r}"
                )
        check_active("trained-rules", n_active, _MOST_ACTIVE)
        if not isinstance(decoy_share, int | float) or not 0 <= decoy_share <= 1:
            raise TaskError(f"trained-rules: decoy_share must be between 0 and 1, not {decoy_share!r}")
        rng = np.random.default_rng(seed)
        counts_N = [draw_count(n_active, at_most, rng) for _ in range(n_examples)]
        self._examples = _CueExamples(draw_cues(counts_N, decoy_share, rng))
        self._seed, self._steps, self._width = seed, steps, width

    def rule_masks(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights that only one rule reads: rule name to parameter name to mask (bool).

        These are the weights of the first layer at the two cues of the rule. All other weights belong to no rule.
        """
        masks: dict[str, dict[str, Tensor]] = {}
        for rule, name in enumerate(RULES):
            masks[name] = {key: torch.zeros_like(value, dtype=torch.bool) for key, value in self._parameters().items()}
            masks[name]["0.weight"][:, 2 * rule : 2 * rule + 2] = True
        return masks

    def prepare(self, cache: Path) -> None:
        train_once(cache / _MODEL_FILE, lambda: _train(self._network(), steps=self._steps, seed=self._seed))

    def model(self, cache: Path) -> nn.Module:
        return with_weights(self._network(), cache / _MODEL_FILE)

    def examples(self, cache: Path) -> Examples:
        return self._examples

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits_BC: Tensor = model(batch)
        return logits_BC

    def inputs(self, model: nn.Module, batch: Tensor) -> Inputs:
        """Return the cues. The cues of a rule are a group."""
        group_of = torch.tensor([cue // 2 if cue < 2 * N_RULES else -1 for cue in range(_CUES)])
        return Inputs(batch, lambda values: self.logits(model, values), names=_NAMES, groups=RULES, group_of=group_of)

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self._network().named_parameters())

    def _network(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            layers = nn.Linear(_CUES, self._width), nn.Linear(self._width, self._width)
            head = nn.Linear(self._width, len(CLASSES))
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), head).eval()


def _train(model: nn.Module, *, steps: int, seed: int) -> nn.Module:
    """Minimise the cross-entropy with the probabilities of the program, on new examples in each step."""
    rng = np.random.default_rng((seed, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        cues_BE = draw_cues(rng.integers(0, _MOST_ACTIVE + 1, _BATCH), _TRAINING_DECOYS, rng)
        targets_BC = torch.from_numpy(program_logits(cues_BE)).softmax(1).float()
        loss = functional.cross_entropy(model(torch.from_numpy(cues_BE)), targets_BC)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


class _CueExamples(Examples):
    class_names = CLASSES

    def __init__(self, cues_NE: np.ndarray) -> None:
        self._cues_NE = cues_NE

    def __len__(self) -> int:
        return len(self._cues_NE)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._cues_NE[np.asarray(indices, dtype=np.int64)])

    def table(self) -> pa.Table:
        strengths_NR = strengths(self._cues_NE)
        texts = [" ".join(f"{_NAMES[e]}={cues_E[e]:.2f}" for e in np.flatnonzero(cues_E)) for cues_E in self._cues_NE]
        columns = {
            "id": pa.array([f"cues-{i:05d}" for i in range(len(self))], pa.string()),
            "label": pa.array(program_logits(self._cues_NE).argmax(1), pa.int64()),
            "text": pa.array(texts, pa.string()),
        }
        columns |= {f"rule_{name}": pa.array(strengths_NR[:, rule] > 0) for rule, name in enumerate(RULES)}
        columns |= {f"strength_{name}": pa.array(strengths_NR[:, rule]) for rule, name in enumerate(RULES)}
        return pa.table({**columns, "n_rules": pa.array((strengths_NR > 0).sum(1), pa.int64())})
