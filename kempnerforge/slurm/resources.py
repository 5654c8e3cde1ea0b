"""The resources that a job requests on each node."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.slurm.script import option_value

_CPU_OPTIONS = (("--cpus-per-task", "-c"), ("--cpus-per-gpu", "--cpus-per-gpu"))


@dataclass(frozen=True)
class Resources:
    """Resources of each node, as options of sbatch."""

    gpus_per_node: int | None = None
    gres: str = ""
    """Generic resources, such as ``gpu:h100:8``. If they name GPUs, ``gpus_per_node`` is not given."""
    cpus_per_task: int | None = None
    mem: str = ""

    @property
    def gpus(self) -> int:
        """Number of GPUs of each node; 1 if neither option says."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        in_gres = gpus_in_gres(self.gres)
        return 1 if in_gres is None else in_gres

    @property
    def options(self) -> list[str]:
        """The options of sbatch."""
        is_in_gres = gpus_in_gres(self.gres) is not None
        return [
            *([f"--gpus-per-node={self.gpus}"] if self.gpus and not is_in_gres else []),
            *([f"--gres={self.gres}"] if self.gres else []),
            *([f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []),
            *([f"--mem={self.mem}"] if self.mem else []),
        ]

    def check(self, sbatch_options: Sequence[str]) -> None:
        """Raise ConfigError if an option is given twice, or has a value that sbatch would refuse."""
        faults = []
        if self.gpus_per_node is not None and gpus_in_gres(self.gres) is not None:
            faults.append(ConfigIssue("--gres", f"{self.gres} has GPUs, and --gpus-per-node too", "give one"))
        if self.mem and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            faults.append(ConfigIssue("--mem", f'"{self.mem}" is not a size', "e.g. 0, 64000M or 200G"))
        if self.gres and not re.fullmatch(r"[\w:.,()=/-]+", self.gres):
            faults.append(ConfigIssue("--gres", f'"{self.gres}" is not a resource', "e.g. gpu:h100:8"))
        given = {"--gres": self.gres, "--cpus-per-task": self.cpus_per_task, "--mem": self.mem}
        for name, letter in (("--gres", ""), ("--cpus-per-task", "-c"), ("--mem", "")):
            if given[name] and option_value(sbatch_options, name, letter or name) is not None:
                faults.append(ConfigIssue(name, "is given twice, before and after --", "give it once"))
        if faults:
            raise ConfigError(faults, where="command line")

    def has_cpus(self, sbatch_options: Sequence[str]) -> bool:
        """Return whether the job requests a number of CPUs, or whole nodes."""
        asked = any(option_value(sbatch_options, *names) is not None for names in _CPU_OPTIONS)
        is_exclusive = any(option.partition("=")[0] == "--exclusive" for option in sbatch_options)
        return bool(self.cpus_per_task) or asked or is_exclusive


def gpus_in_gres(gres: str) -> int | None:
    """Return the number of GPUs in a value of ``--gres``; None if it names none.

    ``gpu``, ``gpu:8``, ``gpu:h100:8`` and ``gpu:h100``, among other resources.
    """
    found = None
    for word in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = word.split(":")
        if name == "gpu":
            number = rest[-1] if rest and rest[-1].isdecimal() else "1"
            found = (found or 0) + int(number)
    return found
