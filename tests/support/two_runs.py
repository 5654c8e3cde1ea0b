"""Give one checkpoint folder to two runs, start and kill them in a seeded order, and watch them.

Each start is a process with a user's own loop around ``CheckpointManager``. An audit hook in it
records every file operation below the checkpoint folder, so that everything that a run read or
changed there is known. (Its writer process is not watched, because it writes only the folder in
flight that it is given. If it changed another folder, inodes, times and bytes would show it.)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import xxhash
from support.ranks import PRELOAD
from support.step_maker import write_step

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.run import claim, owner
from kempnerforge.checkpoint.run.owner import OWNER_FILE

REFUSED = 2
KEEP_ALL = 1000
"""Number of steps to keep: more than the folder ever has."""
RUNS = ("a", "b")
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
_LISTS = ("os.listdir", "os.scandir")
_OWNER_TEMPORARY = re.compile(rf"\.{re.escape(OWNER_FILE)}\.[0-9a-f]+\.tmp")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Start:
    """One start of one of the runs."""

    run_dir: Path
    shared: Path
    steps: int
    step_s: float
    keep_last_n: int
    log: Path
    at: float
    """Unix time at which all starts of one instant begin."""
    broken: str = ""
    """A key of ``BROKEN``: the way in which this process disregards who owns the folder."""


@dataclass(frozen=True)
class Operation:
    """An operation of a process below the checkpoint folder."""

    kind: str
    """``read``, ``write``, ``list``, or the name of an audit event."""
    path: str
    """Path below the checkpoint folder; ``.`` for the folder itself."""


def train(start: Start) -> None:
    """Run the process: resume, train, save after every step. The exit status is 2 if it is refused."""
    log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(**what: Any) -> None:
        os.write(log, json.dumps(what).encode() + b"\n")

    sys.addaudithook(lambda event, args: _audit(event, args, str(start.shared), tell))
    import torch

    from kempnerforge import CheckpointConfig, CheckpointManager, TrainState
    from kempnerforge.errors import KempnerForgeError

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    state = TrainState(model=model, optimizer=optimizer)
    config = CheckpointConfig.model_validate(
        {"dir": str(start.shared), "interval": 1, "keep_last_n": start.keep_last_n, "async_mode": "async"}
    )
    if start.broken:
        BROKEN[start.broken][1](start.shared)
    while time.time() < start.at:
        time.sleep(0.001)
    try:
        with CheckpointManager(config, state=state, run_dir=start.run_dir) as ckpt:
            receipt = ckpt.resume(state)
            tell(resumed=receipt.step)
            for _ in range(start.steps):
                model(torch.ones(1, 2)).sum().backward()
                ckpt.wait_for_staging()
                optimizer.step()
                time.sleep(start.step_s)
                state.advance()
                ckpt.after_step(state)
            ckpt.finish(state)
    except KempnerForgeError as error:
        tell(error=type(error).__name__, text=str(error))
        os._exit(error.exit_status)
    os._exit(0)


def _skip_owner_check(_shared: Path) -> None:
    claim._require_same_run = lambda *_: None


def _own_all_steps(_shared: Path) -> None:
    owner.Owner.owns = lambda self, provenance: True


def _read_a_step(shared: Path) -> None:
    (shared / paths.step_name(1) / paths.CONFIG).read_bytes()


def _rename_a_step(shared: Path) -> None:
    (shared / paths.step_name(1)).rename(shared / "step_00000001.late.1")


def _delete_a_step(shared: Path) -> None:
    shutil.rmtree(shared / paths.step_name(1))


def _delete_unseen(shared: Path) -> None:
    subprocess.run(["rm", "-r", str(shared / paths.step_name(1))], check=True)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "takes the folder of another run": ("b", _skip_owner_check, "has taken the folder"),
    "loads a step of another run": ("a", _own_all_steps, "in a step of another run"),
    "reads a step of the owner": ("b", _read_a_step, "looked into a folder with an owner"),
    "renames a step of the owner": ("b", _rename_a_step, "does not own the folder"),
    "deletes a step of the owner": ("b", _delete_a_step, "does not own the folder"),
    "has a step of the owner deleted": ("b", _delete_unseen, "are gone"),
}
"""What a process may do wrong -> the run that does it, the function, and the message of the checks."""


def _audit(event: str, args: tuple[Any, ...], root: str, tell: Any) -> None:
    if event == "open":
        kind = "write" if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else "read"
        named = [args[0]]
    elif event in _LISTS:
        kind, named = "list", [args[0]]
    elif event in _CHANGES:
        folder_fd = args[-1] if isinstance(args[-1], int) and args[-1] >= 0 else None
        kind, named = (
            event,
            [_whole(path, folder_fd) for path in args[:2] if isinstance(path, (str, bytes, os.PathLike))],
        )
    else:
        return
    for path in named:
        text = _whole(path, None)
        if text is not None and (text == root or text.startswith(root + "/")):
            tell(op=kind, path=os.path.relpath(text, root))


def _whole(path: Any, folder_fd: int | None) -> str | None:
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    if not isinstance(path, (str, bytes, os.PathLike)):
        return None
    text = os.fsdecode(path)
    if folder_fd is not None and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder_fd}"), text)
    return os.path.abspath(text)


@dataclass
class Attempt:
    """A running start, and the state of the folder when it began."""

    run: str
    start: Start
    process: ForkServerProcess
    had_owner: bool
    newest: int
    """The newest step of a run in the folder when it began."""

    def rows(self) -> list[dict[str, Any]]:
        """Return what it has reported so far."""
        try:
            lines = self.start.log.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def operations(self) -> list[Operation]:
        """Return its operations below the checkpoint folder."""
        return [Operation(row["op"], row["path"]) for row in self.rows() if "op" in row]

    def resumed(self) -> int | None:
        """Return the step that it resumed from; None if it has not come so far."""
        return next((row["resumed"] for row in self.rows() if "resumed" in row), None)


Seen = dict[str, tuple[int, int, str]]
"""Path below the checkpoint folder -> inode, time of change, digest."""


@dataclass
class Interleaving:
    """Two runs and one folder. ``play`` does what the seed determines, and checks after every action."""

    base: Path
    seed: int
    tally: Counter[str] = field(default_factory=Counter)
    live: dict[str, Attempt] = field(default_factory=dict)
    planted: Seen = field(default_factory=dict)
    steps_seen: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    last_owner: str | None = None

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.shared = self.base / "shared"
        self.number = 0
        self.keep_last_n = self.rng.choice([1, 2, KEEP_ALL])

    def play(self) -> Counter[str]:
        """Start and kill both runs in a random order, then let the owner finish."""
        try:
            for act in range(self.rng.randint(5, 8)):
                self._act(first=act == 0)
                self._check_folder()
            for run in RUNS:
                self._end(run)
            winner = self._owner() or RUNS[0]  # all may have been killed before one owned the folder
            self._start(winner, steps=2)
            self._finish(winner)
            loser = next(run for run in RUNS if run != winner)
            self._start(loser, steps=2)
            self._finish(loser)
            self._check_folder()
            self.tally["interleavings"] += 1
        finally:
            self._kill_all()
        return self.tally

    def play_broken(self, broken: str) -> None:
        """Start ``a``, plant a foreign step, then start a process that is broken on purpose.

        Raises AssertionError if the checks detect it. ``broken`` is a key of ``BROKEN``.
        """
        self.keep_last_n = KEEP_ALL
        try:
            self._start("a", steps=2)
            self._finish("a")
            self._plant()
            self._check_folder()
            run = BROKEN[broken][0]
            self._start(run, steps=0, broken=broken)
            self._finish(run)
            self._check_folder()
        finally:
            self._kill_all()

    def _kill_all(self) -> None:
        for attempt in self.live.values():
            attempt.process.kill()
            attempt.process.join()

    # -- actions

    def _act(self, *, first: bool) -> None:
        run = self.rng.choice(RUNS)
        self._end(run)
        if not self.live and self._owner() is not None:
            self._between()
        if first and self.rng.random() < 0.5:
            self._start_both()
        else:
            self._start(run, steps=self.rng.randint(1, 12))
        how = self.rng.choice(["finish", "kill at once", "kill soon", "kill soon", "leave", "leave"])
        if how == "finish":
            self._finish(run)
        elif how.startswith("kill"):
            time.sleep(self.rng.uniform(0, 0.05) if how == "kill at once" else self.rng.uniform(0.05, 0.6))
            self._end(run)

    def _between(self) -> None:
        """Do what may happen to a folder while no run uses it."""
        winner = self._owner()
        assert winner is not None
        what = self.rng.choice(["nothing", "nothing", "from before owner files", "a foreign step"])
        has_steps = bool(paths.committed_steps(self.shared))
        has_owner = (self.shared / OWNER_FILE).exists()
        if what == "from before owner files" and has_steps and has_owner and not self.planted:
            (self.shared / OWNER_FILE).unlink()
            self.tally["adoptions"] += 1
        elif what == "a foreign step" and not self.planted and has_owner:
            self._plant()

    def _plant(self) -> None:
        """Put a step of a third run into the folder."""
        step = max(paths.committed_steps(self.shared), default=0) + 1000
        write_step(self.shared, step, run_id="other", attempt=99)
        self.planted = _look(self.shared, paths.step_name(step))
        self.tally["planted"] += 1

    def _start_both(self) -> None:
        at = time.time() + 0.3
        for run in RUNS:
            self._start(run, steps=self.rng.randint(1, 12), at=at)
        self.tally["at the same instant"] += 1

    def _start(self, run: str, *, steps: int, at: float = 0.0, broken: str = "") -> None:
        self.number += 1
        log = self.base / f"{self.number}.{run}.log"
        start = Start(
            self.base / run,
            self.shared,
            steps,
            self.rng.choice([0.0, 0.02]),
            self.keep_last_n,
            log,
            at,
            broken,
        )
        process = _context.Process(target=train, args=(start,))
        had_owner, newest = owner.read(self.shared) is not None, self._newest()
        process.start()
        self.live[run] = Attempt(run, start, process, had_owner, newest)
        self.tally["starts"] += 1

    def _finish(self, run: str) -> None:
        if (attempt := self.live.get(run)) is not None:
            attempt.process.join(60)
            assert attempt.process.exitcode is not None, f"{run} hangs: {attempt.rows()[-3:]}"
            self._end(run)

    def _end(self, run: str) -> None:
        """Kill the run if it is alive, and check what it did."""
        attempt = self.live.pop(run, None)
        if attempt is None:
            return
        if attempt.process.is_alive():
            attempt.process.kill()
        attempt.process.join()
        self._judge(attempt)

    # -- checks

    def _owner(self) -> str | None:
        found = owner.read(self.shared)
        if found is not None:
            name = Path(found.run_dir).name
            assert self.last_owner in (None, name), f"{name} has taken the folder of {self.last_owner}"
            self.last_owner = name
        return self.last_owner

    def _newest(self) -> int:
        steps = [
            step for step in paths.committed_steps(self.shared) if paths.step_name(step) not in self.planted
        ]
        return max(steps, default=0)

    def _judge(self, attempt: Attempt) -> None:
        status, rows = attempt.process.exitcode, attempt.rows()
        winner = self._owner()
        told = next((row for row in rows if "error" in row), {})
        for operation in attempt.operations():
            self._judge_operation(attempt, operation, is_owner=winner == attempt.run)
        assert status in (0, REFUSED, -signal.SIGKILL), f"{attempt.run}: {status}, {rows[-3:]}"
        self.tally[{0: "finished", REFUSED: "refused"}.get(status, "killed")] += 1
        if winner != attempt.run:
            assert status != 0, f"{attempt.run} trained in the folder of {winner}"
            assert attempt.resumed() is None
        elif (resumed := attempt.resumed()) is not None:
            assert resumed == attempt.newest, f"{attempt.run} resumed {resumed}, and had {attempt.newest}"
            self.tally["resumed"] += resumed > 0
        if status == REFUSED:
            assert told["error"] == "FolderOwnedError", told
            assert attempt.run != winner, told
            for part in (f"in {self.base / 'a'}", f"in {self.base / 'b'}", "ckpt fork", "{run_name}"):
                # Before the owner has adopted its folder, the other run's own folder is not known.
                assert part in told["text"] or not attempt.had_owner, told

    def _judge_operation(self, attempt: Attempt, operation: Operation, *, is_owner: bool) -> None:
        first, _, rest = operation.path.partition("/")
        is_foreign = first in self.planted
        if is_owner:
            looks = (operation.kind, rest) in (("read", paths.MANIFEST), ("list", ""))
            assert looks or not is_foreign, f"{attempt.run}, in a step of another run: {operation}"
            return
        if _OWNER_TEMPORARY.fullmatch(first) or (operation.kind, first) == ("os.link", OWNER_FILE):
            assert not attempt.had_owner, f"{attempt.run} wrote to a folder with an owner: {operation}"
            return
        if (operation.kind, operation.path) in (("read", OWNER_FILE), ("os.mkdir", ".")):
            return
        # Without an owner file, manifests show who owns the folder, and the config shows the name
        # of that run.
        looks = operation.kind == "list" or (
            operation.kind == "read" and (rest in (paths.MANIFEST, paths.CONFIG) or operation.path == ".")
        )
        assert looks, f"{attempt.run}, which does not own the folder: {operation}"
        assert not attempt.had_owner, f"{attempt.run} looked into a folder with an owner: {operation}"

    def _check_folder(self) -> None:
        """Check that all steps are of one run, and that neither earlier nor planted steps have changed."""
        for path, seen in self.planted.items():
            assert _file(self.shared / path) == seen, f"{path}, a step of another run, was changed"
        ids = {
            path.name: json.loads((path / "run.json").read_text())["run_id"] for path in _run_dirs(self.base)
        }
        winner = self._owner()
        if winner is None:
            assert not paths.committed_steps(self.shared)
            return
        for step in paths.committed_steps(self.shared):
            path = self.shared / paths.step_name(step)
            try:
                run_id, now = manifest.read(path).provenance.run_id, _file(path / paths.MANIFEST)
            except Exception:  # noqa: BLE001 - its own run may be deleting it
                assert self.live, f"{path} cannot be read, and nobody runs"
                continue
            if path.name in self.planted:
                continue
            assert run_id == ids[winner], f"{path} is of {run_id}, the folder of {ids[winner]}"
            assert self.steps_seen.setdefault(step, now) == now, f"{path} is another one than before"
        if self.keep_last_n == KEEP_ALL:
            gone = self.steps_seen.keys() - set(paths.committed_steps(self.shared))
            assert not gone, f"steps {sorted(gone)} are gone, which no rule has let go"
        listing = paths.list_folder(self.shared)
        assert [*listing.quarantined, *listing.rolled_back, *listing.late, *listing.suspect] == []


def _run_dirs(base: Path) -> Iterator[Path]:
    return (base / run for run in RUNS if (base / run / "run.json").exists())


def _look(folder: Path, name: str) -> Seen:
    return {
        str(path.relative_to(folder)): _file(path)
        for path in [folder / name, *sorted((folder / name).iterdir())]
    }


def _file(path: Path) -> tuple[int, int, str]:
    stat = path.stat()
    data = path.read_bytes() if path.is_file() else b""
    return stat.st_ino, stat.st_mtime_ns, xxhash.xxh3_128_hexdigest(data)
