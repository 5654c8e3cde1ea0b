"""Command groups that import the module of a command only when the command runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as make_command

_COMPLETION = ("install_completion", "show_completion")


@dataclass(frozen=True)
class Member:
    """A command, or a group of commands, that is not imported yet."""

    module: str
    """Name of its module in ``kempnerforge.cli``."""
    attribute: str
    """A ``typer.Typer``, or the function of one command."""
    summary: str
    """The first paragraph of its help."""

    def load(self, name: str) -> Any:
        """Import the module and return the command under ``name``."""
        member = getattr(import_module(f"kempnerforge.cli.{self.module}"), self.attribute)
        if not isinstance(member, typer.Typer):
            function, member = member, typer.Typer(add_completion=False)
            member.command()(function)
        command = make_command(member)
        command.name = name
        # typer adds these to every group, where they do not work: completion is for the whole program.
        command.params = [param for param in command.params if param.name not in _COMPLETION]
        return command


class LazyGroup(TyperGroup):
    """A group whose help and completions show its members. It imports only the member that is called.

    pydantic and NumPy take longer to import than most commands take to run.
    """

    members: ClassVar[Mapping[str, Member]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of ``members``."""
        return list(self.members)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, or only its name and summary while help is shown."""
        if cmd_name not in self.members:
            return None
        member = self.members[cmd_name]
        if ctx.meta.get(__name__):
            return TyperCommand(cmd_name, help=member.summary)
        return member.load(cmd_name)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return the completions of ``incomplete`` without importing any member."""
        ctx.meta[__name__] = True
        return super().shell_complete(ctx, incomplete)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help without importing any member."""
        ctx.meta[__name__] = True
        super().format_help(ctx, formatter)
