"""The base classes of every error that a user can cause or fix, and functions that shorten the text of exceptions.

Code reads the fields of an error, never its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, TypeVar

_Error = TypeVar("_Error", bound="NpeffError")


class NpeffError(Exception):
    """A user error. The message is one line that states the problem and the remedy.

    The command line prints the message and exits with code 2. Any other exception is a defect of this package.

    Args:
        problem: what is wrong, without the remedy.
        remedy: what the user can do. It is empty if `problem` is the whole message.
        path: the file or folder that is missing, damaged or refused; None if there is none.
        separator: text between problem and remedy in the message.

    Attributes:
        problem: the argument of the same name.
        remedy: the argument of the same name.
        path: the argument of the same name.
    """

    def __init__(self, problem: str, remedy: str = "", *, path: Path | None = None, separator: str = ": ") -> None:
        super().__init__(f"{problem}{separator}{remedy}" if remedy else problem)
        self.problem, self.remedy, self.path = problem, remedy, path

    @classmethod
    def of(cls, error: NpeffError) -> Self:
        """Return an error of this class with the message and the fields of another error."""
        same = _new(cls, error.args)
        same.__dict__.update(error.__dict__)
        return same

    def __reduce__(self) -> tuple[Any, ...]:
        # the default calls the class with the message alone, which loses fields and fails for other constructors
        return _new, (type(self), self.args), self.__dict__


def _new(cls: type[_Error], args: tuple[Any, ...]) -> _Error:
    return cls.__new__(cls, *args)


class ItemError(NpeffError):
    """A user error that may affect one item of work only, so that the other items can still be processed."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def as_one_line(error: BaseException, most: int = 300) -> str:
    """Return an exception's text on one line, cut to at most `most` characters with an ellipsis."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 1] + "…"
