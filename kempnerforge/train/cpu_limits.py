"""Refuse a job that cannot be trained on the CPU, before anything is created.

A config for GPUs that starts on a machine without one would otherwise be killed by the kernel, or
end with a traceback of the compiler.
"""

from __future__ import annotations

import os
import shutil

from kempnerforge.checkpoint.save.host_memory import Claim, claim, largest_excess
from kempnerforge.config.schema import JobConfig
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.plan.memory import device_memory

_NO_GPU = "torch sees no GPU here, so the CPU would train it"


def check_cpu(job: JobConfig, world: DistributedContext) -> None:
    """Check memory and compiler if the job is trained on the CPU.

    Collective: all ranks. Raises ConfigError on all ranks.
    """
    if world.device.type != "cpu":
        return
    issues = [_compiler_issue(job)]
    if job.model.is_llama:  # the size of other models is not known before they are built
        issues.append(_memory_issue(world.control.gather(_claim(job, world))))
    if found := [issue for issue in issues if issue is not None]:
        raise ConfigError(found)


def _memory_issue(claims: list[Claim]) -> ConfigIssue | None:
    """Return the problem if the states of the ranks of a machine or cgroup do not fit into its memory."""
    excess = largest_excess(claims)
    if excess is None:
        return None
    limit, needed_bytes = excess
    return ConfigIssue(
        "model",
        f"weights, gradients and optimizer state of the ranks {limit.name} take {needed_bytes / 1e9:.1f} GB, "
        f"and {limit.free_bytes / 1e9:.1f} GB are free there",
        f"{_NO_GPU}: start it on a machine with GPUs or on more nodes, or write a smaller [model]",
    )


def _claim(job: JobConfig, world: DistributedContext) -> Claim:
    """Return the memory that this rank's share of weights, gradients and optimizer state will take."""
    geometry = job.geometry(world.num_ranks)
    memory = device_memory(job, geometry, geometry.pp_rank(world.rank))
    needed_bytes = memory.weights + memory.gradients + memory.optimizer
    try:
        return claim(needed_bytes)
    except OSError:  # the memory of this machine is not known: refuse nothing
        return Claim(needed_bytes, "", ())


def _compiler_issue(job: JobConfig) -> ConfigIssue | None:
    compiler = os.environ.get("CXX", "g++")
    if not job.train.compile_model or shutil.which(compiler):
        return None
    return ConfigIssue(
        "train.compile_model",
        f"torch.compile needs a C++ compiler on the CPU, and {compiler} is not found",
        f"{_NO_GPU}: install {compiler}, name another one in CXX, or write compile_model = false",
    )
