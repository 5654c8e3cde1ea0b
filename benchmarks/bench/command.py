"""The command line of a benchmark, its ranks and its folder."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PAIRS = 15


def parser(doc: str | None, sizes: Mapping[str, Mapping[str, Any]]) -> argparse.ArgumentParser:
    """Return a parser with ``--size``, one of ``sizes`` ("cpu" by default), and an option per setting."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--size", choices=list(sizes), default="cpu", help="cpu: minutes on 2 cores (%(default)s)"
    )
    made.add_argument("--dir", type=Path, default=None, help="where to write (a temporary folder here)")
    made.add_argument("--json", type=Path, default=None, help="also write all measurements to this file")
    made.add_argument("--pairs", type=int, default=None, help=f"measurements of each arm ({PAIRS})")
    for name in sizes["cpu"]:
        values = ", ".join(f"{size} {given[name]}" for size, given in sizes.items())
        made.add_argument(
            f"--{name.replace('_', '-')}", type=type(sizes["cpu"][name]), default=None, help=values
        )
    return made


def parse(doc: str | None, sizes: Mapping[str, Mapping[str, Any]]) -> argparse.Namespace:
    """Parse the command line and fill in the settings of ``--size``. A size may have its own ``pairs``."""
    options = parser(
        doc, {size: {k: v for k, v in values.items() if k != "pairs"} for size, values in sizes.items()}
    )
    arguments = options.parse_args()
    for name, value in {"pairs": PAIRS, **sizes[arguments.size]}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def start_ranks() -> torch.device:
    """Join the ranks that torchrun started. Return the device of this rank."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


@contextmanager
def shared_folder(above: Path | None) -> Iterator[Path]:
    """Make a new folder that all ranks use, and remove it afterwards."""
    box = [tempfile.mkdtemp(dir=above or Path.cwd(), prefix="bench-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    try:
        yield Path(box[0])
        dist.barrier()
    finally:  # no barrier here: after an error on one rank, the others would wait for it forever
        if dist.get_rank() == 0:
            shutil.rmtree(box[0])


def empty(folder: Path) -> None:
    """Delete the content of ``folder`` on rank 0. Collective: all ranks."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    dist.barrier()
