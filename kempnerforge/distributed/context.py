"""Ranks, devices and process groups, from torchrun, from SLURM, or as one process on its own.

Two groups exist. The default group carries the training's tensors (NCCL on CUDA, gloo on the CPU). The
control group is always gloo and carries what ranks must agree on; nothing else may use it, so a decision can
never be queued behind, or raced by, a gradient.
"""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from kempnerforge import hostlist
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import ConfigError, ConfigIssue


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands: ``rank`` of ``num_ranks``, ``rank_of_node`` on its node."""

    rank: int
    num_ranks: int
    rank_of_node: int


def find_place(env: dict[str, str] | os._Environ[str] = os.environ) -> RankInfo:
    """This process's rank, from torchrun's variables, else SLURM's (``srun`` tasks), else alone."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])))
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return RankInfo(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return RankInfo(0, 1, 0)


def _set_rendezvous(place: RankInfo) -> None:
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.num_ranks))
    if "MASTER_ADDR" not in os.environ:
        try:
            nodes = hostlist.expand(os.environ.get("SLURM_STEP_NODELIST", ""))
        except ValueError as error:
            raise ConfigError([ConfigIssue("SLURM_STEP_NODELIST", str(error), "set MASTER_ADDR")]) from None
        os.environ["MASTER_ADDR"] = nodes[0] if place.num_ranks > 1 and nodes else "127.0.0.1"
    if "MASTER_PORT" not in os.environ:
        if place.num_ranks == 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
        else:
            job = int(os.environ.get("SLURM_JOB_ID", "0"))
            os.environ["MASTER_PORT"] = str(20000 + job % 20000)


def collectives_issued() -> int:
    """How many collectives this process has issued so far, on all its groups together. Never blocks.

    Any thread. Compared between ranks, it tells which one others wait for.
    """
    return sum(_sequence_number(group) for group in list(_world.pg_map))


def _sequence_number(group: Any) -> int:
    try:
        return group._get_sequence_number_for_group()
    except RuntimeError:  # a backend that does not count; it is the same on all ranks
        return 0


class DistributedContext:
    """All ranks of this run, the device of this one, and the control group that they agree on."""

    def __init__(self, place: RankInfo, device: torch.device, control: ControlGroup) -> None:
        self.rank = place.rank
        self.num_ranks = place.num_ranks
        self.rank_of_node = place.rank_of_node
        self.device = device
        self.control = control

    @classmethod
    def start(cls, *, timeout_s: float) -> DistributedContext:
        """Set the device, join the process groups.

        Collective: all ranks. Blocks: until all ranks have joined, ``timeout_s`` at most.
        """
        place = find_place()
        _set_rendezvous(place)
        if torch.cuda.is_available():
            device = torch.device("cuda", place.rank_of_node % torch.cuda.device_count())
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)
        return cls(place, device, ControlGroup(control))

    def close(self) -> None:
        """Leave the process groups. Not collective: also right after an error on one rank."""
        if dist.is_initialized():
            dist.destroy_process_group()
