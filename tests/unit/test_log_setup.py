from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator

import pytest

from kempnerforge import log_setup
from kempnerforge.cli import app, train
from kempnerforge.errors import ConfigError
from kempnerforge.log_setup import THIS_RANK, LogHandler

log = logging.getLogger("kempnerforge.some.module")


class Shown:
    """A console that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def note(self, text: str) -> None:
        self.lines.append(("note", text))

    def warn(self, text: str) -> None:
        self.lines.append(("warn", text))


def log_one_of_each() -> None:
    log.debug("a detail")
    log.info("%d samples", 3)
    log.warning("no space")
    log.warning("no record", extra=THIS_RANK)
    log.error("error: broken\x1b]0;owned\x07")


@pytest.fixture
def console() -> Iterator[Shown]:
    yield Shown()
    assert logging.getLogger("kempnerforge").handlers == []
    assert logging.getLogger("kempnerforge").propagate


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, logging.INFO),
        ({"KEMPNERFORGE_LOG": ""}, logging.INFO),
        ({"KEMPNERFORGE_LOG": "Debug"}, logging.DEBUG),
        ({"KEMPNERFORGE_LOG": "WARNING"}, logging.WARNING),
    ],
)
def test_log_level_is_that_of_the_variable(environ: dict[str, str], level: int) -> None:
    assert log_setup.level_from(environ) == level


def test_log_level_unknown_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match='"loud" is not one of debug, info, warning'):
        log_setup.level_from({"KEMPNERFORGE_LOG": "loud"})
    monkeypatch.setenv("KEMPNERFORGE_LOG", "loud")
    monkeypatch.setattr("sys.argv", ["kempnerforge", "ckpt", "ls", "runs/x"])
    assert train.main(["--config=configs/debug.toml"]) == 2
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count('KEMPNERFORGE_LOG: "loud" is not one of') == 2


def test_log_of_rank_0_goes_to_the_console(console: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    with log_setup.shown_by(LogHandler(logging.INFO, rank=0, console=console)):
        log_one_of_each()
    assert console.lines == [("note", "3 samples"), ("warn", "no space"), ("warn", "no record")]
    assert capsys.readouterr() == ("", "error: broken\\x1b]0;owned\\x07\n")


def test_log_of_other_ranks_is_only_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with log_setup.shown_by(LogHandler(logging.INFO, rank=1, warning_head="warning: ")):
        log_one_of_each()
    assert capsys.readouterr() == ("", "warning: no record\nerror: broken\\x1b]0;owned\\x07\n")


def test_log_level_warning_hides_information(console: Shown) -> None:
    with log_setup.shown_by(LogHandler(logging.WARNING, rank=0, console=console)):
        log_one_of_each()
    assert console.lines == [("warn", "no space"), ("warn", "no record")]


@pytest.mark.parametrize("rank", [0, 3])
def test_log_debug_lines_have_time_rank_and_module(
    rank: int, console: Shown, capsys: pytest.CaptureFixture[str]
) -> None:
    with log_setup.shown_by(LogHandler(logging.DEBUG, rank=rank, console=console)):
        log_one_of_each()
    assert console.lines == []
    out, err = capsys.readouterr()
    assert out == ""
    expected = [
        "DEBUG a detail",
        "INFO 3 samples",
        "WARNING no space",
        "WARNING no record",
        "ERROR error: broken",
    ]
    for line, (level, _, text) in zip(
        err.splitlines(), (each.partition(" ") for each in expected), strict=True
    ):
        head = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}} rank {rank} {level} kempnerforge\.some\.module: "
        assert re.match(head + text, line)


def test_log_before_an_exit_waits_for_no_lock(capfd: pytest.CaptureFixture[str]) -> None:
    """The main thread may be stuck in a write to the console, and holds the handler's lock."""
    handler = LogHandler(logging.INFO, rank=0, warning_head="warning: ")
    stuck, ended = threading.Event(), threading.Event()

    def write_and_hang() -> None:
        with handler.lock or threading.Lock():
            stuck.set()
            ended.wait()

    hanging = threading.Thread(target=write_and_hang)
    hanging.start()
    stuck.wait()
    with log_setup.shown_by(handler):
        handler.write_directly()
        last = threading.Thread(target=log.warning, args=("not recorded",), daemon=True)
        last.start()
        last.join(20)
        is_done = not last.is_alive()
    ended.set()
    hanging.join()
    assert is_done
    assert capfd.readouterr().err == "warning: not recorded\n"
