"""The command ``kempnerforge``: its groups, and what an error becomes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command as make_command

from kempnerforge import __version__
from kempnerforge.errors import EXIT_FAULT, KempnerForgeError


def _ckpt() -> typer.Typer:
    from kempnerforge.cli import ckpt

    return ckpt.app


def _config() -> typer.Typer:
    from kempnerforge.cli import config

    return config.app


def _data() -> typer.Typer:
    from kempnerforge.cli import data

    return data.app


def _eval() -> typer.Typer:
    from kempnerforge.cli import evaluate

    return evaluate.app


def _import() -> typer.Typer:
    from kempnerforge.cli import weights

    return weights.import_app


def _plan() -> typer.Typer:
    from kempnerforge.cli import plan

    return plan.app


def _report() -> typer.Typer:
    from kempnerforge.cli import report

    return report.app


def _unblock() -> typer.Typer:
    from kempnerforge.cli import unblock

    return unblock.app


def _slurm() -> typer.Typer:
    from kempnerforge.cli import slurm

    return slurm.app


def _submit() -> typer.Typer:
    from kempnerforge.cli import submit

    return submit.app


def _wandb() -> typer.Typer:
    from kempnerforge.cli import wandb

    return wandb.app


GROUPS: dict[str, Callable[[], typer.Typer]] = {
    "ckpt": _ckpt,
    "config": _config,
    "data": _data,
    "eval": _eval,
    "import": _import,
    "plan": _plan,
    "report": _report,
    "unblock": _unblock,
    "submit": _submit,
    "slurm": _slurm,
    "wandb": _wandb,
}


class _Groups(TyperGroup):
    """Imports the group that is asked for: pydantic and NumPy take longer than most commands of ``ckpt``."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(GROUPS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in GROUPS:
            return None
        command = make_command(GROUPS[cmd_name]())
        command.name = cmd_name
        return command


app = typer.Typer(
    name="kempnerforge",
    cls=_Groups,
    help="Looks after checkpoints, configurations, data and SLURM jobs of training runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kempnerforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors raised on purpose end it with their message and exit status."""
    try:
        app()
    except KempnerForgeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        print(f"{error}; see to it, then repeat the command", file=sys.stderr)
        sys.exit(EXIT_FAULT)
