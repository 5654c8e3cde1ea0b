"""Ranks, devices and process groups, from torchrun, from SLURM, or for a single process.

There are two groups. The default group carries the tensors of the training (NCCL on CUDA, gloo on
the CPU). The control group is always gloo and carries the values that ranks must agree on. Nothing
else may use it, so that a decision is never queued behind a gradient and never races with one.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kempnerforge import hostlist
from kempnerforge.distributed.agent_store import store_of_this_start
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.rank_variables import STORE_FD
from kempnerforge.torch_compat import c10d_world

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process among all ranks, and among the ranks of its node."""

    rank: int
    num_ranks: int
    rank_of_node: int


def find_rank_info(env: dict[str, str] | os._Environ[str] = os.environ) -> RankInfo:
    """Return this process's rank from the variables of torchrun, else of SLURM (``srun`` tasks).

    Without either, the run has a single process.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])))
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return RankInfo(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return RankInfo(0, 1, 0)


def _set_rendezvous(info: RankInfo) -> None:
    os.environ.setdefault("RANK", str(info.rank))
    os.environ.setdefault("WORLD_SIZE", str(info.num_ranks))
    if "MASTER_ADDR" not in os.environ:
        try:
            nodes = hostlist.expand(os.environ.get("SLURM_STEP_NODELIST", ""))
        except ValueError as error:
            raise ConfigError([ConfigIssue("SLURM_STEP_NODELIST", str(error), "set MASTER_ADDR")]) from None
        os.environ["MASTER_ADDR"] = nodes[0] if info.num_ranks > 1 and nodes else "127.0.0.1"
    if "MASTER_PORT" not in os.environ:
        if info.num_ranks == 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
        else:
            job = int(os.environ.get("SLURM_JOB_ID", "0"))
            os.environ["MASTER_PORT"] = str(20000 + job % 20000)


def _launcher_store(info: RankInfo, timeout: datetime.timedelta) -> Store | None:
    """Return the store of this start of the ranks under our launcher or torchrun; None without either.

    Rank 0 takes over the socket that our launcher has opened, so no other program can take the port
    before it listens. Collective: all ranks.
    """
    listening = os.environ.get(STORE_FD)
    is_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if listening is None and not is_torchrun:
        return None
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        info.num_ranks,
        is_master=listening is not None and info.rank == 0,
        timeout=timeout,
        master_listen_fd=int(listening) if listening is not None and info.rank == 0 else None,
    )
    if listening is not None:
        return store
    return store_of_this_start(store, rank=info.rank, num_ranks=info.num_ranks, timeout=timeout)


def collectives_issued() -> int:
    """Return how many collectives this process has issued so far, on all its groups. Never blocks.

    May be called from any thread. Comparing it between ranks shows which rank the others wait for.
    """
    return sum(_sequence_number(group) for group in list(c10d_world.pg_map))


def _sequence_number(group: Any) -> int:
    try:
        return group._get_sequence_number_for_group()
    except RuntimeError:  # this backend does not count collectives, on any rank
        return 0


class DistributedContext:
    """The ranks of this run, the device of this rank, and the control group."""

    def __init__(self, info: RankInfo, device: torch.device, control: ControlGroup) -> None:
        self.rank = info.rank
        self.num_ranks = info.num_ranks
        self.rank_of_node = info.rank_of_node
        self.device = device
        self.control = control

    @classmethod
    def start(cls, *, timeout_s: float) -> DistributedContext:
        """Set the device and join the process groups.

        Collective: all ranks. Blocks: until all ranks have joined, at most ``timeout_s``.
        """
        info = find_rank_info()
        _set_rendezvous(info)
        if torch.cuda.is_available():
            device = torch.device("cuda", info.rank_of_node % torch.cuda.device_count())
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        device_id = device if backend == "nccl" else None
        store = _launcher_store(info, timeout)
        if store is None:
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        else:
            dist.init_process_group(
                backend,
                store=store,
                rank=info.rank,
                world_size=info.num_ranks,
                timeout=timeout,
                device_id=device_id,
            )
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)
        log.debug(
            "joined %d ranks at %s:%s with %s, as %s of %s",
            *(info.num_ranks, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]),
            *(backend, device, socket.gethostname()),
        )
        return cls(info, device, ControlGroup(control))

    def close(self) -> None:
        """Leave the process groups. Not collective, so it may follow an error on one rank."""
        if dist.is_initialized():
            dist.destroy_process_group()
