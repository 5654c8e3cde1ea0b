"""The time between SIGTERM and SIGKILL in SLURM, and the resulting shutdown timeout of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.slurm.job import SlurmError, parse_facts, query
from kempnerforge.slurm.script import option_value

BEFORE_KILL_S = 5
"""A run that does not stop in time ends itself this long before SLURM kills it, after writing its stacks."""


@dataclass(frozen=True)
class Grace:
    """The time that SLURM allows a job between SIGTERM and SIGKILL."""

    kill_wait_s: int
    """``KillWait``: after scancel, a requeue, the time limit, or the loss of a node."""
    grace_s: int
    """``GraceTime`` of the partition, before a preemption; 0 if jobs are not preempted."""

    @property
    def longest_s(self) -> int:
        """The longer of the two, so that a save can use all of the time that it may have."""
        return max(self.kill_wait_s, self.grace_s)

    @property
    def shutdown_timeout_s(self) -> int:
        """Suitable value of ``train.shutdown_timeout_s``."""
        return max(1, self.longest_s - BEFORE_KILL_S)


def query_grace(sbatch_options: Sequence[str]) -> Grace | None:
    """Return the times of the partition of a job with these options; None if SLURM cannot be queried."""
    partition = option_value(sbatch_options, "--partition", "-p") or os.environ.get("SBATCH_PARTITION", "")
    try:
        return parse_grace(
            query("scontrol", "show", "config"), query("scontrol", "-o", "show", "partition"), partition
        )
    except SlurmError:  # sbatch will report the error
        return None


def parse_grace(config: str, partitions: str, partition: str) -> Grace | None:
    """Parse the output of ``scontrol``. Return the shortest times of several partitions.

    ``partition`` has their names, separated by commas; empty means the default one. Return None if
    one of them is unknown.
    """
    kill_wait = re.search(r"^KillWait\s*=\s*(\d+)", config, re.MULTILINE)
    by_name = {facts["PartitionName"]: facts for facts in map(parse_facts, partitions.splitlines()) if facts}
    default = [name for name, facts in by_name.items() if facts.get("Default") == "YES"]
    names = partition.split(",") if partition else default[:1]
    if kill_wait is None or not names or not by_name.keys() >= set(names):
        return None
    graces = [
        0 if by_name[name].get("PreemptMode") == "OFF" else int(by_name[name].get("GraceTime", "0"))
        for name in names
    ]
    return Grace(int(kill_wait[1]), min(graces))
