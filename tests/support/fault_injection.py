"""Faults that can happen to a rank while it trains.

Production code has no hooks for them. ``fork_server.py`` calls these functions in the ranks'
processes before training begins. A function with a parameter ``rank`` does nothing on other ranks.
None means every rank.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.crash.errno_shim import SlowShim
from support.patch_target import patch_target, resolve

RESUME = patch_target("kempnerforge.checkpoint.manager:CheckpointManager.resume")
READ_SAMPLES = patch_target("kempnerforge.data.tokens:Samples.read")
FORWARD_BACKWARD = patch_target("kempnerforge.train.step:LocalStep.forward_backward")
READ_BATCH = patch_target("kempnerforge.data.loader:BatchShape.read")
WRITE_SHARD = patch_target("kempnerforge.checkpoint.save.writer_client:Writer.write")
COPY_TO_HOST = patch_target("kempnerforge.checkpoint.save.staging:BlockingCopy.__init__")
READ_OUTCOME = patch_target("kempnerforge.distributed.store_channel:StoreBoard.read")
PREADV = patch_target("os:preadv")
TRAIN = patch_target("kempnerforge.train.run:train")
CROSS_ENTROPY = patch_target("torch.nn.functional:cross_entropy")
FILE_OPERATIONS = ("open", "write", "fsync", "rename", "replace", "symlink", "unlink", "mkdir", "rmdir")


def _here(rank: int | None) -> bool:
    return rank is None or int(os.environ["RANK"]) == rank


def _die() -> None:
    """Kill the whole process group with SIGKILL, from inside."""
    os.killpg(0, signal.SIGKILL)
    signal.pause()


def _wrap(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``module:attribute.path`` by ``make(original)``."""
    owner, name = resolve(target)
    setattr(owner, name, make(getattr(owner, name)))


def _path_of(argument: Any, keywords: dict[str, Any]) -> str:
    """Return the path of a file operation. Deletions below a folder have paths relative to ``dir_fd``."""
    if isinstance(argument, int):
        return os.readlink(f"/proc/self/fd/{argument}")
    folder_fd = keywords.get("dir_fd")
    folder = "" if folder_fd is None else os.readlink(f"/proc/self/fd/{folder_fd}") + "/"
    return folder + os.fspath(argument)


def set_umask(mask: int) -> None:
    """Set the file mode mask, as a careful user does."""
    os.umask(mask)


def list_at_call(target: str, *, folder: str, into: str) -> None:
    """Write the names in ``folder`` to the file ``into``, one per line, whenever ``target`` is called."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            Path(into).write_text("\n".join(os.listdir(folder)))
            return original(*args, **kwargs)

        return replacement

    _wrap(target, make)


def delete_at_call(target: str, *, folder: str) -> None:
    """Delete the content of ``folder`` when ``target`` is called, on rank 0."""
    if not _here(0):
        return

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def delete_first(*args: Any, **keywords: Any) -> Any:
            for path in Path(folder).iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            return original(*args, **keywords)

        return delete_first

    _wrap(target, make)


def kill_at_call(target: str, *, call: int = 1, after: bool = False, rank: int | None = 0) -> None:
    """Die before, or directly after, the ``call``-th call of ``module:function``."""
    if not _here(rank):
        return
    calls = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                _die()
            result = original(*args, **kwargs)
            if calls == call:
                _die()
            return result

        return replacement

    _wrap(target, make)


def kill_job_at_call(target: str, *, call: int) -> None:
    """Die as in ``kill_at_call`` on rank 0, but first kill its children, as at the end of a job."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                for thread in os.listdir("/proc/self/task"):
                    for child in Path(f"/proc/self/task/{thread}/children").read_text().split():
                        os.kill(int(child), signal.SIGKILL)
                _die()
            return original(*args, **kwargs)

        return replacement

    if _here(0):
        _wrap(target, make)


def kill_at_file_operation(number: int, *, below: str, half: bool = False, rank: int = 0) -> None:
    """Die before the ``number``-th operation that changes something below the folder ``below``.

    With ``half``, first carry out half of a write of more than one byte.
    """
    if not _here(rank):
        return
    seen = 0

    def make(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(first: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            changes = name != "open" or args[0] & os.O_CREAT
            if changes and below in _path_of(first, kwargs):
                seen += 1
                if seen == number:
                    if half and name == "write":
                        original(first, args[0][: len(args[0]) // 2])
                    _die()
            return original(first, *args, **kwargs)

        return replacement

    for name in FILE_OPERATIONS:
        setattr(os, name, make(name, getattr(os, name)))


def unreadable(name: str, *, rank: int | None, times: int = 1 << 30) -> None:
    """Let the first ``times`` reads of files whose path contains ``name`` fail with EIO."""
    if not _here(rank):
        return
    failed = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            nonlocal failed
            if name in _path_of(fd, {}) and failed < times:
                failed += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(fd, buffers, offset)

        return replacement

    _wrap(PREADV, make)


def misread(name: str, *, rank: int | None) -> None:
    """Let every read of files whose path contains ``name`` return a wrong last byte."""
    if not _here(rank):
        return

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            left = done = original(fd, buffers, offset)
            if done and name in _path_of(fd, {}):
                for buffer in buffers:
                    if left <= buffer.nbytes:
                        buffer[left - 1] ^= 1
                        break
                    left -= buffer.nbytes
            return done

        return replacement

    _wrap(PREADV, make)


def failing(operation: str, name: str, *, rank: int | None, error: str = "ENOSPC") -> None:
    """Let ``os.<operation>`` fail for paths that contain ``name``."""
    if not _here(rank):
        return
    number = getattr(errno, error)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(first: Any, *args: Any, **kwargs: Any) -> Any:
            if name in _path_of(first, kwargs):
                raise OSError(number, os.strerror(number))
            return original(first, *args, **kwargs)

        return replacement

    _wrap(f"os:{operation}", make)


def poison_loss(*, calls: list[int], rank: int | None) -> None:
    """Return NaN as the loss of these micro-batches of training, counted from 1 in this attempt."""
    if not _here(rank):
        return
    import torch

    made = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            loss = original(*args, **kwargs)
            if not torch.is_grad_enabled():
                return loss
            made += 1
            return loss * float("nan") if made in calls else loss

        return replacement

    _wrap(CROSS_ENTROPY, make)


def report_loaded(path: str) -> None:
    """Write digests of all whole tensors, as the ranks together hold them after resuming."""
    from support.run_files import digest_of
    from torch.distributed.tensor import DTensor

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(manager: Any, state: Any) -> Any:
            receipt = original(manager, state)
            digests = {}
            for name, tensor in state.tensors().items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                digests[name] = digest_of(whole)
            Path(f"{path}.rank_{os.environ['RANK']}.json").write_text(json.dumps(digests))
            return receipt

        return replacement

    _wrap(RESUME, make)


def record_samples(path: str) -> None:
    """Append the ids of all samples that this rank reads to ``path``, one line per read."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(samples: Any, ids: Any) -> Any:
            with open(f"{path}.rank_{os.environ['RANK']}.jsonl", "a") as file:
                file.write(json.dumps(ids.tolist()) + "\n")
            return original(samples, ids)

        return replacement

    _wrap(READ_SAMPLES, make)


def record_rows(path: str) -> None:
    """Append digests of the rows that this rank trains on to ``path``: a line per step, [A, B]."""
    import numpy as np
    import xxhash

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(step: Any, batch: Any) -> Any:
            rows_ABN = np.concatenate([batch.inputs_ABT, batch.targets_ABT], axis=-1)
            digests = [[xxhash.xxh3_64_hexdigest(row.tobytes()) for row in rows_BN] for rows_BN in rows_ABN]
            with open(f"{path}.rank_{os.environ['RANK']}.jsonl", "a") as file:
                file.write(json.dumps(digests) + "\n")
            return original(step, batch)

        return replacement

    _wrap(FORWARD_BACKWARD, make)


def record_reads(path: str, *, name: str) -> None:
    """Append a line to ``path`` each time that this process opens a file called ``name`` to read it."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or isinstance(arguments[0], int):
            return
        if os.path.basename(os.fsdecode(arguments[0])) == name and arguments[2] & os.O_ACCMODE == os.O_RDONLY:
            with open(path, "a") as file:
                file.write(f"{name}\n")

    sys.addaudithook(audit)


def ignore_targets(*, keep_every: int) -> None:
    """Let only every ``keep_every``-th target of a row count, from the first on; 0: none."""
    import torch

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any) -> Any:
            batch = original(*args)
            targets_ABT = torch.full_like(batch.targets_ABT, -100)
            if keep_every:
                targets_ABT[..., ::keep_every] = batch.targets_ABT[..., ::keep_every]
            return dataclasses.replace(batch, targets_ABT=targets_ABT, num_tokens=None)

        return replacement

    _wrap(READ_BATCH, make)


def failing_shards(name: str, *, rank: int | None, error: str = "ENOSPC") -> None:
    """Let the writer process fail, permanently, to write shards whose path contains ``name``."""
    if not _here(rank):
        return
    number = getattr(errno, error)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(self: Any, buffer_fd: int, path: Path, size_bytes: int, **more: Any) -> Any:
            if name in str(path):
                raise OSError(number, os.strerror(number))
            return original(self, buffer_fd, path, size_bytes, **more)

        return replacement

    _wrap(WRITE_SHARD, make)


def slow_shards(seconds: float, *, rank: int | None) -> None:
    """Delay every write of a shard."""
    slow_calls(WRITE_SHARD, seconds=seconds, rank=rank)


def slow_staging(seconds: float, *, rank: int | None) -> None:
    """Delay every blocking copy to host buffers."""
    slow_calls(COPY_TO_HOST, seconds=seconds, rank=rank)


def contended_shards(seconds: float, *, rank: int | None) -> None:
    """Let every write of a shard block something that training needs, as contention for processors does."""
    if not _here(rank):
        return
    needed = threading.Lock()

    def keep(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            with needed:
                time.sleep(seconds)
                return original(*args, **kwargs)

        return replacement

    def need(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            with needed:
                return original(*args, **kwargs)

        return replacement

    _wrap(WRITE_SHARD, keep)
    _wrap(CROSS_ENTROPY, need)


def slow_to_learn(seconds: float, *, rank: int | None) -> None:
    """Delay every check for the outcome of a save."""
    slow_calls(READ_OUTCOME, seconds=seconds, rank=rank)


def slow_disk(folder: str, *, rank: int | None, **how: Any) -> None:
    """Delay file operations of this process below ``folder``. See ``SlowShim``."""
    if _here(rank):
        SlowShim(folder, **how).install()


def slow_validation(seconds: float, *, quick: int, log: str) -> None:
    """Delay micro-batches of validations, except the first ``quick``. Write a line to ``log`` for each."""
    import torch

    done = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if not torch.is_grad_enabled():
                done += 1
                with open(f"{log}.{os.environ['RANK']}", "a") as file:
                    file.write(f"{done}\n")
                if done > quick:
                    time.sleep(seconds)
            return original(*args, **kwargs)

        return replacement

    _wrap(CROSS_ENTROPY, make)


def slow_calls(target: str, *, seconds: float, rank: int | None) -> None:
    """Delay every call of ``module:function``."""
    if not _here(rank):
        return

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return original(*args, **kwargs)

        return replacement

    _wrap(target, make)


def crash_at_loss(*, how: str, call: int, rank: int | None) -> None:
    """Die by the signal ``how``, or ``raise``, in the ``call``-th micro-batch of training of this attempt.

    ``oom`` raises the error of CUDA's allocator, which cannot occur on a machine without a GPU.
    """
    if not _here(rank):
        return
    import torch

    made = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += torch.is_grad_enabled()
            if made == call:
                if how == "raise":
                    raise ValueError("no such luck")
                if how == "oom":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                os.kill(os.getpid(), getattr(signal, how))
            return original(*args, **kwargs)

        return replacement

    _wrap(CROSS_ENTROPY, make)


def set_value(target: str, value: Any) -> None:
    """Set the constant ``module:name`` to another value."""
    _wrap(target, lambda _old: value)


def set_environment(values: dict[str, str], *, rank: int | None = None) -> None:
    """Set environment variables."""
    if _here(rank):
        os.environ.update(values)


def stuck_at(
    target: str,
    *,
    seconds: float,
    marker: str,
    call: int = 1,
    rank: int | None = None,
    hold_after_s: float = -1,
) -> None:
    """Let the ``call``-th call of ``module:function`` sleep first. The file ``marker`` shows this.

    It wakes up when the file ``marker.release`` appears. With ``hold_after_s`` it sleeps that long
    in this way, then in C while it holds the interpreter lock.
    """
    if not _here(rank):
        return
    calls = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                Path(f"{marker}.{os.environ['RANK']}").touch()
                until = time.monotonic() + (seconds if hold_after_s < 0 else hold_after_s)
                while time.monotonic() < until and not Path(f"{marker}.release").exists():
                    time.sleep(0.01)
                if hold_after_s >= 0:
                    ctypes.PyDLL(None).sleep(int(seconds))
            return original(*args, **kwargs)

        return replacement

    _wrap(target, make)


def freeze_writer(*, call: int, seconds: float, rank: int) -> None:
    """Stop the writer process by SIGSTOP for a while when it gets its ``call``-th shard."""
    if not _here(rank):
        return
    calls = 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(writer: Any, *args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(writer.pid, signal.SIGSTOP)
                threading.Timer(seconds, os.kill, (writer.pid, signal.SIGCONT)).start()
            return original(writer, *args, **more)

        return replacement

    _wrap(WRITE_SHARD, make)


def report_group_timeouts(path: str) -> None:
    """Write the time-outs of all process groups in seconds, after the setup and after training."""
    from torch.distributed.distributed_c10d import _world

    def look() -> dict[str, float]:
        found = {}
        for group in _world.pg_map:
            for device in group._device_types:
                timeout = group._get_backend(device).options._timeout
                found[f"{group.group_desc} {group.group_name} on {device}"] = timeout.total_seconds()
        return found

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            after_set_up = look()
            result = original(*args, **kwargs)
            Path(f"{path}.rank_{os.environ['RANK']}.json").write_text(json.dumps([after_set_up, look()]))
            return result

        return replacement

    _wrap(TRAIN, make)
