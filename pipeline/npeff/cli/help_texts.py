"""Help texts of commands and groups: whole sentences, sections in the order of use, and no types of Python."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

_LONGEST = 1000
"""Largest number of characters of the description of a command in a list of commands: its first sentence."""

_TYPE = re.compile(r"<(?:list\[)?(\w+)(?: range)?\]?>")
_WORDS = {"int": "N", "float": "X", "str": "TEXT", "path": "PATH"}
_CHOICES = re.compile(r"<([^<>]*\|[^<>]*)>")


def command_path(context: Any) -> str:
    """Return the command of a context as it is typed, with the names of the arguments before a subcommand."""
    return str(context.command_path).replace("{", "").replace("}", "")


def _write_usage(command: Any, context: typer.Context, formatter: Any) -> None:
    formatter.write_usage(command_path(context), " ".join(_usage_pieces(command, context)))


def _usage_pieces(command: Any, context: typer.Context) -> Iterator[str]:
    names = {_display_of(each): each for each in command.get_params(context) if each.param_type_name == "argument"}
    for piece in command.collect_usage_pieces(context):
        name = piece.strip("{}[]")
        yield (name if names[name].required else f"[{name}]") if name in names else piece


def _display_of(argument: Any) -> str:
    return str(argument.metavar or argument.name)


def _write_parameters(command: Any, context: typer.Context, formatter: Any) -> None:
    arguments, options = [], []
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) is None:
            continue
        if parameter.param_type_name == "argument":
            arguments.append((_display_of(parameter), record[1].removesuffix("[required]").rstrip()))
        else:
            name = _TYPE.sub(lambda found: _WORDS[found[1].lower()], record[0])
            options.append((_CHOICES.sub(r"\1", name), record[1]))
    for title, records in (("Arguments", arguments), ("Options", options)):
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


class CommandWithHelp(TyperCommand):
    """A command whose help text names no Python types."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        _write_usage(self, ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)


class GroupWithHelp(TyperGroup):
    """A group whose help text shows the first sentences of its commands uncut, in sections."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names of commands by heading. Commands that are in no section are under the heading "Commands"."""

    def list_commands(self, ctx: Any) -> list[str]:
        known = [name for names in self.sections.values() for name in names if name in self.commands]
        return [*known, *(name for name in super().list_commands(ctx) if name not in known)]

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        _write_usage(self, ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        listed = self.list_commands(ctx)
        of_sections = {name for names in self.sections.values() for name in names}
        sections = {**self.sections, "Commands": tuple(name for name in listed if name not in of_sections)}
        width = max(map(len, listed))
        for title, names in sections.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(_LONGEST))
                for name in names
                if name in self.commands
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
