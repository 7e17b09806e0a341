"""Paths of objects and folders in buckets, with the part of the interface of `pathlib.Path` that reads.

A path holds only text, so it can be compared, hashed and pickled. A folder exists if an object exists below it. Writes
use `npeff.storage.atomic`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO, TextIOWrapper
from pathlib import PurePosixPath
from typing import IO, Any

from npeff.storage import objects


@dataclass(frozen=True)
class _Stat:
    st_size: int


@dataclass(frozen=True, order=True, slots=True)
class BucketPath:
    """The path of an object or a folder, such as ``s3://bucket/prefix/run``."""

    root: str
    """Scheme and bucket, such as ``s3://bucket``."""
    key: PurePosixPath
    """The path in the bucket, relative."""

    # Arithmetic

    def __str__(self) -> str:
        return f"{self.root}/{self.key}"

    as_posix = __str__

    def __truediv__(self, other: str | PurePosixPath) -> BucketPath:
        return BucketPath(self.root, self.key / other)

    def joinpath(self, *others: str | PurePosixPath) -> BucketPath:
        return BucketPath(self.root, self.key.joinpath(*others))

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def stem(self) -> str:
        return self.key.stem

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def parent(self) -> BucketPath:
        return BucketPath(self.root, self.key.parent)

    def with_name(self, name: str) -> BucketPath:
        return BucketPath(self.root, self.key.with_name(name))

    def relative_to(self, other: BucketPath) -> PurePosixPath:
        if self.root != other.root:
            raise ValueError(f"{self} is not below {other}")
        return self.key.relative_to(other.key)

    def expanduser(self) -> BucketPath:
        return self

    absolute = resolve = expanduser

    # Reads

    def is_file(self) -> bool:
        return objects.size(self) is not None

    def is_dir(self) -> bool:
        return objects.has_objects(self)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self) -> _Stat:
        if (size := objects.size(self)) is None:
            raise FileNotFoundError(str(self))
        return _Stat(size)

    def iterdir(self) -> Iterator[BucketPath]:
        return (self / name for name in objects.entries(self))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield the entries of a folder whose names match a pattern without folders."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield the objects of a folder, at any depth, whose names match a pattern without folders."""
        return (self / name for name in objects.files(self) if fnmatchcase(PurePosixPath(name).name, pattern))

    def read_bytes(self) -> bytes:
        return objects.read(self)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "r", *, encoding: str = "utf-8") -> IO[Any]:
        """Read the whole object, and return it as a file."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self} cannot be opened for writing: use npeff.storage.atomic")
        content = BytesIO(self.read_bytes())
        return content if mode == "rb" else TextIOWrapper(content, encoding=encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(str(self))
        objects.delete([self])
