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
    """``--size`` chooses among ``sizes`` ("cpu" if it is not given); what it sets can be set one by one."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--size", choices=list(sizes), default="cpu", help="cpu: minutes on 2 cores (%(default)s)"
    )
    made.add_argument("--dir", type=Path, default=None, help="where to write; a temporary folder here")
    made.add_argument("--json", type=Path, default=None, help="also write all that was measured to this file")
    made.add_argument("--pairs", type=int, default=None, help=f"measurements of each arm ({PAIRS})")
    for name in sizes["cpu"]:
        values = ", ".join(f"{size} {given[name]}" for size, given in sizes.items())
        made.add_argument(
            f"--{name.replace('_', '-')}", type=type(sizes["cpu"][name]), default=None, help=values
        )
    return made


def parse(doc: str | None, sizes: Mapping[str, Mapping[str, Any]]) -> argparse.Namespace:
    """The command line, with what ``--size`` says filled in. A size may have ``pairs`` of its own."""
    given = parser(
        doc, {size: {k: v for k, v in values.items() if k != "pairs"} for size, values in sizes.items()}
    )
    found = given.parse_args()
    for name, value in {"pairs": PAIRS, **sizes[found.size]}.items():
        if getattr(found, name) is None:
            setattr(found, name, value)
    return found


def start_ranks() -> torch.device:
    """Join the ranks that torchrun started; the device of this one."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


@contextmanager
def shared_folder(above: Path | None) -> Iterator[Path]:
    """A new folder that all ranks know, gone afterwards."""
    box = [tempfile.mkdtemp(dir=above or Path.cwd(), prefix="bench-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    try:
        yield Path(box[0])
        dist.barrier()
    finally:  # without a barrier: after an error on one rank the others would wait in vain
        if dist.get_rank() == 0:
            shutil.rmtree(box[0])


def empty(folder: Path) -> None:
    """Delete what is in ``folder``. All ranks, the first one deletes."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    dist.barrier()
