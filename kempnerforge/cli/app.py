"""The command ``kempnerforge``: its command groups and its error handling."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from typing import Annotated, ClassVar, NoReturn

import typer

from kempnerforge import __version__, log_setup
from kempnerforge.cli import completion
from kempnerforge.cli.lazy import LazyGroup, Member
from kempnerforge.errors import EXIT_FAULT, KempnerForgeError
from kempnerforge.log_setup import LogHandler
from kempnerforge.printable import PrintableStream, printable


class Groups(LazyGroup):
    """All command groups."""

    members: ClassVar = {
        "ckpt": Member("ckpt", "app", "Inspect, verify, compare and prune checkpoints."),
        "config": Member("config", "app", "Write, check, show and document configurations."),
        "data": Member("data", "app", "Tokenize text into shards, and inspect shards."),
        "eval": Member(
            "evaluate",
            "app",
            "Print the validation loss of a checkpoint, with its stored config and under any layout.",
        ),
        "generate": Member(
            "generate", "app", "Print a prompt and what a checkpoint continues it with, under any layout."
        ),
        "import": Member("weights", "import_app", "Import weights from other formats."),
        "ls": Member(
            "runs",
            "ls",
            "List the runs in DIR: state, steps, last losses, age, newest checkpoint, size of checkpoints.",
        ),
        "plan": Member(
            "plan",
            "app",
            "Show mesh, stages, memory, checkpoint size and batch of FILE on N processes. Needs no GPU.",
        ),
        "report": Member(
            "report",
            "app",
            "Report what RUN is and how it spent its time, or how OTHER differs: config, losses, goodput.",
        ),
        "unblock": Member(
            "unblock",
            "app",
            "Reset the failure counter of RUN and restore its suspect steps, after you fixed the cause.",
        ),
        "train": Member(
            "launch",
            "app",
            "Train FILE, or resume its run, on the GPUs of this node. Restart all processes after a fault.",
        ),
        "submit": Member(
            "submit",
            "app",
            "Check FILE on this layout, then train it as a SLURM job that requeues itself until it is "
            "finished.",
        ),
        "slurm": Member("slurm", "app", "Commands that batch scripts run before and after training."),
        "wandb": Member("wandb", "app", "Upload runs that were trained offline to Weights & Biases."),
    }


app = typer.Typer(
    name="kempnerforge",
    cls=Groups,
    help="Manage checkpoints, configurations, data and SLURM jobs of training runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"kempnerforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            callback=completion.install,
            is_eager=True,
            help="Let the TAB key complete commands and options: in bash, zsh and fish.",
        ),
    ] = False,
    show_completion: Annotated[
        bool,
        typer.Option(
            "--show-completion",
            callback=completion.show,
            is_eager=True,
            help="Print the script that --install-completion installs.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. A ``KempnerForgeError`` ends it with its message and exit status."""
    gc.set_threshold(500_000, 20, 20)  # garbage collection would take a tenth of a short command's time
    # pydantic would search the metadata of every installed package for plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    # Output contains text from files that other users may have written.
    sys.stdout = PrintableStream(sys.stdout)
    completion.register_shells()
    try:
        handler = LogHandler(log_setup.level_from(os.environ), rank=_rank(os.environ))
        with log_setup.shown_by(handler):
            app()
    except KempnerForgeError as error:
        _exit(str(error), error.exit_status)
    except OSError as error:
        _exit(f"{error}. Fix this and run the command again", EXIT_FAULT)


def _rank(environ: Mapping[str, str]) -> int:
    """Return the rank of this process under torchrun or srun, for debug lines; else 0."""
    rank = environ.get("RANK") or environ.get("SLURM_PROCID") or "0"
    return int(rank) if rank.isdecimal() else 0


def _exit(error: str, status: int) -> NoReturn:
    """Print the error, with ``--json`` also as a JSON object, and exit."""
    print(printable(error, lines=True), file=sys.stderr)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": error, "status": status}))
    sys.exit(status)
