"""A page of the live view as a value, which a process can send to another one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from npeff.errors import without_values

HTML, TEXT = "text/html; charset=utf-8", "text/plain; charset=utf-8"


@dataclass(frozen=True)
class View:
    """What is served."""

    run_dir: str
    factorization: str | None
    top_examples: int
    beside: str | None = None
    """Directory of another run, whose groups of inputs are in the report."""
    hidden: frozenset[str] = frozenset()
    """Environment variables whose values are not shown."""
    edit: bool = False
    """Whether names and notes of components can be changed."""

    @property
    def title(self) -> str:
        """The name of the run, for people."""
        return without_values(Path(self.run_dir).name or self.run_dir)


@dataclass(frozen=True)
class Page:
    """An answer."""

    status: int
    kind: str
    content: bytes
    state: str = ""
    """For the report, a text that differs if the run has changed."""
    styled: bool = False
    """Whether elements of the page have styles of their own, as the bars of a card."""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(replace(self, content=b"")), default=bytes.decode).encode() + b"\n" + self.content

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        facts, _, content = data.partition(b"\n")
        return cls(**{**json.loads(facts), "content": content})
