"""The covariance of the inputs of the fitted examples: its checks, and its file in the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from npeff.input_fisher.moments import Moments
from npeff.input_fisher.noise import InputCovarianceError, InputNoise, factor_covariance
from npeff.runs.config_input_sections import InputsConfig
from npeff.storage.errors import StoreError
from npeff.store.array_files import read_arrays, write_arrays

EVERY = -1
"""Number of the covariance of all examples, among those of the classes."""

_MOST_ENTRIES = 4096
"""Largest number of entries of a full covariance."""
_MOST_BYTES = 2**30
"""Largest size of all covariances together, and of their parts."""
_MOST_PARTS = 64


@dataclass(frozen=True)
class InputFacts:
    """Facts about the model and the inputs of a task, from some of its examples."""

    n_positions: int
    n_features: int
    exchangeable: bool
    several_predictions: bool
    """Whether an example has several predictions."""
    n_parameters: int
    """Number of all parameters of the model."""

    @property
    def dimension(self) -> int:
        """The number of entries of an example, or of a position if positions are exchangeable."""
        return self.n_features * (1 if self.exchangeable else self.n_positions)

    def n_parts(self, options: InputsConfig, n_covariances: int) -> int:
        """Return the number of parts of the fitted examples whose moments are computed separately."""
        return max(1, min(_MOST_PARTS, _MOST_BYTES // (8 * n_covariances * self.n_entries(options))))

    def n_entries(self, options: InputsConfig) -> int:
        """Return the number of numbers that a covariance of the options has."""
        match options.covariance:
            case "full":
                return self.dimension**2
            case "kronecker":
                return int(self.n_positions**2 + self.n_features**2)
            case _:
                return self.dimension


def refuse_covariance(options: InputsConfig, facts: InputFacts, n_covariances: int) -> None:
    """Check that the covariance of the options can be computed for the inputs.

    Args:
        options: The options of the stage.
        facts: Facts about the inputs.
        n_covariances: The number of covariances: that of the classes, or 1.

    Raises:
        InputCovarianceError: It is too large, or does not apply.
    """
    if options.covariance == "kronecker" and facts.exchangeable:
        raise InputCovarianceError(
            "inputs.covariance: kronecker needs examples with the same positions, and those of a text are not: set it "
            "to full, which is the covariance of the features of a token"
        )
    dimension = facts.dimension
    if options.covariance == "full" and dimension > _MOST_ENTRIES:
        other = "diagonal" if facts.exchangeable or facts.n_positions > _MOST_ENTRIES else "kronecker or diagonal"
        raise InputCovarianceError(
            f"inputs.covariance: full supports at most {_MOST_ENTRIES} entries, and the inputs have {dimension}: set "
            f"it to {other}"
        )
    if (size := 8 * n_covariances * facts.n_entries(options)) > _MOST_BYTES:
        remedy = "set inputs.scope to all" if n_covariances > 1 else "set inputs.covariance to diagonal"
        raise InputCovarianceError(f"the covariance of the inputs would need {size / 2**30:.1f} GiB: {remedy}")


def write_covariances(
    path: Path,
    moments: Mapping[int, Moments],
    options: InputsConfig,
    facts: InputFacts,
    names: Mapping[int, str],
    lineage: str | None,
) -> None:
    """Write the means and the factors of the covariances to a file.

    Args:
        path: The file.
        moments: The moments of the fitted examples, by the number of the class, or for `EVERY`.
        options: The options of the stage.
        facts: Facts about the inputs.
        names: The covariances to write: the name of each class.
        lineage: The lineage of the stage.

    Raises:
        InputCovarianceError: A class has too few fitted examples, or a covariance cannot be factored.
    """
    by_class = options.scope == "class"
    needed = 2 * facts.dimension if by_class and options.covariance in ("full", "kronecker") else 2
    arrays = {}
    for number, name in names.items():
        n = moments[number].n if number in moments else 0
        if n < needed:
            raise InputCovarianceError(
                f"{f'class {name!r} has' if by_class else 'there are'} {n} fitted "
                f"{'tokens' if facts.exchangeable else 'examples'} with finite inputs, and the {options.covariance} "
                f"covariance needs {needed}: {'set inputs.scope to all' if by_class else 'fit more examples'}"
            )
        factors = factor_covariance(moments[number], options.covariance, options.ridge)
        for key, values in {"mean": moments[number].mean_PF, **factors}.items():
            arrays[_prefix(number) + key] = values.numpy()
    write_arrays(path, arrays, {} if lineage is None else {"lineage": lineage})


def is_current(path: Path, numbers: Iterable[int], lineage: str | None) -> bool:
    """Return whether a file has these covariances, with this lineage."""
    if lineage is None or not path.exists():
        return False
    try:
        arrays, metadata = read_arrays(path)
    except StoreError:
        return False  # it is computed again
    return metadata.get("lineage") == lineage and all(f"{_prefix(number)}mean" in arrays for number in numbers)


def _prefix(number: int) -> str:
    return "" if number == EVERY else f"class {number} "


def read_noises(path: Path, spread: float, seed: int, device: torch.device) -> dict[int, InputNoise]:
    """Read a file that `write_covariances` wrote. Returns the noise of each covariance.

    Raises:
        StoreError: The file is missing or damaged.
    """
    by_number: dict[int, dict[str, torch.Tensor]] = {}
    for key, values in read_arrays(path)[0].items():
        *prefix, name = key.split(" ")
        by_number.setdefault(int(prefix[1]) if prefix else EVERY, {})[name] = torch.from_numpy(values).to(device)
    return {number: InputNoise(found.pop("mean"), found, spread, seed) for number, found in sorted(by_number.items())}
