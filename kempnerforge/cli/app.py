"""The command ``kempnerforge``: its groups, and what an error becomes."""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Annotated, ClassVar, NoReturn

import typer

from kempnerforge import __version__
from kempnerforge.cli.lazy import LazyGroup, Member
from kempnerforge.errors import EXIT_FAULT, KempnerForgeError
from kempnerforge.printable import PrintableStream, printable


class Groups(LazyGroup):
    """All groups."""

    members: ClassVar = {
        "ckpt": Member("ckpt", "app", "Look at, check, compare and prune checkpoints."),
        "config": Member("config", "app", "Check, show and document configurations."),
        "data": Member("data", "app", "Make token shards from text, and look at them."),
        "eval": Member(
            "evaluate",
            "app",
            "Print the validation loss of a checkpoint, under the config that is stored with it and any "
            "layout.",
        ),
        "import": Member("weights", "import_app", "Make checkpoints from weights of others."),
        "plan": Member(
            "plan",
            "app",
            "Mesh, stages, memory, checkpoint size and batch of FILE on N processes. Needs no GPU.",
        ),
        "report": Member(
            "report",
            "app",
            "Effective training time of RUN, where the rest went, how attempts ended, how often to save.",
        ),
        "unblock": Member(
            "unblock",
            "app",
            "Declare the cause of RUN's faults fixed: reset the count, name suspect steps back.",
        ),
        "submit": Member(
            "submit",
            "app",
            "Check FILE on this layout, then train it as a SLURM job that goes on by itself until it is "
            "finished.",
        ),
        "slurm": Member("slurm", "app", "What a batch script calls before and after training."),
        "wandb": Member("wandb", "app", "Bring runs that were trained offline to Weights & Biases."),
    }


app = typer.Typer(
    name="kempnerforge",
    cls=Groups,
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
    gc.set_threshold(500_000, 20, 20)  # commands are short: looking for garbage takes a tenth of their time
    # pydantic would look through the metadata of every installed package for plugins: we want none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    # What a command prints has parts that others wrote into the folders it looks at.
    sys.stdout = PrintableStream(sys.stdout)
    try:
        app()
    except KempnerForgeError as error:
        _exit(str(error), error.exit_status)
    except OSError as error:
        _exit(f"{error}. Fix this and run the command again", EXIT_FAULT)


def _exit(error: str, status: int) -> NoReturn:
    """Say what is wrong, also as a JSON object to whoever asked for one, and end."""
    print(printable(error, lines=True), file=sys.stderr)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": error, "status": status}))
    sys.exit(status)
