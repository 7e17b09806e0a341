"""The files that the workers of the stage `lift` share: partial sums, products of directions, and combinations.

Shapes: K components, D sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from npeff.directions import Whitening
from npeff.storage.atomic import write_file_atomically
from npeff.storage.checksums import json_checksum
from npeff.storage.errors import StoreError


@dataclass(frozen=True)
class LiftBlock:
    """Components that are lifted together."""

    components: tuple[int, ...]
    part: int = 0
    parts: int = 1
    """Number of parts into which the stored shards are divided. ``part`` counts from 0."""


@dataclass(frozen=True)
class LiftPaths:
    factorization: Path
    directions: Path
    results: Path
    """Folder of one JSON file per finished component."""

    def scores_file(self, step: int, component: int) -> Path:
        """Return the file with the products of a component's direction before a polishing step."""
        return self.scores / f"{step:03d}" / f"{component:05d}.safetensors"

    @property
    def scores(self) -> Path:
        return self.results / "polish"

    @property
    def combinations(self) -> Path:
        """File of the `Combinations`, except for polished directions and diagonals."""
        return self.results / "combinations.safetensors"

    @property
    def sums(self) -> Path:
        """Folder of the sums of parts of blocks."""
        return self.results / "sums"

    def sums_file(self, block: LiftBlock) -> Path:
        return self.sums / f"{json_checksum({'components': block.components})[:16]}-{block.part}-of-{block.parts}.f32"


@dataclass(frozen=True)
class Combinations:
    """How unit directions are made of the sums of the lift.

    Attributes:
        found: Combinations of the components' unit own directions.
        inverse_lengths_K: The factors that make the components' sums unit vectors in the sketch.
        sketches_KD: Sketches of the unit directions.
    """

    found: Whitening
    inverse_lengths_K: Tensor
    sketches_KD: Tensor

    @property
    def of_sums_KK(self) -> Tensor:
        return self.found.combinations_KK * self.inverse_lengths_K

    def write(self, path: Path) -> None:
        """Write to a file. Raises the errors of `write_tensors`."""
        tensors = self.found.combinations_KK, self.found.cosines_K, self.inverse_lengths_K, self.sketches_KD
        write_tensors(path, **dict(zip(_NAMES, tensors, strict=True)))

    @classmethod
    def read(cls, path: Path) -> Combinations:
        """Read what `write` has written. Raises the errors of `read_tensors`."""
        combinations_KK, cosines_K, inverse_lengths_K, sketches_KD = read_tensors(path, *_NAMES)
        return cls(Whitening(combinations_KK, cosines_K), inverse_lengths_K, sketches_KD)


_NAMES = ("combinations", "cosines", "inverse_lengths", "sketches")


def write_tensors(path: Path, **tensors: Tensor) -> None:
    """Write tensors to a file.

    Raises:
        StoreError: The file cannot be written.
    """
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_file_atomically(path, lambda stream: stream.write(content))


def read_tensors(path: Path, *names: str) -> list[Tensor]:
    """Read tensors from a file of `write_tensors`.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        found = load(path.read_bytes())
        return [found[name] for name in names]
    except (OSError, KeyError, SafetensorError) as error:
        remedy = "delete it and run the same command again"
        raise StoreError(f"{path} is missing or damaged", remedy, path=path) from error
