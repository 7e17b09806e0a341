"""How many directions fit the memory of a worker of the lift."""

from __future__ import annotations

from npeff.options.kinds import is_diagonal
from npeff.runs.config import RunConfig
from npeff.runs.errors import RunDirectoryError

_DEFAULT_LIMIT_MB = 2048


def fitting_directions(config: RunConfig, n_parameters: int) -> int:
    """Return the number of components whose sums fit a worker's memory limit.

    Raises:
        RunDirectoryError: not even those of one component fit.
    """
    limit, diagonal = config.lift.memory_limit_mb, is_diagonal(config.factorization.kind)
    vectors = (_DEFAULT_LIMIT_MB if limit == "auto" else limit) * 2**20 // (4 * n_parameters)
    # diagonals and gradients of the components, and the sum of all diagonals
    fitting = (vectors - 1) // 2 if diagonal else vectors
    if fitting < 1 and limit != "auto":
        needed = (3 if diagonal else 1) * 4 * n_parameters
        raise RunDirectoryError(
            f"the direction of one component takes {-(-needed // 2**20):,} MiB, which is more than "
            "lift.memory_limit_mb",
            "set lift.memory_limit_mb to this or more, or to auto",
        )
    return max(1, fitting)
