"""Small training states whose every bit is known at every step without reading a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import OptimizerConfig
from kempnerforge.train.optimizer import build_optimizer

CPU = torch.device("cpu")
SEED = 11
SHAPES = {"weight": (37, 24), "other": (9, 7), "bias": (5,), "frozen": (13, 11)}


class Small(nn.Module):
    """Four parameters whose shards are uneven. The last one is not trained."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=name != "frozen"))


def value_at(step: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the value of a tensor in the checkpoint of ``step``."""
    step = 0 if name == "model.frozen" else step
    seed = xxhash.xxh3_64_intdigest(f"{step} {name}".encode()) % 2**31
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rank_here() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks_here() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def make_state() -> TrainState:
    """Return a model and its optimizer, sharded over the ranks if there are several."""
    model = Small()
    if ranks_here() > 1:
        fully_shard(model)
    optimizer = build_optimizer([model], OptimizerConfig(), CPU)
    return TrainState(model=model, optimizer=optimizer, device=CPU, seed=SEED, cursor={"samples": 0})


def set_step(state: TrainState, step: int) -> None:
    """Set every tensor to its value at ``step``."""
    with torch.no_grad():
        for name, tensor in state.tensors().items():
            whole = value_at(step, name, tuple(tensor.shape))
            if isinstance(tensor, DTensor):
                whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(whole)
    state.step, state.cursor = step, {"samples": 10 * step}
    rng_state.derive(SEED, step, rank_here(), CPU)


def expected_tensors(step: int, ranks: int) -> dict[str, Tensor]:
    """Return all whole tensors of the checkpoint of ``step``, without reading any."""
    state = make_state()
    found = {name: value_at(step, name, tuple(tensor.shape)) for name, tensor in state.tensors().items()}
    for rank in range(ranks):
        rng_state.derive(SEED, step, rank, CPU)
        found[f"rng.rank_{rank:05d}"] = rng_state.capture(CPU)
    return found


def check_step(path: Path, step: int, expected: Mapping[str, Tensor]) -> None:
    """Fail unless the checkpoint at ``path`` holds exactly ``expected``."""
    reader = SafetensorsReader(path)
    try:
        assert set(reader.index) == set(expected)
        loaded = {name: torch.full(tensor.shape, 77).to(tensor.dtype) for name, tensor in expected.items()}
        load_tensors(loaded, reader)
        assert (reader.objects["step"], reader.objects["samples"]) == (step, 10 * step)
    finally:
        reader.close()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), f"{name} of step {step} differs"
