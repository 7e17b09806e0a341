"""Options of the solver of a factorization."""

from __future__ import annotations

import math
from dataclasses import dataclass

from npeff.options.bounds import POSITIVE, OptionError, check_bounds


@dataclass(frozen=True)
class SolverOptions:
    """What is asked of the solver: in the run file these are keys of the section ``factorization``.

    Raises:
        OptionError: a number is out of its bounds, or all components are frozen.
    """

    n_components: int
    max_iterations: int = 100
    """Passes over the data, rejected steps included."""
    tolerance: float = 1e-6
    """Converged when three steps in a row change the loss by less than this fraction of it."""
    n_starts: int = 4
    """Seeded starts tried on the subsample."""
    subsample: int = 2048
    """Examples that starts are tried on."""
    seed: int = 0
    l1: float = 0.0
    """λ of the penalty on coefficients, in [0, 1): see `npeff.factorization.objective`. At 1 every coefficient would be
    zero."""
    orthogonality: float = 0.0
    """γ of the penalty on components that are alike."""
    n_frozen: int = 0
    """How many of the first components are not to change."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            **dict.fromkeys(("n_components", "max_iterations", "n_starts", "subsample"), POSITIVE),
            tolerance={"greater than or equal to": 0},
            l1={"greater than or equal to": 0, "less than": 1},
            orthogonality={"greater than or equal to": 0, "less than": math.inf},
            n_frozen={"greater than or equal to": 0},
        )
        if self.n_frozen >= self.n_components:
            raise OptionError(
                f"{self.n_frozen} frozen components of n_components={self.n_components} leave none to fit: ask for more"
            )
