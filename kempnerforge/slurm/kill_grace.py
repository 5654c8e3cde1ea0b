"""How long SLURM waits between SIGTERM and SIGKILL, and how long a run may therefore take to stop."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kempnerforge.slurm.job import SlurmError, ask, parse_facts
from kempnerforge.slurm.script import option_value

BEFORE_KILL_S = 5
"""A run that does not stop ends itself this long before SLURM would, so that its stacks are written."""


@dataclass(frozen=True)
class Grace:
    """What SLURM grants a job between SIGTERM and SIGKILL."""

    kill_wait_s: int
    """``KillWait``: after scancel, a requeue, the time limit, the loss of a node."""
    grace_s: int
    """``GraceTime`` of the partition, before a preemption; 0 where jobs are not preempted."""

    @property
    def longest_s(self) -> int:
        """The longer of the two: a save that has this time shall have it."""
        return max(self.kill_wait_s, self.grace_s)

    @property
    def shutdown_timeout_s(self) -> int:
        """What ``train.shutdown_timeout_s`` should be."""
        return max(1, self.longest_s - BEFORE_KILL_S)


def ask_grace(sbatch_options: Sequence[str]) -> Grace | None:
    """What the partition of a job with these options grants; None where SLURM cannot be asked."""
    partition = option_value(sbatch_options, "--partition", "-p") or os.environ.get("SBATCH_PARTITION", "")
    try:
        return parse_grace(
            ask("scontrol", "show", "config"), ask("scontrol", "-o", "show", "partition"), partition
        )
    except SlurmError:  # sbatch will say so
        return None


def parse_grace(config: str, partitions: str, partition: str) -> Grace | None:
    """The same, from what ``scontrol`` prints. Of several partitions the least counts. Pure.

    ``partition``: their names, with commas; empty for the default one. None when one is not known.
    """
    kill_wait = re.search(r"^KillWait\s*=\s*(\d+)", config, re.MULTILINE)
    known = {facts["PartitionName"]: facts for facts in map(parse_facts, partitions.splitlines()) if facts}
    default = [name for name, facts in known.items() if facts.get("Default") == "YES"]
    names = partition.split(",") if partition else default[:1]
    if kill_wait is None or not names or not known.keys() >= set(names):
        return None
    graces = [
        0 if known[name].get("PreemptMode") == "OFF" else int(known[name].get("GraceTime", "0"))
        for name in names
    ]
    return Grace(int(kill_wait[1]), min(graces))
