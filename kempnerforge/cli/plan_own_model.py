"""Print the plan of a model of the user's."""

from __future__ import annotations

from rich.console import Console

from kempnerforge.cli.formatting import size
from kempnerforge.plan.memory import RESERVED_SHARE
from kempnerforge.plan.own_model import OwnModelPlan

WIDTH = 100


def print_plan(plan: OwnModelPlan, file: str, memory_gb: float | None) -> None:
    """Print what each rank holds, the memory that is known, and the checkpoint."""
    geometry, checkpoint = plan.geometry, plan.checkpoint
    console = Console(width=WIDTH, highlight=False)
    mesh = " x ".join(f"{dim} {count}" for dim, count in geometry.mesh.items())
    lines = [f"{file} on {geometry.world_size} processes: {mesh}"]
    lines.append(f"model        {plan.num_parameters:,} parameters in {plan.job.model.name}")
    for rank in plan.pipeline:
        lines.append(
            f"ranks {rank.first_rank}-{rank.last_rank}    {rank.parameters:,} parameters each:"
            f" weights {_gb(rank.weights)}, gradients {_gb(rank.gradients)},"
            f" optimizer {_gb(rank.optimizer)} GB"
        )
    if plan.unknown_optimizer:
        lines.append(f"             the state of the optimizer is not known: {plan.unknown_optimizer}")
    known, written = plan.activation_bytes, checkpoint.written_bytes
    lines += [
        "activations  unknown: the model has no activation_bytes(batch_size, seq_len)"
        if known is None
        else f"activations  {_gb(known)} GB per micro-batch, by the model's activation_bytes()",
        f"checkpoint   {size(checkpoint.size_bytes)} in {checkpoint.num_files} files"
        + (f"; later saves write {size(written)}" if written < checkpoint.size_bytes else ""),
        f"staging      {size(max(rank.staged_bytes for rank in plan.pipeline))} of host memory per rank,"
        f" {size(plan.staged_on_node_bytes)} per node of {plan.ranks_per_node} ranks",
        _verdict(plan, memory_gb),
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _verdict(plan: OwnModelPlan, memory_gb: float | None) -> str:
    need = f"at least {_gb(plan.device_bytes)} GB"
    rest = "" if plan.activation_bytes is not None else ", and activations that are not known"
    if memory_gb is None:
        return f"device       {need}{rest}; give --memory-gb to compare"
    usable = (1 - RESERVED_SHARE) * memory_gb
    if plan.device_bytes > usable * 1e9:
        return f"device       does not fit: {need} of {usable:.2f} GB usable ({memory_gb:g} GB)"
    return f"device       {need} of {usable:.2f} GB usable ({memory_gb:g} GB){rest}"
