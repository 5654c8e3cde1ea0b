"""The command line of ``scripts/train.py``."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from kempnerforge.config.schema import LoadedJob, load_job
from kempnerforge.errors import EXIT_FINISHED, ConfigError, ConfigIssue
from kempnerforge.train.termination.signals import StopSignals

USAGE = """\
usage: train.py --config FILE [--section.key=value ...]

Trains the model that the TOML file FILE describes, or goes on where the run was.

  --config FILE              the configuration; what it extends is read first
  --section.key=value        put a value over the file's; "--section.key value" works too
  -h, --help                 show this text

Values are written as in TOML; quotes around text may be left out, and none unsets a key that may be none.
To look at a configuration without training: kempnerforge config check FILE, kempnerforge config show FILE.
Exit status: 0 finished, 2 the configuration cannot work, 75 stopped on request with work left.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what the command line describes; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        rank, world_size = rank_and_world_size(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if "-h" in arguments or "--help" in arguments:
        if rank == 0:
            from kempnerforge.config.reference import keys_text

            print(f"{USAGE}\n{keys_text()}", end="")
        return EXIT_FINISHED
    try:
        file, overrides = split_config(arguments)
        loaded = load_job(file, overrides, world_size=world_size)
    except ConfigError as error:
        if rank == 0:
            print(f"{error}\nSee: python scripts/train.py --help", file=sys.stderr)
        return error.exit_status

    # Before torch, whose import takes seconds: a signal that comes meanwhile is not lost.
    signals = StopSignals()
    signals.install()
    return import_training()(loaded, signals)


def import_training() -> Callable[[LoadedJob, StopSignals], int]:
    """``train.run.run_job``. Help and refusals need no torch; this does.

    Nothing of what is imported ever goes away: looking for garbage meanwhile takes a sixth of the time, and
    looking through all of it later would make a step late now and then.
    """
    gc.disable()
    try:
        from kempnerforge.train.run import run_job
    finally:
        gc.freeze()
        gc.enable()
    return run_job


def rank_and_world_size(environ: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and their number: torchrun's, else those of srun's tasks, else 0 of 1.

    The shell of an sbatch script has SLURM_PROCID too, but no step: it is one process.

    Raises:
        ConfigError: one of the variables is not a number.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _number(environ, "RANK", least=0), _number(environ, "WORLD_SIZE", least=1)
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        ranks = _number(environ, "SLURM_STEP_NUM_TASKS", least=1)
        return _number(environ, "SLURM_PROCID", least=0), ranks
    return 0, 1


def _number(environ: Mapping[str, str], name: str, *, least: int) -> int:
    value = environ[name]
    if not value.isdecimal() or int(value) < least:
        problem = f'"{value}" is not an integer >= {least}'
        raise ConfigError([ConfigIssue(name, problem, "the launcher sets it: unset it", "environment")])
    return int(value)


def split_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The FILE of ``--config FILE`` or ``--config=FILE`` (the last one counts), and all other arguments.

    Raises:
        ConfigError: there is none.
    """
    file, rest = "", []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--config":
            file = remaining.pop(0) if remaining and not remaining[0].startswith("--") else ""
        elif argument.startswith("--config="):
            file = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    if not file:
        example = "write --config FILE, such as --config configs/quickstart.toml"
        raise ConfigError([ConfigIssue("--config", "is missing", example)], where="command line")
    return file, rest
