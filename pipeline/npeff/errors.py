"""The base classes of every error that a user can cause or fix."""

from __future__ import annotations


class NpeffError(Exception):
    """A user error. The message is one line that states the cause and the remedy.

    The command line prints the message and exits with code 2. Any other exception is a defect of this package.
    """


class ItemError(NpeffError):
    """A user error that may affect one item of work only, so that the other items can still be processed."""
