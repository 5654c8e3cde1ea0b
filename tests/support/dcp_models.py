"""Small models under each kind of parallelism, to compare whole training states with stock DCP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.dcp_pairs import STOCK, WRITER, State, assert_same, load_by, save_by
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WIDTH = 6


class Net(nn.Module):
    """A model with a head that the number of ranks does not divide, a buffer, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the head over a two-layer block."""
        assert isinstance(self.steps, torch.Tensor)
        self.steps += 1
        hidden = self.down(torch.relu(self.up(x)))
        return self.head(hidden * self.scale)


def net(seed: int = 1) -> Net:
    """Return a model whose initial weights are determined by ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def fsdp2(model: Net) -> nn.Module:
    """Apply FSDP2 over all ranks, with each layer as a unit."""
    return _fsdp2(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def _fsdp2(model: Net, mesh: DeviceMesh) -> nn.Module:
    for layer in (model.up, model.down, model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def hsdp(model: Net) -> nn.Module:
    """Apply FSDP2 on a mesh (2, ranks / 2): replicated, then sharded."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _fsdp2(model, mesh)


def fsdp1(model: Net) -> nn.Module:
    """Apply FSDP1 on a mesh. Its state dicts contain DTensors."""
    return _fsdp1(model, device_mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp1_without_mesh(model: Net) -> nn.Module:
    """Apply FSDP1 on a process group. Its state dicts contain ShardedTensors."""
    return _fsdp1(model)


def fsdp1_hybrid(model: Net) -> nn.Module:
    """Apply FSDP1, replicated and sharded."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _fsdp1(model, device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD)


def _fsdp1(model: Net, **options: Any) -> nn.Module:
    # FSDP1 looks for an accelerator unless a device is given.
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), **options)


def ddp(model: Net) -> nn.Module:
    """Apply DDP: all ranks have the same tensors, with ``module.`` in their names."""
    return DistributedDataParallel(model)


def tensor_parallel(model: Net) -> nn.Module:
    """Apply tensor parallelism over all ranks: columns, then rows."""
    return _tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def _tensor_parallel(model: Net, mesh: DeviceMesh) -> Net:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def fsdp_and_tp(model: Net) -> nn.Module:
    """Apply tensor parallelism inside FSDP2 on a mesh (2, ranks / 2)."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    return _fsdp2(_tensor_parallel(model, mesh["tp"]), mesh["dp"])


def alone(model: Net) -> nn.Module:
    """Apply no parallelism."""
    return model


Wrap = Callable[[Net], nn.Module]
MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW, which has two tensors and a counter per parameter."""
    return torch.optim.AdamW((one for one in parameters if one.requires_grad), lr=0.05, betas=(0.8, 0.9))


def momentum(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return SGD with momentum, which does not exist before the first step."""
    return torch.optim.SGD((one for one in parameters if one.requires_grad), lr=0.05, momentum=0.9)


class Training:
    """A wrapped model and its optimizer, with a learning rate that changes at every step."""

    def __init__(self, wrap: Wrap, make: MakeOptimizer = adamw, *, seed: int = 1) -> None:
        self.model = wrap(net(seed))
        self.optimizer = make(self.model.parameters())
        self.step = 0

    def train(self, steps: int) -> list[float]:
        """Train on data that is the same on all ranks, and return the losses."""
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            loss = self.model(torch.randn(4, WIDTH, generator=generator)).pow(2).mean()
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = 0.05 / (1 + self.step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(float(loss.detach()))
        return losses

    def state(self, options: StateDictOptions | None = None) -> dict[str, Any]:
        """Return the state to save, which is also the target of a load."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def restore(self, state: dict[str, Any], options: StateDictOptions | None = None) -> None:
        """Apply a state that was loaded."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        self.step = state["step"]


WRAPS: dict[str, Wrap] = {
    one.__name__: one
    for one in (
        fsdp2,
        hsdp,
        fsdp1,
        fsdp1_without_mesh,
        fsdp1_hybrid,
        ddp,
        tensor_parallel,
        fsdp_and_tp,
        alone,
    )
}
OPTIMIZERS: dict[str, MakeOptimizer] = {"adamw": adamw, "momentum": momentum}
ONE_WAY = (STOCK, "async", WRITER)
"""Our three modes make the same plan. One of them is enough where only placements differ."""


def whole(value: Any) -> Any:
    """Return ``value`` with DTensors gathered, so that states of different layouts can be compared."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def local(value: Any) -> Any:
    """Return ``value`` with ShardedTensors as lists of offsets and local shards, which can be pickled."""
    if isinstance(value, ShardedTensor):
        return [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
    if isinstance(value, dict):
        return {key: local(item) for key, item in value.items()}
    return [local(item) for item in value] if isinstance(value, list) else value


def resume_on(
    kind: str,
    folder: Path,
    ways: tuple[str, ...],
    options: StateDictOptions | None = None,
    optimizers: tuple[str, ...] = ("adamw",),
) -> None:
    """Train 2 steps, save, train 2 more. A new program that loads must repeat these 2 steps bit for bit."""
    wrap = WRAPS[kind]
    for name in optimizers:
        make = OPTIMIZERS[name]
        training = Training(wrap, make)
        training.train(2)
        for way in ways:
            save_by(way, training.state(options), folder / f"{kind}.{name}.{way}")
        losses = training.train(2)
        wanted = training.state(options)
        for way in ways:
            resumed = Training(wrap, make, seed=2)
            state = resumed.state(options)
            load_by(way, state, folder / f"{kind}.{name}.{way}")
            resumed.restore(state, options)
            assert resumed.train(2) == losses, f"{kind} {name} {way}"
            assert_same(resumed.state(options), wanted, f"{kind} {name} {way}")


def resume_on_all(kinds: list[str], folder: Path, ways: tuple[str, ...]) -> None:
    """Call ``resume_on`` for each of ``kinds``."""
    for kind in kinds:
        resume_on(kind, folder, ways)


def load_everywhere(kinds: list[str], sources: list[str], folder: Path, ways: tuple[str, ...]) -> list[State]:
    """Load each save under ``sources`` into each of ``kinds``. All must give the same whole state."""
    found: list[State] = []
    for way in ways:
        for source in sources:
            for kind in kinds:
                training = Training(WRAPS[kind], seed=2)
                state = training.state()
                load_by(way, state, folder / f"{source}.adamw.{way}")
                training.restore(state)
                found.append(whole(training.state()))
                assert_same(found[-1]["step"], 2, f"{way} {source} {kind}")
    return found
