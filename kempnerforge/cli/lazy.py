"""Groups of commands that import a command's module when it is asked for, not for the list of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as make_command


@dataclass(frozen=True)
class Member:
    """A command, or a group of them, that is not imported yet."""

    module: str
    """Its name in ``kempnerforge.cli``."""
    attribute: str
    """A ``typer.Typer``, or the function of one command."""
    summary: str
    """The first paragraph of its help."""

    def load(self, name: str) -> Any:
        """Import it; the command under ``name``."""
        found = getattr(import_module(f"kempnerforge.cli.{self.module}"), self.attribute)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command()(function)
        command = make_command(found)
        command.name = name
        return command


class LazyGroup(TyperGroup):
    """Shows the summaries of its members in its help, and imports the one that is called.

    pydantic and NumPy take longer to import than most commands take.
    """

    members: ClassVar[Mapping[str, Member]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of ``members``."""
        return list(self.members)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command itself; while help is shown, a name and a summary."""
        if cmd_name not in self.members:
            return None
        member = self.members[cmd_name]
        if ctx.meta.get(__name__):
            return TyperCommand(cmd_name, help=member.summary)
        return member.load(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help without importing any member."""
        ctx.meta[__name__] = True
        super().format_help(ctx, formatter)
