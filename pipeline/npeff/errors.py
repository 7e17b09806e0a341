"""The base classes of every error that a user can cause or fix, and functions that shorten the text of exceptions.

Code reads the fields of an error, never its text. The text shows no value of an environment variable to which the run
file refers (see `npeff.variables`): `without_values` replaces the values of the variables that `hide_value_of` named.
`printable` prepares a text for a terminal.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

_Error = TypeVar("_Error", bound="NpeffError")

_SHORTEST_HIDDEN = 4
"""Length of the shortest value that is replaced. A shorter value may be part of any word."""

_CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0 and C1), line separators, characters with the property Bidi_Control, and surrogates."""

_hidden_names: set[str] = set()


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


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name that is most like an unknown one; empty if none is like it."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def hide_value_of(name: str) -> None:
    """Replace the value of this environment variable in every text that the process shows from now on."""
    _hidden_names.add(name)


def hidden_variables() -> frozenset[str]:
    """Return the names that `hide_value_of` received, for another process that shows texts of this one."""
    return frozenset(_hidden_names)


def without_values(text: str) -> str:
    """Return a text with ``${NAME}`` in place of the values of the hidden variables of at least 4 characters."""
    names = {form: name for name in sorted(_hidden_names) for form in _forms(os.environ.get(name, ""))}
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: f"${{{names[found[0]]}}}", text)


def _forms(value: str) -> set[str]:
    """Return a value as it may appear in a text: plain, quoted, on one line, in a URL, or in a normalized path."""
    escaped = (repr(value)[1:-1], json.dumps(value)[1:-1], quote(value), quote(value, safe=""))
    forms = {value, value.strip(), value.rstrip("/"), " ".join(value.split()), *escaped}
    return {form for form in forms if len(form) >= _SHORTEST_HIDDEN}


def hide_values(error: BaseException) -> None:
    """Replace the values of hidden variables in the texts of an error, and forget the causes if they show a value."""
    if isinstance(error, NpeffError):
        error.args = tuple(without_values(text) if isinstance(text, str) else text for text in error.args)
        error.problem, error.remedy = without_values(error.problem), without_values(error.remedy)
    if shows_values(error):
        error.__cause__ = None  # the context is not shown either


def shows_values(error: BaseException) -> bool:
    """Return whether the traceback of an error, with its causes, shows the value of a hidden variable."""
    if not _hidden_names:
        return False
    shown = "".join(traceback.format_exception(error))
    return without_values(shown) != shown


def printable(text: str, keep: str = "") -> str:
    r"""Return a text that a terminal shows as it is, for texts that may come from data or from files.

    Control characters, which can move the cursor or change the title of the terminal, and characters that change the
    order of other characters are replaced by escape sequences such as ``\x1b``.

    Args:
        text: The text.
        keep: Control characters that are not replaced, such as line breaks.
    """
    return _CONTROL_CHARACTERS.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def plain_line(text: str) -> str:
    """Return a text on one line: white space is one space, and other control characters are removed.

    For texts that are stored and shown in many places. `printable` shows them without loss instead.
    """
    return " ".join(_CONTROL_CHARACTERS.sub("", " ".join(text.split())).split())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def printable_traceback(error: BaseException) -> str:
    """Return the traceback of a defect for a terminal, without the values of hidden variables."""
    return printable(without_values("".join(traceback.format_exception(error))), keep="\n")


def tell(line: str) -> None:
    """Print a line on standard error, for a person who waits for something that is not a stage of a run."""
    if sys.stderr is not None:
        print(printable(without_values(line)), file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its class if it has no text."""
    return without_values(str(error).strip() or type(error).__name__).splitlines()[0]


def as_one_line(error: BaseException, most: int = 300) -> str:
    """Return an exception's text on one line, cut to at most `most` characters with an ellipsis."""
    text = " ".join(without_values(str(error)).split())
    return text if len(text) <= most else text[: most - 1] + "…"
