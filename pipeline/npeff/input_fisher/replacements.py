"""What is put in place of some positions of an input, to see how the prediction depends on them.

Legend: B examples, P positions, F features, M pool of donors, D draws, x entries of a covariance, y columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.noise import InputNoise
from npeff.input_fisher.predictions import FaithfulnessError
from npeff.input_fisher.seeded import SeededNumbers

Curve = Literal["deletion", "insertion", "information"]

_FIRST_DRAW = 1 << 32
"""Number of the first draw of noise of a replacement. The attributions that it tests used the draws from 0 on."""
_MOST_ENTRIES = 1 << 24
"""Entries of the matrices that are factorized together."""


class Replacement(ABC):
    """New values of positions."""

    curves: tuple[Curve, ...]
    """The curves for which the replacement is used."""
    random: bool
    """Whether draws differ."""

    @abstractmethod
    def draws(self, inputs: FlatInputs, examples: Sequence[int], count: int) -> Tensor:
        """Return draws (D, B, P, F) of all positions. The draws of an example depend only on its number.

        Args:
            inputs: The inputs of a batch.
            examples: The numbers of the examples in the data set.
            count: The number D of draws. A replacement that is not random returns one.
        """

    def values(self, inputs: FlatInputs, draws_DBPF: Tensor, replaced_BP: Tensor) -> Iterator[Tensor]:
        """Return the inputs (B, P, F) with some positions replaced, for each draw."""
        for draw_BPF in draws_DBPF:
            yield torch.where(replaced_BP[..., None], draw_BPF, inputs.values_BPF)


@dataclass(frozen=True)
class MeanInput(Replacement):
    """The mean input.

    Args:
        mean_PF: The mean; (1, F) for exchangeable positions.
    """

    mean_PF: Tensor

    curves = ("deletion", "insertion")
    random = False

    def draws(self, inputs: FlatInputs, examples: Sequence[int], count: int) -> Tensor:
        return self.mean_PF.to(inputs.values_BPF).expand(inputs.values_BPF.shape)[None]


@dataclass(frozen=True)
class OtherExamples(Replacement):
    """The same positions of another example, the same one for all positions of a draw.

    For exchangeable positions, each position gets a position of any example.

    Args:
        pool_MPF: Inputs of M examples; (M, 1, F), M positions, for exchangeable positions.
        examples: The numbers of the examples, or of the examples of the positions.
        seed: Seed of the draws.
    """

    pool_MPF: Tensor
    examples: Sequence[int]
    seed: int = 0

    curves = ("deletion", "insertion", "information")
    random = True

    @classmethod
    def of(cls, parts: Iterable[tuple[FlatInputs, Sequence[int]]], seed: int = 0) -> OtherExamples:
        """Return the replacement by the examples of some batches.

        Args:
            parts: The inputs of each batch, and the numbers of its examples.
            seed: Seed of the draws.
        """
        pools, numbers = [], []
        for inputs, examples in parts:
            values_BPF, used_BP = inputs.values_BPF.detach(), inputs.used_BP
            pools.append(values_BPF[used_BP][:, None] if inputs.exchangeable else values_BPF)
            counts = used_BP.sum(1).tolist() if inputs.exchangeable else [1] * len(examples)
            numbers += [example for example, count in zip(examples, counts, strict=True) for _ in range(count)]
        return cls(torch.cat(pools), numbers, seed)

    def draws(self, inputs: FlatInputs, examples: Sequence[int], count: int) -> Tensor:
        numbers_M, numbers = torch.tensor(self.examples), SeededNumbers(self.seed, "replacement")
        n_positions = inputs.values_BPF.shape[1]
        donors_DBP = torch.zeros(count, len(examples), n_positions, dtype=torch.int64)
        for row, example in enumerate(examples):
            others = torch.nonzero(numbers_M != example)[:, 0]
            if not len(others):
                raise FaithfulnessError(f"example {example} has no other example to take inputs from: give more")
            used_P = inputs.used_BP[row].cpu()
            size = int(used_P.sum()) if inputs.exchangeable else 1
            for draw in range(count):
                drawn = numbers.at(example, draw).integers(len(others), size=size)
                donors_DBP[draw, row, used_P] = others[torch.from_numpy(drawn)]
        donors_DBP = donors_DBP.to(self.pool_MPF.device)
        if inputs.exchangeable:
            return self.pool_MPF[donors_DBP, 0].to(inputs.values_BPF)
        return self.pool_MPF[donors_DBP.amax(2)].to(inputs.values_BPF)


class GivenTheRest(Replacement):
    """Draws from the Gaussian distribution of the positions given all others, with the covariance of the inputs.

    The functional Fisher information is an integral over a Gaussian distribution with this covariance, so this curve
    favours it.

    Args:
        noise: Noise with the mean and the covariance of the inputs. Its spread is not used.
    """

    curves = ("information",)
    random = True

    def __init__(self, noise: InputNoise) -> None:
        self._noise = replace(noise, spread=1.0)
        self._by_entry = "joint" in noise.factors
        root = noise.factors.get("joint", noise.factors.get("positions"))
        self._covariance = None if root is None else root @ root.T  # of the entries, or of the positions

    def draws(self, inputs: FlatInputs, examples: Sequence[int], count: int) -> Tensor:
        """Return draws of all positions, which `values` corrects for the positions that are not replaced."""
        draws = [self._noise.draw(inputs, examples, _FIRST_DRAW + draw) for draw in range(count)]
        return torch.stack(draws) + self._noise.mean_PF.to(inputs.values_BPF)

    def values(self, inputs: FlatInputs, draws_DBPF: Tensor, replaced_BP: Tensor) -> Iterator[Tensor]:
        r"""Return x_S = z_S + Σ_SR Σ_RR⁻¹ (x_R − z_R) for draws z, replaced positions S and the other used ones R."""
        covariance_xx = self._covariance
        if covariance_xx is not None and not inputs.exchangeable:  # else positions are independent
            kept_BP = inputs.used_BP & ~replaced_BP
            changes_DBPF = (inputs.values_BPF - draws_DBPF).to(covariance_xx) * kept_BP[..., None]
            size = max(1, _MOST_ENTRIES // covariance_xx.numel())
            parts = zip(kept_BP.split(size), changes_DBPF.split(size, dim=1), strict=True)
            moved_DBPF = torch.cat([self._moved(covariance_xx, *part) for part in parts], dim=1)
            draws_DBPF = draws_DBPF + moved_DBPF.to(draws_DBPF)
        yield from super().values(inputs, draws_DBPF, replaced_BP)

    def _moved(self, covariance_xx: Tensor, kept_BP: Tensor, changes_DBPF: Tensor) -> Tensor:
        n_draws, _, _, n_features = changes_DBPF.shape
        if self._by_entry:
            kept_Bx = kept_BP.repeat_interleave(n_features, dim=1)
            changes_Bxy = changes_DBPF.flatten(2).permute(1, 2, 0)
            return _expected(covariance_xx, kept_Bx, changes_Bxy).permute(2, 0, 1).reshape(changes_DBPF.shape)
        moved_Bxy = _expected(covariance_xx, kept_BP, changes_DBPF.permute(1, 2, 0, 3).flatten(2))
        return moved_Bxy.view(*kept_BP.shape, n_draws, n_features).permute(2, 0, 1, 3)


def _expected(covariance_xx: Tensor, known_Bx: Tensor, values_Bxy: Tensor) -> Tensor:
    """Return the conditional expectations (B, x, y) of all entries given the known ones. Unknown values are 0."""
    known_Bx = known_Bx & (covariance_xx.diagonal() > 0)  # a constant entry tells nothing
    values_Bxy = values_Bxy * known_Bx[..., None]
    both_Bxx = known_Bx[:, :, None] & known_Bx[:, None]
    identity_xx = torch.eye(len(covariance_xx), dtype=covariance_xx.dtype, device=covariance_xx.device)
    known_Bxx = torch.where(both_Bxx, covariance_xx, identity_xx)
    weights_Bxy: Tensor = torch.cholesky_solve(values_Bxy, torch.linalg.cholesky(known_Bxx))
    return covariance_xx @ weights_Bxy
