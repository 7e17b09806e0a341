"""Texts and names as HTML: a text of several lines shows its lines, and a long name breaks only at its separators."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_NEW_PART = Markup('<span class="part">\n</span>')
_SIGNS = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"})
_SEPARATOR = re.compile(r"(?<=[._/])(?=[^._/])")


def parts(text: str) -> Markup:
    """Return a text whose lines, such as the two texts of a pair, are apart in a paragraph of HTML."""
    return _NEW_PART.join(escape(line) for line in text.split("\n"))


def on_one_line(text: str) -> str:
    """Return a text with slashes between its lines."""
    return " / ".join(text.split("\n"))


def visible(token: str) -> str:
    """Return the text of a token with signs in place of line breaks, of tabs and, if it has nothing else, of spaces."""
    shown = token.translate(_SIGNS)
    return shown if shown.strip() else shown.replace(" ", "␣")


def breakable(name: str) -> Markup:
    """Return the name of a parameter, which may be broken after its dots, underscores and slashes."""
    return Markup("<wbr>").join(escape(piece) for piece in _SEPARATOR.split(name))
