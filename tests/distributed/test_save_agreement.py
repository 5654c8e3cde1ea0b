"""What ranks agree on before a save, what fails on one rank afterwards, and whose leaves are stored."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.polling import wait_until
from support.ranks import run_ranks
from support.state_trees import same
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.save import plan
from kempnerforge.checkpoint.save.host_buffers import HostBuffers
from kempnerforge.checkpoint.save.pipeline import RetryPolicy
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import SaveFailedError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

MODES = ("disabled", "async", "async_with_pinned_mem")
QUICK = RetryPolicy(write_tries=2, first_pause_s=0.01, save_timeout_s=60)


def saved(path: Path) -> dict[str, Any]:
    return _load_state_dict_from_keys(storage_reader=SafetensorsReader(path))


def outcome(call: Callable[[], object]) -> str:
    """What ``call`` raises, as text; empty when nothing."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the test compares it
        return f"{type(error).__name__}: {error}"
    return ""


def save_own_leaves(folder: str) -> list[str]:
    rank, messages = dist.get_rank(), []
    with AsyncCheckpointer("async", patience=QUICK) as checkpointer:
        for number in range(3):
            state = {
                "model": {"w": torch.ones(2) * number},
                "shared": ("of rank", rank, torch.full((2,), float(rank))),
                "loader": {f"dp_rank_{rank}": {"position": 10 * rank + number, "empty": {}}},
                f"own{rank}": np.full(2000, rank + number),
                "only_on": [torch.ones(1), {"rank": 1}] if rank == 1 else [torch.ones(1)],
            }
            checkpointer.save(state, f"{folder}/c{number}")
        checkpointer.wait()
        clash = {"x": torch.ones(2) if rank else 3}
        messages.append(outcome(partial(checkpointer.save, clash, f"{folder}/clash")))
    return messages


@pytest.mark.smoke
def test_save_leaves_of_higher_ranks_are_stored(tmp_path: Path) -> None:
    messages = run_ranks(save_own_leaves, 2, str(tmp_path))
    assert messages == [["ValueError: x is a tensor on rank 1 and none on rank 0"]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "c2"]
    for number in range(3):
        found = saved(tmp_path / f"c{number}")
        assert found["loader"] == {
            "dp_rank_0": {"position": number, "empty": {}},
            "dp_rank_1": {"position": 10 + number, "empty": {}},
        }
        assert same(found["shared"], ("of rank", 0, torch.zeros(2)))
        assert same(found["own0"], np.full(2000, number))
        assert same(found["own1"], np.full(2000, 1 + number))
        assert same(found["only_on"], [torch.ones(1), {"rank": 1}])
        assert same(found["model"], {"w": torch.ones(2) * number})


def save_what_differs(folder: str) -> list[str]:
    rank = dist.get_rank()
    checkpointer = AsyncCheckpointer("disabled", patience=QUICK)

    def payload(same_on_all: dict[str, str]) -> Payload:
        return Payload({"w": torch.ones(2)}, {"step": 1}, same_on_all)

    digests = [
        {"extra.scheduler": "a", "extra.loader": f"r{rank}"},
        {"optimizer": f"r{rank % 2}", "extra.ema": "b"} if rank != 2 else {"optimizer": "r0"},
        {"extra.scheduler": "a"},
    ]
    messages = [
        outcome(partial(checkpointer.save, partial(payload, one), f"{folder}/c{number}"))
        for number, one in enumerate(digests)
    ]
    messages.append(outcome(partial(checkpointer.prepare, partial(payload, digests[0]))))

    def fail() -> Payload:
        if rank == 1:
            raise LookupError("no state")
        return payload({})

    messages.append(outcome(partial(checkpointer.save, fail, f"{folder}/failed")))
    checkpointer.close()
    return messages


def test_save_values_that_differ_are_named_on_all_ranks(tmp_path: Path) -> None:
    loader = "ValueError: extra.loader differs between ranks 0 and 1: name it in per_rank="
    expected = [
        loader,
        "ValueError: extra.ema is on rank 0 and not on rank 2; "
        "optimizer differs between ranks 0 and 1: where a rank has a part of the model, give groups=, "
        "the same on all ranks",
        "",
        loader,
        "SaveFailedError: rank 1: LookupError: no state",
    ]
    assert run_ranks(save_what_differs, 3, str(tmp_path)) == [expected] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["c2"]


class Failing(HostBuffers):
    """One rank's memory is full."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.close()
        raise OSError(12, "Cannot allocate memory")


def buffers_fail(folder: str, failing: int) -> list[str]:
    messages = []
    for mode in MODES:
        with AsyncCheckpointer(mode, patience=QUICK) as checkpointer, pytest.MonkeyPatch.context() as patch:
            state = {"w": torch.ones(3), f"own{dist.get_rank()}": torch.ones(2)}
            path = f"{folder}/{mode}"
            if dist.get_rank() == failing:
                patch.setattr(plan, "HostBuffers", Failing)
            messages.append(outcome(partial(checkpointer.save, state, path)))
            messages.append(str(checkpointer.host_bytes))
            patch.undo()
            messages.append(outcome(partial(checkpointer.save, state, path)))
    return messages


@pytest.mark.parametrize("failing", [0, 1])
def test_save_host_buffers_fail_on_one_rank_all_raise(failing: int, tmp_path: Path) -> None:
    text = (
        f"SaveFailedError: rank {failing}: cannot make its host buffers: "
        "OSError: [Errno 12] Cannot allocate memory"
    )
    messages = run_ranks(buffers_fail, 2, str(tmp_path), failing)
    assert messages == [[text, "0", ""] * 3] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(MODES)


def no_pairs(*_: object) -> None:
    raise ValueError("w has changed")


def no_thread(self: threading.Thread) -> None:
    if self.name.startswith("checkpoint"):
        raise RuntimeError("can't start new thread")
    _start(self)


_start = threading.Thread.start
BREAKS: dict[str, tuple[type, str, Callable[..., None]]] = {
    "pairs": (HostBuffers, "pairs", no_pairs),
    "thread": (threading.Thread, "start", no_thread),
}


def save_and_wait(checkpointer: AsyncCheckpointer, state: dict[str, Any], path: str) -> None:
    checkpointer.save(state, path)
    checkpointer.wait()


def fail_after_agreement(folder: str, failing: int) -> list[str]:
    """The same path is used again by the save after."""
    rank, messages = dist.get_rank() if dist.is_initialized() else 0, []
    for mode in MODES:
        with AsyncCheckpointer(mode, patience=QUICK) as checkpointer:
            state = {"w": torch.ones(3), f"own{rank}": torch.ones(2)}
            for name, patched in BREAKS.items():
                path = f"{folder}/{mode}-{name}"
                with pytest.MonkeyPatch.context() as patch:
                    if rank == failing:
                        patch.setattr(*patched)
                    messages.append(outcome(partial(save_and_wait, checkpointer, state, path)))
                checkpointer.save(state, path)
                checkpointer.wait()
    return messages


@pytest.mark.parametrize("failing", [0, 1])
def test_save_failure_after_agreement_reaches_all_ranks(failing: int, tmp_path: Path) -> None:
    messages = run_ranks(fail_after_agreement, 2, str(tmp_path), failing)
    assert messages[0] == messages[1]
    for pairs, thread in zip(messages[0][::2], messages[0][1::2], strict=True):
        assert f"rank {failing}: copying to host memory failed: ValueError: w has changed" in pairs
        assert f"rank {failing}: cannot start a thread: can't start new thread" in thread
    assert len(list(tmp_path.iterdir())) == 6
    for path in tmp_path.iterdir():
        loaded = {"w": torch.zeros(3), "own0": torch.zeros(2), "own1": torch.zeros(2)}
        load_tensors(loaded, SafetensorsReader(path))
        assert all(tensor.all() for tensor in loaded.values())


def test_save_failure_after_agreement_of_one_process(tmp_path: Path) -> None:
    messages = fail_after_agreement(str(tmp_path), 0)
    assert len(messages) == 6
    assert all("was not saved: rank 0: c" in message for message in messages)
    assert len(list(tmp_path.iterdir())) == 6


def fail_beside_slow_writer(folder: str) -> str:
    """Rank 1 fails; rank 2 writes when rank 0 knows that, and, if it can, when the next save has begun."""
    rank, known = dist.get_rank(), Path(folder) / "known"
    order: list[str] = []
    checkpointer = AsyncCheckpointer("async", patience=QUICK)
    state = {f"own{rank}": torch.full((2,), float(rank))}
    write = Writer.write

    def slow(self: Writer, buffer_fd: int, path: Path, *args: Any, **kwargs: Any) -> Any:
        if rank == 1:
            raise OSError(5, "Input/output error")
        if rank == 2:
            wait_until(known.exists, "rank 0 to know that the save has failed", timeout_s=20)
            order[:] = ["known before the write"]
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and not list(Path(folder).glob(".c*")):
                time.sleep(0.01)
        return write(self, buffer_fd, path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write", slow)
        checkpointer.save(state, f"{folder}/c")
        message = outcome(checkpointer.wait)
        if rank == 0:
            known.touch()
            _ = outcome(checkpointer.wait)
    # At once, to the same path; what rank 2 still writes is no part of it.
    checkpointer.save(state if rank < 2 else {}, f"{folder}/c")
    checkpointer.wait()
    checkpointer.close()
    return "; ".join([message, *order])


def test_save_failure_does_not_wait_for_slow_ranks(tmp_path: Path) -> None:
    messages = run_ranks(fail_beside_slow_writer, 3, str(tmp_path))
    message = "SaveFailedError: c was not saved: rank 1: [Errno 5] Input/output error"
    assert messages == [message, message, f"{message}; known before the write"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "known"]
    loaded = {f"own{rank}": torch.zeros(2) for rank in range(2)}
    load_tensors(loaded, SafetensorsReader(tmp_path / "c"))
    assert [float(tensor[0]) for tensor in loaded.values()] == [0.0, 1.0]
    names = sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    assert names == [f"shard_0000{rank}_of_00002.safetensors" for rank in range(2)]


def save_on_a_group_of_gpus(folder: str) -> bool:
    """gloo that serves CUDA alone stands for NCCL: neither reduces what is on the host."""
    group = dist.new_group([0, 2], backend="cuda:gloo")
    rank = dist.get_rank()
    if rank != 1:
        assert isinstance(group, dist.ProcessGroup)
        with AsyncCheckpointer("async", patience=QUICK) as checkpointer:
            checkpointer.save({f"own{rank}": torch.ones(2)}, f"{folder}/c", process_group=group)
            with pytest.raises(ValueError, match="process_group must be the same at every save"):
                checkpointer.save({}, f"{folder}/d")
        with pytest.raises(ValueError, match="the control group must serve the CPU"):
            ControlGroup(group)
    dist.barrier()
    return set(saved(Path(folder) / "c")) == {"own0", "own2"}


def test_save_on_a_group_of_gpus_agrees_over_gloo(tmp_path: Path) -> None:
    assert run_ranks(save_on_a_group_of_gpus, 3, str(tmp_path)) == [True] * 3


def test_save_error_names_rank_of_payload(tmp_path: Path) -> None:
    checkpointer = AsyncCheckpointer("async")
    with pytest.raises(SaveFailedError, match="rank 0: KeyError: 'gone'") as caught:
        checkpointer.begin_save(lambda: {}["gone"], tmp_path / "c")
    assert isinstance(caught.value.__cause__, KeyError)
    assert list(tmp_path.iterdir()) == []
    checkpointer.close()
