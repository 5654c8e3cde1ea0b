"""How long ranks wait for the work of one: as long as its beats come, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.clock import FakeClock
from torch.distributed import HashStore  # type: ignore[attr-defined]

from kempnerforge.distributed import heartbeat
from kempnerforge.distributed.heartbeat import Heartbeat

TIMEOUT_S = 30.0


class Waiting:
    """A rank that waits, while ``tell(clock)`` says what the working rank writes and when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tell: Callable[[float], str | None]) -> None:
        self.store = HashStore()
        self.clock = FakeClock(0.0).replace_in(monkeypatch, heartbeat)
        self._tell = tell
        monkeypatch.setattr(self.clock, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if text := self._tell(self.clock.now):
            self.store.set("work", text)


def test_heartbeat_beats_outlast_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    ends_at_s = 20 * TIMEOUT_S
    waiting = Waiting(
        monkeypatch, lambda now: "1 done" if now > ends_at_s else f"1 {1 + int(now // (TIMEOUT_S - 2))}"
    )
    Heartbeat(waiting.store).wait(TIMEOUT_S)
    assert waiting.clock.now > ends_at_s


@pytest.mark.parametrize("last", [None, "1 4"], ids=["none ever", "no more"])
def test_heartbeat_no_beat_for_the_timeout_raises(monkeypatch: pytest.MonkeyPatch, last: str | None) -> None:
    waiting = Waiting(monkeypatch, lambda now: last if now < 2 * TIMEOUT_S else "1 done")
    with pytest.raises(TimeoutError, match="timed out waiting for rank 0: it has shown no progress for 30 s"):
        Heartbeat(waiting.store).wait(TIMEOUT_S)
    assert waiting.clock.now < 2 * TIMEOUT_S


def test_heartbeat_late_rank_finds_later_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for slow ones: when they look, what they wait for may be long done."""
    waiting = Waiting(monkeypatch, lambda _now: None)
    waiting.store.set("work", "10 2")
    beats = Heartbeat(waiting.store)
    for _ in range(9):
        beats.wait(TIMEOUT_S)
    with pytest.raises(TimeoutError):  # the tenth goes on, as far as is known
        beats.wait(TIMEOUT_S)


def test_heartbeat_work_that_failed_is_done() -> None:
    store = HashStore()
    working, waiting = Heartbeat(store), Heartbeat(store)
    with pytest.raises(KeyboardInterrupt), working.working(TIMEOUT_S):
        raise KeyboardInterrupt
    waiting.wait(TIMEOUT_S)
    assert store.get("work") == b"1 done"
