"""Workers of a user's dataset: the same batches, errors that name them, and none that is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kempnerforge.data.loader import AnyBatch, BatchLoader, Cursor, FieldsBatch
from kempnerforge.data.map_dataset import MapSamples, UserDataset
from kempnerforge.errors import KempnerForgeError, PluginError
from kempnerforge.rank_variables import FORWARDED

SOURCE = """
import multiprocessing
import os
import time
from multiprocessing.shared_memory import SharedMemory

import numpy as np

def sleep(_):
    open(f"child.{os.getpid()}", "w").close()
    time.sleep(1000)

def leave():
    sockets = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    sockets = [int(fd) for fd in sockets if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")]
    copies = [os.dup(fd) for fd in sockets]
    if os.fork() == 0:
        os.setsid()
        sleep(0)
    for fd in copies:
        os.close(fd)

class Numbers:
    def __init__(self, count, bad=None, slow=None, dies=None, kind="tokens", children="none"):
        self.count, self.bad, self.slow, self.dies, self.kind = count, bad, slow, dies, kind
        self.children = children
    def __len__(self):
        return self.count
    def start_children(self):
        if self.children == "shared memory":
            self.memory = SharedMemory(create=True, size=8)
            open(f"memory.{self.memory.name}", "w").close()
        elif self.children == "outside":
            leave()
        elif self.children != "none":
            self.pool = multiprocessing.get_context(self.children).Pool(2)
            self.result = self.pool.map_async(sleep, range(2), chunksize=1)
            while len([name for name in os.listdir() if name.startswith("child.")]) < 2:
                time.sleep(0.02)
        self.children = "none"
    def __getitem__(self, i):
        self.start_children()
        if i == self.bad:
            raise ValueError("no such number")
        if self.dies is not None and os.path.exists(self.dies):
            os.kill(os.getpid(), 9)
        if self.slow is not None:
            open(f"{self.slow}.{os.getpid()}", "w").close()
            time.sleep(1000)
        if self.kind == "tokens":
            return np.arange(i, i + 9)
        return {"x": np.full((2, 3), i, np.float32), "worker": os.getpid()}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pool_numbers.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "pool_numbers", raising=False)
    return tmp_path


def make_loader(workers: int, *, cursor: int = 0, prefetch: int = 2, **args: object) -> BatchLoader:
    dataset = UserDataset("pool_numbers:Numbers", {"count": 40, **args}, key="data.dataset")
    has_tokens = args.get("kind", "tokens") == "tokens"
    samples = MapSamples(dataset, 40, has_tokens, seq_len=8, vocab_size=None)
    return BatchLoader(
        samples,
        seed=3,
        global_batch_size=8,
        batch_size=2,
        dp_rank=1,
        dp_size=2,
        cursor=Cursor(cursor),
        prefetch_batches=prefetch,
        num_workers=workers,
    )


def take(loader: BatchLoader, count: int) -> list[tuple[AnyBatch, Cursor]]:
    with loader:
        return [next(loader) for _ in range(count)]


def values(batch: AnyBatch) -> list[object]:
    if isinstance(batch, FieldsBatch):
        return [batch.digest, *(fields["x"].tolist() for fields in batch.micro_batches)]
    return [batch.digest, batch.inputs_ABT.tolist(), batch.targets_ABT.tolist()]


def await_files(pattern: str, count: int) -> list[int]:
    """Wait for ``count`` files, and return the pids that end their names."""
    while len(found := list(Path().glob(pattern))) < count:
        time.sleep(0.02)
    return [int(path.suffix[1:]) for path in found]


def await_end(pids: list[int]) -> None:
    while any(map(is_alive, pids)):
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["tokens", "dict"])
def test_workers_any_number_same_batches(kind: str) -> None:
    whole = take(make_loader(0, kind=kind), 9)
    random_state = torch.get_rng_state()
    for workers, prefetch in ((1, 0), (3, 2)):
        first = take(make_loader(workers, prefetch=prefetch, kind=kind), 4)
        rest = take(make_loader(4 - workers, cursor=first[-1][1].samples, kind=kind), 5)
        assert [cursor for _, cursor in [*first, *rest]] == [cursor for _, cursor in whole]
        assert [values(batch) for batch, _ in [*first, *rest]] == [values(batch) for batch, _ in whole]
        if kind == "dict":
            pids = {int(batch.micro_batches[0]["worker"][0]) for batch, _ in first}  # type: ignore[union-attr]
            assert len(pids) == workers
            assert os.getpid() not in pids
    assert torch.equal(random_state, torch.get_rng_state())


def test_workers_error_raised_at_its_batch() -> None:
    with make_loader(0) as plain:
        bad = int(next(plain)[0].inputs_ABT[1, 0, 0])  # type: ignore[union-attr]
    with (
        make_loader(2, bad=bad) as loader,
        pytest.raises(
            PluginError, match=f'data.dataset "pool_numbers:Numbers": sample {bad} raised ValueError'
        ),
    ):
        next(loader)


def test_workers_killed_worker_is_named(here: Path) -> None:
    with make_loader(2, dies=str(here / "now")) as loader:
        next(loader)
        (here / "now").touch()
        with pytest.raises(PluginError, match="was killed by SIGKILL; is the node out of memory"):
            list(loader)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_workers_close_kills_slow_ones(prefetch: int) -> None:
    loader = make_loader(2, prefetch=prefetch, slow="slow")
    if prefetch == 0:
        loader._source._pool.request(np.arange(8))  # type: ignore[union-attr]
    pids = await_files("slow.*", 2 if prefetch else 1)
    for pid in pids:
        for number in FORWARDED:
            os.kill(pid, number)
    time.sleep(0.1)
    assert all(map(is_alive, pids)), "signals that stop a rank end no worker"
    loader.close()
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_close_kills_their_children(method: str) -> None:
    loader = make_loader(1, children=method, slow="slow")
    [worker] = await_files("slow.*", 1)
    children = await_files("child.*", 2)
    loader.close()
    assert not is_alive(worker)
    await_end(children)


def test_workers_close_ends_beside_an_escaped_child() -> None:
    """It is in another session, and holds the socket of its worker open."""
    loader = make_loader(1, children="outside", slow="slow")
    await_files("slow.*", 1)
    [child] = await_files("child.*", 1)
    loader.close()
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


def test_workers_close_removes_shared_memory() -> None:
    loader = make_loader(1, children="shared memory", slow="slow")
    await_files("slow.*", 1)
    [memory] = [Path("/dev/shm", path.suffix[1:]) for path in Path().glob("memory.*")]
    assert memory.exists()
    loader.close()
    while memory.exists():
        time.sleep(0.02)


def test_workers_killed_worker_with_child_is_named() -> None:
    """The child outlives the worker, but does not hold its socket open."""
    with make_loader(1, children="fork", dies="pool_numbers.py") as loader:
        with pytest.raises(PluginError, match="was killed by SIGKILL; is the node out of memory"):
            next(loader)
        children = await_files("child.*", 2)
    await_end(children)


def test_workers_no_process_free_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(KempnerForgeError, match="cannot start a process that reads data"):
        make_loader(1)


@pytest.mark.parametrize("children", ["none", "fork"])
def test_workers_end_with_a_killed_rank(here: Path, children: str) -> None:
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from distributed.test_worker_pool import make_loader\n"
        f'next(make_loader(2, slow="slow", children={children!r}))\n'
    )
    rank = subprocess.Popen([sys.executable, "-c", code], cwd=here)
    try:
        pids = await_files("slow.*", 2)
        if children != "none":
            pids += await_files("child.*", 4)
    finally:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    await_end(pids)
