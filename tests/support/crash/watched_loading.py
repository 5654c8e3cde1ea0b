"""Load mutated checkpoints as a resume does, and report the result."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.crash.known_states import expected_tensors, make_state, set_step
from support.crash.mutations import Changes, Files, Special
from support.crash.save_driver import Plan, make_manager

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates, load_step
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.tools import verify
from kempnerforge.errors import (
    CheckpointError,
    DamagedCheckpointError,
    MismatchError,
    UnreachableCheckpointError,
)

TIME_LIMIT_S = 20
CGROUPS = "/sys/fs/cgroup/"
"""The check of host memory reads files here before buffers are allocated."""
PARTS = ("model", "optimizer", "scheduler", "data", "rng")


@dataclass
class Opened:
    """The files that were opened while ``looking``, with links resolved."""

    inside: Path
    outside: list[str] = field(default_factory=list)
    thread: int = 0
    """Id of the thread that is looking; 0 for none."""

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Collect the files that this thread opens."""
        self.outside.clear()
        self.thread = threading.get_ident()
        try:
            yield
        finally:
            self.thread = 0

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """The audit hook."""
        if (
            event != "open"
            or self.thread != threading.get_ident()
            or not isinstance(args[0], (str, os.PathLike))
        ):
            return
        path, flags = Path(args[0]), args[2]
        followed = not (isinstance(flags, int) and flags & os.O_NOFOLLOW)
        real = os.path.realpath(path) if followed else os.path.realpath(path.parent) + "/" + path.name
        code = (sys.prefix, sys.base_prefix, str(Path(paths.__file__).parents[2]))
        if not real.startswith((str(self.inside), "/proc/", CGROUPS, *code)):
            self.outside.append(real)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Interrupt a body that hangs, even in a blocking open."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not done after {TIME_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak_memory_mb() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Loader:
    """Mutates one step folder, loads it, and restores it."""

    def __init__(self, run_dir: Path, step: int, ranks: int) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / "checkpoints"
        self.path = self.folder / paths.step_name(step)
        self.step = step
        self.files: Files = {path.name: path.read_bytes() for path in self.path.iterdir()}
        self.expected = expected_tensors(step, ranks)
        self.objects = SafetensorsReader(self.path).objects
        self.state = make_state()
        self.opened = Opened(run_dir.resolve())
        sys.addaudithook(self.opened.audit)

    @contextlib.contextmanager
    def changed(self, changes: Changes) -> Iterator[None]:
        """Apply ``changes`` to the step while the block runs."""
        for name, content in changes.items():
            (self.path / name).unlink(missing_ok=True)
            _put(self.path / name, content)
        try:
            yield
        finally:
            for quarantined in self.folder.glob("quarantined.*"):
                quarantined.rename(self.path)
            for name in changes:
                _remove(self.path / name)
                if name in self.files:
                    (self.path / name).write_bytes(self.files[name])

    def load(self) -> str:
        """Return ``loaded``, ``loaded, other objects``, or the kind of error. Fails if a tensor is wrong."""
        set_step(self.state, 99)
        with time_limit(), self.opened.looking():
            try:
                found = candidates.inspect(self.path, step=self.step)
                context = RunContext(allow_changed_data=True)
                loaded = load_step.load(
                    found, self.state, same_layout=True, rank=0, parts=PARTS, context=context
                )
                reader = SafetensorsReader(self.path, known_manifest=found.manifest)
                if set(reader.index) != set(self.expected):
                    raise MismatchError("other tensors than expected")
                tensors = {name: torch.empty_like(tensor) for name, tensor in self.expected.items()}
                load_tensors(tensors, reader)
                objects = reader.objects
                reader.close()
            except (DamagedCheckpointError, MismatchError, UnreachableCheckpointError) as error:
                return type(error).__name__
        assert loaded.rng is not None
        for name, tensor in {**self.state.tensors(), "rng.rank_00000": loaded.rng}.items():
            assert torch.equal(tensor, self.expected[name]), f"{name} was loaded silently wrong"
        for name, tensor in tensors.items():
            assert torch.equal(tensor, self.expected[name]), f"{name} was loaded silently wrong"
        return "loaded" if objects == self.objects else "loaded, other objects"

    def verify(self) -> str:
        """Return the result of ``kempnerforge ckpt verify``: ``sound``, ``damaged``, or the kind of error."""
        with time_limit(), self.opened.looking():
            try:
                return "sound" if verify.verify(self.path, threads=1).sound else "damaged"
            except CheckpointError as error:
                return type(error).__name__

    def resume(self, older: int) -> str:
        """Return what the start of a run does with it: ``loaded``, ``older``, or the kind of error."""
        state = make_state()
        manager = make_manager(Plan(str(self.run_dir), keep_last_n=2, attempt=2), state)
        with time_limit(), self.opened.looking():
            try:
                receipt = manager.resume(state)
            except (CheckpointError, MismatchError) as error:
                return type(error).__name__
            finally:
                manager.close()
                (self.run_dir / "receipts.jsonl").unlink(missing_ok=True)
        for name, tensor in state.tensors().items():
            expected = (
                expected_tensors(receipt.step, 1)[name] if receipt.step == older else self.expected[name]
            )
            assert torch.equal(tensor, expected), f"{name} was resumed silently wrong"
        if receipt.step == older:
            (rejected,) = receipt.rejected
            assert rejected.step == self.step
            # Weights alone and another run's step are intact, so they are not moved.
            assert rejected.outcome in ("damaged", "no training state", "another run's")
            assert bool(rejected.moved_to) is (rejected.outcome == "damaged")
            return "older"
        assert receipt.step == self.step
        return "loaded"


def _put(path: Path, content: bytes | Special | None) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None and content.kind == "link":
        path.symlink_to(content.target)
    elif content is not None and content.kind == "folder":
        path.mkdir()
    elif content is not None and content.kind == "fifo":
        os.mkfifo(path)
    elif content is not None:
        with path.open("wb") as file:
            file.truncate(content.size_bytes)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
