"""Reports a step or a save that takes far too long, while it lasts: which rank lags, and all stacks.

Each rank has a thread that compares how long the rank has been at one thing with the median of such things.
While nothing is late it touches neither disk nor network: as cheap on 4,096 ranks as on one. A rank
that is late writes its stacks into the run's folder and posts to the c10d store where it stands; ranks wait
for each other in every step, so when one hangs all are late. Rank 0's thread, while its main thread hangs
perhaps, reads the posts and says who lags. Nothing is ended here, and no collective is entered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kempnerforge.config.train import TrainConfig
from kempnerforge.distributed.store_channel import StoreChannel, collect
from kempnerforge.train.hangs.progress import Place, Progress, limit_s
from kempnerforge.train.hangs.stack_dump import FOLDER, Stacks, file_name

_TICK_S = 1.0
_REARM_EVERY_S = 5.0
_COLLECT_S = 10.0
"""For so long rank 0 waits for what the others say; their clocks begin and tick at other moments."""


@dataclass(frozen=True)
class SaveInFlight:
    """A save that has begun and is not known to be over."""

    name: str
    part: str
    """What this rank does of it: copy, write, commit (the first rank), or done."""
    seconds: float
    """Since it began."""


@dataclass(frozen=True)
class Rules:
    """When something is late, in seconds."""

    multiple: float
    floor_s: float
    ceiling_s: float

    @classmethod
    def of(cls, config: TrainConfig, timeout_s: float) -> Rules:
        """``timeout_s`` is that of the process groups: half of it is late whatever the median."""
        return cls(config.hang_multiple, config.hang_floor_s, timeout_s / 2)

    def limit_s(self, progress: Progress, activity: str) -> float:
        """From when on ``activity`` is late."""
        took_s = progress.took_s(activity)
        return limit_s(took_s, multiple=self.multiple, floor_s=self.floor_s, ceiling_s=self.ceiling_s)


class HangWatch:
    """The watching thread of one rank, from ``start`` to ``close``."""

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
        tell: Callable[[str], None],
    ) -> None:
        self._progress, self._rules = progress, rules
        self._rank, self._num_ranks, self._attempt = rank, num_ranks, attempt
        self._connect, self._stacks = connect, stacks
        self._board: StoreChannel | None = None
        self._save_in_flight, self._tell = save_in_flight, tell
        self._tick_s = min(_TICK_S, rules.floor_s / 4)
        self._rearmed_at = float("-inf")
        self._reported: dict[str, float] = {}
        """What was late at the last look -> for how many seconds it had been when last reported."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch; nothing to do when ``train.hang_multiple`` is 0."""
        if self._rules.multiple:
            # Here, not by the thread: it may never get to run.
            self._rearm(time.monotonic())
            self._thread.start()

    def close(self) -> None:
        """Watch no more. Does not wait: the thread may stand in a store that does not answer."""
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
                # Once at the limit, then each time it has lasted twice as long.
                if seconds >= 2 * self._reported.get(what, limit / 2):
                    self._reported[what] = seconds
                    self._report(what, seconds)

    def _rearm(self, now: float) -> None:
        self._rearmed_at = now
        self._stacks.print_unless_called_again(self._rules.floor_s + 2 * _REARM_EVERY_S)

    def _late(self, now: float) -> dict[str, tuple[float, float]]:
        """What is late -> (seconds so far, limit)."""
        found = {}
        place, save = self._progress.place, self._save_in_flight()
        lasting_s, limit = now - place.began, self._rules.limit_s(self._progress, place.activity)
        if lasting_s > limit and not (place.activity == "save" and save):
            found[str(Place(place.activity, place.step))] = (lasting_s, limit)
        if save is not None and save.seconds > (limit := self._rules.limit_s(self._progress, "save")):
            found[f"saving {save.name}"] = (save.seconds, limit)
        return found

    def _report(self, what: str, seconds: float) -> None:
        self._stacks.to_file(f"{what} has lasted {seconds:.1f} s")
        try:
            self._board = self._board or self._connect()
            self._board.post(f"late/{self._rank}", self._post())
            posts = self._collect(self._board) if self._rank == 0 else {}
        except RuntimeError as error:  # the store is gone, or does not answer
            posts = {self._rank: self._post()}
            what = f"{what} (the other ranks cannot be asked: {error})"
        if self._rank == 0 and not self._closed.is_set():
            files = f"{FOLDER}/{file_name(self._attempt, '*')}"
            told = who_lags(posts, self._num_ranks, saving=what.startswith("saving "))
            where = f"Stacks of all ranks: {files} in the run's folder"
            self._tell(f"{what} has lasted {seconds:.1f} s. {told}. {where}")

    def _over(self, what: str) -> None:
        del self._reported[what]
        try:
            if self._board is not None and not self._reported:
                self._board.forget(f"late/{self._rank}")
        except RuntimeError:
            return  # the store is gone: nobody will read it
        if self._rank == 0:
            self._tell(f"{what} is over")

    def _post(self) -> dict[str, Any]:
        place, save = self._progress.place, self._save_in_flight()
        issued = self._progress.collectives() - place.collectives
        return {
            "order": place.order,
            "done": issued / max(1, self._progress.collectives_per_step),
            "where": str(place),
            "save_part": save.part if save else "done",
        }

    def _collect(self, board: StoreChannel) -> dict[int, Mapping[str, Any]]:
        keys = {f"late/{rank}": rank for rank in range(self._num_ranks)}
        found = collect(board, list(keys), timeout_s=_COLLECT_S)
        return {keys[key]: post for key, post in found.items() if post is not None}


def who_lags(posts: Mapping[int, Mapping[str, Any]], num_ranks: int, *, saving: bool = False) -> str:
    """From what the ranks posted, by rank: who lags and where, in words. Pure.

    A rank that said nothing lags: it is gone or frozen, or its interpreter does not move. Otherwise those
    that have come least far: by step, part of the step, and the share of its usual collectives that it has
    issued (one that others wait for has issued fewer). For a save, those that have not written their part.
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
    places = {rank: (tuple(post["order"]), round(post["done"], 6)) for rank, post in posts.items()}
    least = min(places.values())
    behind_most = [rank for rank, place in places.items() if place == least]
    where = posts[behind_most[0]]["where"]
    if len(behind_most) == num_ranks:
        return f"All ranks stand at the same place ({where})"
    return f"{_ranks(behind_most, 'lag')}: it is at {where}, and the others wait"


def _ranks(ranks: list[int], verb: str = "do") -> str:
    one = {"do": "does", "lag": "lags"}[verb]
    if len(ranks) == 1:
        return f"Rank {ranks[0]} {one}"
    shown = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
    return f"{len(ranks)} ranks ({shown}) {verb}"
