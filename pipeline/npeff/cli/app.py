"""The Typer application of the ``npeff`` command, to which the other modules add their commands."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

_ORDER = (
    *("demo", "run", "fishers", "spectrum", "factorize", "lift", "verify", "attribute", "inputs", "report"),
    *("query", "select", "repair", "transform", "scale", "estimate", "check", "status", "submit", "import"),
    "export",
)
"""The commands in the order of the help text."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

app = typer.Typer(
    cls=_InOrder,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP,
)


@app.callback()
def npeff(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Factorize the per-example Fishers of a model (NPEFF), and verify and explore the components.

    To get started: npeff demo
    """
    if version:
        import importlib.metadata

        print("npeff", importlib.metadata.version("npeff-pipeline"))
    elif context.invoked_subcommand is None:
        print(context.get_help())
