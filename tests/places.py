"""Where the files of the factorization `default` lie in a run directory."""

from __future__ import annotations

from npeff.store.run_files import FILES

HOME = "factorizations/default"


def place(name: str) -> str:
    """The path, relative to the run directory, of a file that the factorization `default` calls `name`."""
    of_factorization = any(name == file or name.startswith(f"{file}/") for file in FILES)
    return f"{HOME}/{name}" if of_factorization else name


def plain(path: str) -> str:
    """The name of a file without the folder of the factorization."""
    return path.removeprefix(f"{HOME}/")
