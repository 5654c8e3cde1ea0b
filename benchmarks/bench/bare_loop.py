"""The reference: a minimal training loop with only FSDP2 and torch. Started by torchrun.

    torchrun --nproc-per-node 2 benchmarks/bench/bare_loop.py SPEC.json

The model, its initial weights and the batches are those of KempnerForge, so that losses can be
compared. Sharding, mixed precision, loss, clipping, optimizer and checkpoints are torch's own, used
as in its tutorials.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from kempnerforge.config.model import ModelConfig
from kempnerforge.model.init import init_weights_, reset_buffers_
from kempnerforge.model.llama import Llama


def main() -> None:
    """Train from step ``start`` to ``steps``. Write the losses and the end time of each part."""
    ended = {"imports": time.time()}
    spec = json.loads(Path(sys.argv[1]).read_text())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ended["process_groups"] = time.time()
    batches = np.load(spec["batches"], mmap_mode="r")  # [steps, sequences of the global batch, tokens + 1]
    ended["data"] = time.time()

    config = ModelConfig(**spec["model"])
    with torch.device("meta"):
        model = Llama(config)
    cast = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    policy = MixedPrecisionPolicy(**cast if spec["mixed_precision"] == "bf16" else {})
    mesh = init_device_mesh(device.type, (ranks,))
    for block in model.layers.values():
        if spec["compile_model"]:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    reset_buffers_(model)
    if not spec["load"]:
        init_weights_(model, seed=spec["seed"], init_std=config.init_std, n_layers=config.n_layers)
    decay = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": spec["weight_decay"]}]
    rest = [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        decay + rest, lr=spec["lr"], betas=tuple(spec["betas"]), eps=spec["eps"], fused=True
    )
    ended["model"] = time.time()

    if spec["load"]:
        weights, moments = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": moments}, checkpoint_id=spec["load"])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    ended["load"] = time.time()

    losses, step_ended = [], []
    for step in range(spec["start"], spec["steps"]):
        mine = np.array(batches[step].reshape(ranks, -1, batches.shape[-1])[rank])
        tokens = torch.from_numpy(mine).to(device, non_blocking=True)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["grad_clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)  # for the log, as in any loop; on CUDA item() synchronizes the step
        losses.append(mean.item())
        step_ended.append(time.time())
        if rank == 0 and spec["log"]:
            attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            row = {"step": step + 1, "attempt": attempt, "time": step_ended[-1], "train/loss": losses[-1]}
            with Path(spec["log"]).open("a") as log:
                log.write(json.dumps(row) + "\n")

    if spec["save"]:
        weights, moments = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": moments}, checkpoint_id=spec["save"])
    if rank == 0:
        result = {"losses": losses, "step_ended": step_ended, "ended": ended}
        Path(spec["out"]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    # In one of fifty starts gloo's threads aborted the interpreter at exit. Nothing is measured
    # after this point.
    os._exit(0)


if __name__ == "__main__":
    main()
