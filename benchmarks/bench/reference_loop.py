"""A training loop without KempnerForge: plain FSDP2, with blocking saves by stock ``dcp.save``.

torchrun ... benchmarks/bench/reference_loop.py --config FILE --folder DIR --steps 100 --interval 10

This is the reference arm of ``bench_goodput.py``. Model, initial weights, data order, learning
rates and batch are those of the TOML file. Parallelism, optimizer step, saving and resuming are
PyTorch's own, in this file. A later start resumes from the newest folder with a ``.metadata``
file. Rank 0 appends rows to ``rows.jsonl``, with the names of KempnerForge's
``metrics.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy

from kempnerforge.config.scheduler import lr_at
from kempnerforge.config.schema import JobConfig, load_job
from kempnerforge.data.loader import Batch, BatchLoader, Cursor
from kempnerforge.data.tokens import open_dataset
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.train.environment import set_determinism
from kempnerforge.train.optimizer import parameter_groups

KEEP = 2
METADATA = ".metadata"


def make_model(job: JobConfig, device: torch.device) -> Llama:
    """Return the model, sharded over all ranks with PyTorch's defaults."""
    with torch.device("meta"):
        model = Llama(job.model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    bf16 = job.train.mixed_precision == "bf16"
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if bf16
        else MixedPrecisionPolicy()
    )
    for module in (*model.layers.values(), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    init_weights_(model, seed=job.train.seed, init_std=job.model.init_std, n_layers=job.model.n_layers)
    return model


def make_optimizer(job: JobConfig, model: Llama) -> torch.optim.AdamW:
    """Return AdamW with the groups and hyperparameters of the file."""
    config = job.optimizer
    decay, no_decay = parameter_groups([model], config)
    parameters = dict(model.named_parameters())
    assert config.betas is not None
    assert config.eps is not None
    return torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in decay.names], "weight_decay": config.weight_decay},
            {"params": [parameters[name] for name in no_decay.names], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=config.fused or None,
    )


class Loop:
    """The loop of one attempt."""

    def __init__(self, job: JobConfig, folder: Path, device: torch.device) -> None:
        self.job, self.folder, self.device = job, folder, device
        self.model = make_model(job, device)
        self.optimizer = make_optimizer(job, self.model)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = (folder / "rows.jsonl").open("a") if dist.get_rank() == 0 else None
        self.write()  # terminates a line that a kill has torn

    def write(self, **row: Any) -> None:
        """Append a row, on rank 0."""
        if self._rows is not None:
            self._rows.write(f"{json.dumps(row)}\n" if row else "\n")
            self._rows.flush()

    def resume(self) -> None:
        """Load the newest complete folder. Does nothing on a fresh start."""
        saved = saved_steps(self.folder)
        if not saved:
            return
        started = time.perf_counter()
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        load(state, checkpoint_id=step_folder(self.folder, saved[-1]))
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = saved[-1]
        self.write(resumed=self.step, load_s=time.perf_counter() - started)

    def save(self) -> None:
        """Write the state and return when it is on disk."""
        started = time.perf_counter()
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        save(state, checkpoint_id=step_folder(self.folder, self.step))
        took_s = time.perf_counter() - started
        if dist.get_rank() == 0:
            for old in saved_steps(self.folder)[:-KEEP]:
                shutil.rmtree(step_folder(self.folder, old))
        saved = {"checkpoint/step": self.step, "checkpoint/blocking_s": took_s, "checkpoint/total_s": took_s}
        self.write(step=self.step, **saved)

    def train(self, steps: int, interval: int) -> None:
        """Train to ``steps``, saving every ``interval`` steps (0: never) and at the end."""
        batches = self._batches()
        while self.step < steps:
            batch, _ = next(batches)
            assert isinstance(batch, Batch)
            loss = self._update(batch, steps)
            self.step += 1
            self.write(step=self.step, **{"train/loss": loss})
            if (interval and self.step % interval == 0) or self.step == steps:
                self.save()
        batches.close()

    def _update(self, batch: Batch, steps: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, self.job.scheduler, base_lr=self.job.optimizer.lr, max_steps=steps)
        total = torch.zeros((), device=self.device)
        inputs_ABT, targets_ABT = batch.inputs_ABT.to(self.device), batch.targets_ABT.to(self.device)
        for inputs_BT, targets_BT in zip(inputs_ABT, targets_ABT, strict=True):
            logits_BTV = self.model(inputs_BT)
            loss = cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten()) / len(inputs_ABT)
            loss.backward()
            total += loss.detach()
        if self.job.train.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.job.train.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def _batches(self) -> BatchLoader:
        train, num_ranks = self.job.train, dist.get_world_size()
        global_batch_size = train.global_batch_size or train.batch_size * num_ranks
        path = Path(str(self.job.data.dataset_path)).expanduser()
        dataset = open_dataset(
            path, vocab_size=self.job.model.vocab_size, val_fraction=self.job.data.val_fraction
        )
        return BatchLoader(
            dataset.split("train", train.seq_len),
            seed=train.seed,
            global_batch_size=global_batch_size,
            batch_size=train.batch_size,
            dp_rank=dist.get_rank(),
            dp_size=num_ranks,
            cursor=Cursor(self.step * global_batch_size),
            prefetch_batches=self.job.data.prefetch_batches,
        )


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step."""
    return folder / "checkpoints" / f"step_{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps to resume from, oldest first."""
    complete = (folder / "checkpoints").glob(f"step_*/{METADATA}")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in complete)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the TOML file; data.dataset_path must be set")
    parser.add_argument("--folder", type=Path, required=True, help="the run's folder")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps in all")
    parser.add_argument("--interval", type=int, required=True, help="steps between saves")
    return parser.parse_args()


def main() -> None:
    """Run one attempt."""
    arguments = parse()
    job = load_job(arguments.config, [], world_size=int(os.environ["WORLD_SIZE"])).job
    set_determinism(job.train.deterministic)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    loop = Loop(job, arguments.folder, device)
    assert isinstance(loop.model, FSDPModule)
    loop.resume()
    loop.train(arguments.steps, arguments.interval)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
