"""The command line of ``scripts/train.py``."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from kempnerforge.config.schema import LoadedJob, load_job
from kempnerforge.errors import EXIT_FINISHED, ConfigError, ConfigIssue
from kempnerforge.launch.node_resources import set_threads
from kempnerforge.log_setup import level_from
from kempnerforge.rank_variables import die_with_launcher, receive_signals
from kempnerforge.train.termination.signals import StopSignals

USAGE = """\
usage: train.py --config FILE [--section.key=value ...]

Train the model that the TOML file FILE describes, or resume the run.

  --config FILE              the configuration; a file that it extends is read first
  --section.key=value        override a value of the file; "--section.key value" works too
  -h, --help                 show this text

Write values as in TOML. Quotes around text may be omitted, and "none" unsets an optional key.
To check a configuration without training: kempnerforge config check FILE, kempnerforge config show FILE.
Exit status: 0 finished, 2 invalid configuration, 75 stopped on request before the last step.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the configuration on the command line and return the exit status."""
    die_with_launcher()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        rank, world_size = rank_and_world_size(os.environ)
        level_from(os.environ)  # before the work of a start, which would be lost
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
            print(f"{error}\nSee: kempnerforge config keys", file=sys.stderr)
        return error.exit_status

    if world_size == 1 and (message := set_threads(os.environ, 1)):
        print(f"kempnerforge: {message}", file=sys.stderr, flush=True)
    # Before the import of torch, which takes seconds, so that a signal during it is not lost.
    signals = StopSignals()
    signals.install()
    receive_signals()
    return import_training()(loaded, signals)


def import_training() -> Callable[[LoadedJob, StopSignals], int]:
    """Import ``train.run.run_job`` and with it torch, which help and config errors do not need.

    Imported objects are never freed. Garbage collection during the import would take a sixth of the
    time, and later collections over these objects would occasionally delay a step.
    """
    gc.disable()
    try:
        from kempnerforge.train.run import run_job
    finally:
        gc.freeze()
        gc.enable()
    return run_job


def rank_and_world_size(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return this process's rank and the number of ranks: from the launcher, else from srun, else 0 and 1.

    The shell of an sbatch script has SLURM_PROCID but no SLURM step: it is a single process.

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
    """Return the FILE of the last ``--config FILE`` or ``--config=FILE``, and all other arguments.

    Raises:
        ConfigError: there is no ``--config``.
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


# Processes that training spawns import this file again.
if __name__ == "__main__":
    sys.exit(main())
