"""Options for the solver of a factorization."""

from __future__ import annotations

from dataclasses import dataclass

from npeff.options.bounds import COUNT, OptionError, check_bounds


@dataclass(frozen=True)
class SolverOptions:
    """Options for the solver. The run file sets these options in the section ``factorization``.

    Raises:
        OptionError: A number is out of bounds, or all components are frozen.
    """

    n_components: int
    max_iterations: int = 100
    """Maximum number of passes over the data, including passes of rejected steps."""
    tolerance: float = 1e-6
    """The solver has converged when three steps in a row each change the objective by less than this fraction of it."""
    n_starts: int = 4
    """Number of seeded starts that are compared by trial runs on the subsample."""
    subsample: int = 2048
    """Number of examples in the trial runs of the starts."""
    seed: int = 0
    l1: float = 0.0
    """Weight λ of the ℓ1 penalty on the coefficients, in [0, 1). See `npeff.factorization.objective`. With λ = 1 every
    coefficient would be zero."""
    orthogonality: float = 0.0
    """Weight γ of the penalty on similar components."""
    n_frozen: int = 0
    """Number of leading components that the solver keeps fixed."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            **dict.fromkeys(("n_components", "max_iterations", "n_starts", "subsample"), COUNT),
            tolerance={"greater than or equal to": 0},
            l1={"greater than or equal to": 0, "less than": 1},
            orthogonality={"greater than or equal to": 0},
            n_frozen={"greater than or equal to": 0},
        )
        if self.n_frozen >= self.n_components:
            raise OptionError(
                f"{self.n_frozen} frozen components of n_components={self.n_components} leave none to fit: "
                "increase n_components"
            )
