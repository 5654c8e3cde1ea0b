"""Render the sbatch script of a run from a template. The files in ``slurm/`` are rendered from it too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kempnerforge.errors import ConfigError, ConfigIssue

TEMPLATE = Path(__file__).parent / "job.sh"
OWNED = {
    "--nodes": "--nodes",
    "-N": "--nodes",
    "--time": "--time",
    "-t": "--time",
    "--gpus-per-node": "--gpus-per-node",
    "--ntasks-per-node": "",
    "--ntasks": "",
    "-n": "",
}
"""Options of sbatch that determine the layout -> the option of ``submit`` to use instead, if any."""

STOP_BEFORE_S = 120
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Request:
    """The parameters of a SLURM job for one run."""

    name: str
    nodes: int
    processes_per_node: int
    time: str
    """Time limit in sbatch's format, such as ``24:00:00``."""
    train: Sequence[str]
    """The configuration file and its overrides."""
    command: str
    """The command that renders the script, for its first lines."""
    output: str = "slurm-%x-%j.log"
    resources: Sequence[str] = ()
    """Options of sbatch about the resources of a node, such as ``--gpus-per-node=8``."""
    prologue: Sequence[str] = ()
    """Lines of shell code to run first, such as ``module load cuda``."""
    script: str = ""
    """The training script; empty for that of the package."""
    sweep: str = ""
    """Folder of the sweep whose array this is; empty for a single run."""
    num_cells: int = 0
    """Number of runs of the sweep."""
    bin_dir: str = ""
    """Folder of kempnerforge; empty to use PATH."""
    sbatch_options: Sequence[str] = ()


def render(request: Request) -> str:
    """Return the script."""
    path = f'PATH={shlex.quote(request.bin_dir)}:"$PATH"\n' if request.bin_dir else ""
    filled = {
        # On one line: text after a line break in a comment would be executed.
        "@COMMAND@": " ".join(request.command.splitlines()),
        "@SBATCH@": "\n".join(f"#SBATCH {option}" for option in _directives(request)),
        "@PROLOGUE@": "".join(f"{line}\n" for line in request.prologue),
        "@PATH@": path,
        "@PROCESSES@": str(request.processes_per_node),
        "@SCRIPT@": f"--script {shlex.quote(request.script)} " if request.script else "",
        "@REQUEUE@": "" if "--no-requeue" in request.sbatch_options else "export KEMPNERFORGE_REQUEUE=1\n",
        "@SWEEP@": _sweep_lines(request.sweep) if request.sweep else "",
        "@TRAIN@": " ".join(shlex.quote(word) for word in request.train),
    }
    pattern = re.compile("|".join(filled))
    return pattern.sub(lambda match: filled[match[0]], TEMPLATE.read_text(encoding="utf-8"))


def _sweep_lines(folder: str) -> str:
    return (
        f"overrides=$(kempnerforge slurm cell {shlex.quote(folder)}) || exit # of this task of the sweep\n"
        'while IFS= read -r override; do train+=("$override"); done <<<"$overrides"\n'
    )


def _directives(request: Request) -> list[str]:
    lines = [
        f"--job-name={request.name}",
        f"--nodes={request.nodes}",
        "--ntasks-per-node=1",
        *(shlex.quote(option) for option in request.resources),
        f"--time={request.time}",
        *([f"--array=0-{request.num_cells - 1}"] if request.sweep else []),
        f"--output={shlex.quote(request.output)}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{stop_before_s(request.time)}",
    ]
    for option in request.sbatch_options:
        if option.startswith("-"):
            lines.append(shlex.quote(option))
        else:
            lines[-1] += f" {shlex.quote(option)}"
    return lines


def escape_pattern(path: str) -> str:
    """Escape a path for options in which sbatch replaces patterns such as ``%j``."""
    return path.replace("%", "%%")


def expand_pattern(pattern: str, values: Mapping[str, str]) -> str:
    """Expand a file name pattern as sbatch does. Letters without a value are not changed."""

    def expand(match: re.Match[str]) -> str:
        return "%" if match[1] == "%" else values.get(match[1], match[0])

    return re.sub(r"%(.)", expand, pattern)


def stop_before_s(time: str) -> int:
    """Return the seconds between the signal to the batch shell and the limit: 120, or a quarter of it."""
    seconds = parse_time_s(time)
    return STOP_BEFORE_S if seconds is None else min(STOP_BEFORE_S, seconds // 4)


def parse_time_s(text: str) -> int | None:
    """Return the seconds of an sbatch time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. None if invalid."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def option_value(options: Sequence[str], name: str, letter: str) -> str | None:
    """Return the value of an sbatch option, written as ``--name=V``, ``--name V``, ``-nV`` or ``-n V``."""
    value = None
    for option, following in pairwise([*options, ""]):
        if option in (name, letter):
            value = following
        elif option.startswith(f"{name}="):
            value = option.removeprefix(f"{name}=")
        elif option.startswith(letter) and not option.startswith("--"):
            value = option.removeprefix(letter)
    return value


def array_faults(options: Sequence[str], run_dir: str, *, is_shared: bool) -> list[ConfigIssue]:
    """Report an ``--array`` whose tasks would all train in ``run_dir`` (``is_shared``) at the same time."""
    array = option_value(options, "--array", "-a")
    if array is None or not is_shared or array.endswith("%1") or array.isdecimal():
        return []
    problem = f"all tasks would write the same run, {run_dir}"
    allowed = "put {array_task_id} into run.dir, or append %1 to run one task after the other"
    return [ConfigIssue(f"--array={array}", problem, allowed)]


def option_faults(time: str, sbatch_options: Sequence[str]) -> list[ConfigIssue]:
    """Report an invalid time limit, and options that must not be passed to sbatch."""
    faults = []
    if not parse_time_s(time):
        faults.append(ConfigIssue("--time", f'"{time}" is not a time limit', "e.g. 90, 24:00:00 or 2-12"))
    for option in sbatch_options:
        name = option.partition("=")[0]
        name = name if name.startswith("--") else name[:2]
        if len(option.splitlines()) > 1:
            faults.append(ConfigIssue(repr(option), "has a line break", "write it on one line"))
        elif name in OWNED:
            instead = f"write {OWNED[name]} before --" if OWNED[name] else "there is one task per node"
            faults.append(ConfigIssue(option, "would change the layout, which is already checked", instead))
        elif re.match(r"--\w+\.\w", option):
            faults.append(ConfigIssue(option, "is not an option of sbatch", "write overrides before --"))
    return faults


def check_options(
    time: str, sbatch_options: Sequence[str], run_dir: str, *, is_shared: bool, is_sweep: bool
) -> None:
    """Raise ConfigError if ``option_faults`` or ``array_faults`` reports any issue."""
    faults = [
        *option_faults(time, sbatch_options),
        *array_faults(sbatch_options, run_dir, is_shared=is_shared),
    ]
    if is_sweep and option_value(sbatch_options, "--array", "-a") is not None:
        faults.append(ConfigIssue("--array", "is set by --sweep", "leave it out"))
    if faults:
        raise ConfigError(faults, where="command line")
