"""Report a step or a save that takes far too long, while it is running: the slowest rank, and all stacks.

Each rank has a thread that compares the duration of the rank's current activity with the median of
earlier ones. While nothing is late, the thread uses neither disk nor network, so that it costs as
little on 4,096 ranks as on one. A late rank writes its stacks into the run's folder and posts its
position to the c10d store. Ranks wait for each other in every step, so all are late when one hangs.
The thread of rank 0 reads the posts and reports which rank lags, even while its main thread hangs.
The detector ends no process and enters no collective.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kempnerforge.config.train import TrainConfig
from kempnerforge.distributed.store_channel import StoreChannel, collect
from kempnerforge.train.hangs.progress import Position, Progress, limit_s
from kempnerforge.train.hangs.stack_dump import FOLDER, Stacks, file_name

log = logging.getLogger(__name__)

_TICK_S = 1.0
_REARM_EVERY_S = 5.0
_COLLECT_S = 10.0
"""How long rank 0 waits for the posts of the other ranks, whose threads check at other times."""


@dataclass(frozen=True)
class SaveInFlight:
    """A save that has begun and is not known to have ended."""

    name: str
    part: str
    """This rank's part in progress: copy, write, commit (rank 0), or done."""
    seconds: float
    """Time since it began."""


@dataclass(frozen=True)
class Rules:
    """The durations beyond which an activity is late, in seconds."""

    multiple: float
    floor_s: float
    ceiling_s: float

    @classmethod
    def of(cls, config: TrainConfig, timeout_s: float) -> Rules:
        """Read the limits from ``config``. The ceiling is half of the process groups' ``timeout_s``."""
        return cls(config.hang_multiple, config.hang_floor_s, timeout_s / 2)

    def limit_s(self, progress: Progress, activity: str) -> float:
        """Return the duration beyond which ``activity`` is late."""
        took_s = progress.took_s(activity)
        return limit_s(took_s, multiple=self.multiple, floor_s=self.floor_s, ceiling_s=self.ceiling_s)


class HangWatch:
    """The thread of one rank that detects hangs, from ``start`` to ``close``."""

    def __init__(
        self,
        progress: Progress,
        rules: Rules,
        *,
        rank: int,
        num_ranks: int,
        attempt: int,
        connect: Callable[[], StoreChannel],
        stacks: Stacks,
        save_in_flight: Callable[[], SaveInFlight | None],
    ) -> None:
        self._progress, self._rules = progress, rules
        self._rank, self._num_ranks, self._attempt = rank, num_ranks, attempt
        self._connect, self._stacks = connect, stacks
        self._board: StoreChannel | None = None
        self._save_in_flight = save_in_flight
        self._tick_s = min(_TICK_S, rules.floor_s / 4)
        self._rearmed_at = float("-inf")
        self._reported: dict[str, float] = {}
        """Each late activity or save -> its duration when it was last reported, in seconds."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def start(self) -> None:
        """Start the thread. Does nothing when ``train.hang_multiple`` is 0."""
        if self._rules.multiple:
            # Start the timer here and not in the thread, which may never get to run.
            self._rearm(time.monotonic())
            self._thread.start()

    def close(self) -> None:
        """Stop the thread. Does not wait for it: it may be blocked on a store that does not answer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._tick_s):
            now = time.monotonic()
            if now - self._rearmed_at >= _REARM_EVERY_S:
                self._rearm(now)
            late = self._late(now)
            for what in [what for what in self._reported if what not in late]:
                self._over(what)
            for what, (seconds, limit) in late.items():
                # Reported at the limit, then whenever the duration has doubled.
                if seconds >= 2 * self._reported.get(what, limit / 2):
                    self._reported[what] = seconds
                    self._report(what, seconds)

    def _rearm(self, now: float) -> None:
        self._rearmed_at = now
        self._stacks.print_unless_called_again(self._rules.floor_s + 2 * _REARM_EVERY_S)

    def _late(self, now: float) -> dict[str, tuple[float, float]]:
        """Return each late activity or save -> (seconds so far, limit)."""
        late = {}
        position, save = self._progress.position, self._save_in_flight()
        lasting_s, limit = now - position.began, self._rules.limit_s(self._progress, position.activity)
        if lasting_s > limit and not (position.activity == "save" and save):
            late[str(Position(position.activity, position.step))] = (lasting_s, limit)
        if save is not None and save.seconds > (limit := self._rules.limit_s(self._progress, "save")):
            late[f"saving {save.name}"] = (save.seconds, limit)
        return late

    def _report(self, what: str, seconds: float) -> None:
        self._stacks.to_file(f"{what} has lasted {seconds:.1f} s")
        try:
            self._board = self._board or self._connect()
            self._board.post(f"late/{self._rank}", self._post())
            posts = self._collect(self._board) if self._rank == 0 else {}
        except RuntimeError as error:  # the store is gone or does not answer
            posts = {self._rank: self._post()}
            what = f"{what} (the other ranks cannot be queried: {error})"
        if self._rank == 0 and not self._closed.is_set():
            files = f"{FOLDER}/{file_name(self._attempt, '*')}"
            lagging = describe_lag(posts, self._num_ranks, saving=what.startswith("saving "))
            where = f"Stacks of all ranks: {files} in the run's folder"
            log.warning(f"{what} has lasted {seconds:.1f} s. {lagging}. {where}")

    def _over(self, what: str) -> None:
        del self._reported[what]
        try:
            if self._board is not None and not self._reported:
                self._board.forget(f"late/{self._rank}")
        except RuntimeError:
            return  # the store is gone, so no rank will read the post
        if self._rank == 0:
            log.warning(f"{what} is over")

    def _post(self) -> dict[str, Any]:
        position, save = self._progress.position, self._save_in_flight()
        issued = self._progress.collectives() - position.collectives
        return {
            "order": position.order,
            "done": issued / max(1, self._progress.collectives_per_step),
            "where": str(position),
            "save_part": save.part if save else "done",
        }

    def _collect(self, board: StoreChannel) -> dict[int, Mapping[str, Any]]:
        keys = {f"late/{rank}": rank for rank in range(self._num_ranks)}
        posts = collect(board, list(keys), timeout_s=_COLLECT_S)
        return {keys[key]: post for key, post in posts.items() if post is not None}


def describe_lag(posts: Mapping[int, Mapping[str, Any]], num_ranks: int, *, saving: bool = False) -> str:
    """Return a sentence about which ranks lag and where, from the posts by rank.

    A rank without a post lags: it is gone or frozen, or its interpreter is blocked. If all have
    posted, the least advanced ranks lag. They are compared by step, then by part of the step, then
    by the share of its usual collectives that a rank has issued, because a rank that others wait
    for has issued fewer. In a save, ranks that have not written their part lag.
    """
    silent = [rank for rank in range(num_ranks) if rank not in posts]
    if silent:
        return f"{_ranks(silent)} not answer: gone, frozen, or without the interpreter lock"
    if saving:
        parts = {rank: post["save_part"] for rank, post in posts.items()}
        behind = {rank: part for rank, part in parts.items() if part in ("copy", "write")}
        if not behind:
            return "All ranks have written their part; rank 0 has not committed it"
        part = next(iter(behind.values()))
        return f"{_ranks(list(behind), 'lag')}: still at its {part}"
    advance = {rank: (tuple(post["order"]), round(post["done"], 6)) for rank, post in posts.items()}
    least = min(advance.values())
    lagging = [rank for rank, reached in advance.items() if reached == least]
    where = posts[lagging[0]]["where"]
    if len(lagging) == num_ranks:
        return f"All ranks are at the same position ({where})"
    return f"{_ranks(lagging, 'lag')}: it is at {where}, and the others wait"


def _ranks(ranks: list[int], verb: str = "do") -> str:
    singular = {"do": "does", "lag": "lags"}[verb]
    if len(ranks) == 1:
        return f"Rank {ranks[0]} {singular}"
    shown = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
    return f"{len(ranks)} ranks ({shown}) {verb}"
