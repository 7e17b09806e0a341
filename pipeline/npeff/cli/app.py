"""The Typer application of the ``npeff`` command, to which the other modules add their commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from npeff.cli.help_texts import CommandWithHelp, GroupWithHelp

_Function = TypeVar("_Function", bound=Callable[..., Any])

DEBUG = "--debug"

SECTIONS = {
    "Start": ("demo", "init", "validate", "estimate", "run", "status"),
    "Stages of a run, in order": (
        *("fishers", "spectrum", "select", "factorize", "lift", "verify", "attribute", "inputs", "report"),
    ),
    "Questions to a run": ("query", "label", "compare"),
    "More stages": ("transform", "repair", "step", "scale"),
    "Clusters": ("submit",),
    "Files": ("check", "export", "import", "bundle", "push", "rm", "migrate"),
}
"""The commands in the order in which they are used, under the headings of the help text."""


class _Npeff(GroupWithHelp):
    sections = SECTIONS

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept ``--debug`` anywhere, as it belongs to no command."""
        end = args.index("--") if "--" in args else len(args)
        rest = [word for place, word in enumerate(args) if word != DEBUG or place >= end]
        return super().parse_args(ctx, [DEBUG, *rest] if len(rest) < len(args) else rest)


class Application(typer.Typer):
    """A Typer application whose commands have the help texts of `CommandWithHelp`."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[_Function], _Function]:
        return super().command(name, **{"cls": CommandWithHelp, **options})


HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

app = Application(
    cls=_Npeff,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP,
)


@app.callback()
def npeff(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error. May be given after the command too.")
    ] = False,
) -> None:
    """Factorize the per-example Fishers of a model (NPEFF), and verify and explore the components.

    To get started: npeff demo
    """
    if version:
        import importlib.metadata

        print("npeff", importlib.metadata.version("npeff-pipeline"))
    elif context.invoked_subcommand is None:
        print(context.get_help())
