"""What a person sees: plain lines in a file, one progress line on a terminal, and no way to stop a run."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import select
import time
from collections.abc import Callable, Iterator

import pytest

from kempnerforge.telemetry.console import ConsoleSink
from kempnerforge.telemetry.console_text import duration, seconds, si, si_bytes
from kempnerforge.telemetry.sinks import Row

COMMIT = {
    "checkpoint/step": 150,
    "checkpoint/size_bytes": 12_400_000,
    "checkpoint/total_s": 0.08,
    "checkpoint/write_s": 0.05,
    "checkpoint/commit_s": 0.02,
    "checkpoint/blocking_s": 0.081,
}


def train_row(step: int, **more: float) -> Row:
    row = {"train/loss": 2.34121, "train/grad_norm": 0.871, "train/lr": 3e-4, "train/tokens_per_s": 41_234.5}
    return {"step": step, **row, **{f"train/{name}": value for name, value in more.items()}}


def plain(max_steps: int, log_interval: int, show: Callable[[ConsoleSink], None]) -> list[str]:
    file = io.StringIO()
    sink = ConsoleSink(max_steps, log_interval, file=file)
    show(sink)
    sink.close()
    return file.getvalue().splitlines()


def without_eta(line: str) -> str:
    return re.sub(r"  eta \S+$", "", line)


def test_console_plain_lines_at_interval_first_last() -> None:
    def show(sink: ConsoleSink) -> None:
        for step in range(101, 125):
            sink.write(train_row(step))

    lines = plain(124, 10, show)
    fields = "loss 2.3412  grad_norm 0.87  lr 3.0e-04  41.2k tok/s"
    assert [without_eta(line) for line in lines] == [
        f"step {step}/124  {fields}" for step in (101, 110, 120, 124)
    ]
    assert "eta" not in lines[0]
    assert re.search(r"  eta \d\d:\d\d$", lines[1])


def test_console_missing_fields_left_out() -> None:
    def show(sink: ConsoleSink) -> None:
        sink.write({"step": 1, "train/loss": 10.0})
        sink.write(train_row(2, mfu=0.4123))

    first, second = plain(2, 1, show)
    assert first == "step 1/2  loss 10.0000"
    assert "  mfu 41.2%" in second


def test_console_events_have_own_lines() -> None:
    """Commits, validation, notes and warnings."""

    def show(sink: ConsoleSink) -> None:
        sink.note("run [bold]x[/bold] starts in runs/[a]/:smile:")
        sink.write({"step": 150, "eval/loss": 2.41})
        sink.write({"step": 152, **COMMIT})
        sink.write({"step": 153, "checkpoint/blocking_s": 0.2})  # a save that has only begun
        sink.warn("the disk is nearly full " + "x" * 300)

    assert plain(200, 10, show) == [
        "run [bold]x[/bold] starts in runs/[a]/:smile:",
        "eval  step 150  loss 2.4100",
        "checkpoint step 150 committed: 12.4 MB in 0.08 s (write 0.05 s, commit 0.02 s), blocked 0.08 s",
        "warning: the disk is nearly full " + "x" * 300,
    ]


def test_console_skipped_step_always_shown() -> None:
    def show(sink: ConsoleSink) -> None:
        for step in range(1, 10):
            sink.write(train_row(step, **({"loss": math.nan} if step == 4 else {})))
            sink.write(train_row(step, **({"grad_norm": math.inf} if step == 6 else {})))

    lines = plain(100, 50, show)
    skipped = [line for line in lines if line.endswith("skipped: not finite")]
    assert [line.split()[1] for line in skipped] == ["4/100", "6/100"]
    assert "loss nan" in skipped[0]
    assert "grad_norm inf" in skipped[1]


@contextlib.contextmanager
def terminal() -> Iterator[tuple[io.TextIOWrapper, Callable[[], str]]]:
    """A pseudo terminal: a file to write to, and what has arrived on the screen's side, to be asked once."""
    screen, tty = os.openpty()
    end = b"<that was all>"

    def arrived() -> str:
        file.write(end.decode())
        file.flush()
        data = b""
        deadline = time.monotonic() + 60
        while not data.endswith(end):  # the kernel passes it on in its own time
            assert time.monotonic() < deadline, f"the end has not arrived after {data!r}"
            if select.select([screen], [], [], 1)[0]:
                data += os.read(screen, 1 << 16)
        return data.removesuffix(end).decode()

    with os.fdopen(tty, "w", encoding="utf-8") as file:
        yield file, arrived
    os.close(screen)


def visible(output: str) -> list[str]:
    """The lines that stand on the screen after ``output``: the control codes used are erase and colours."""
    lines = []
    for line in output.replace("\r\n", "\n").split("\n"):
        last_drawing = line.split("\r\x1b[2K")[-1]
        lines.append(re.sub(r"\x1b\[[0-9;]*m", "", last_drawing))
    return lines


def test_console_terminal_progress_on_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with terminal() as (file, arrived):
        sink = ConsoleSink(60, 1, file=file)
        sink.note("begins")
        for step in range(1, 61):
            sink.write(train_row(step))
            if step == 30:
                sink.write({"step": 30, "eval/loss": 2.41})
                sink.write({"step": 30, **COMMIT})
        sink.note("ends")
        sink.close()
        output = arrived()
    first, evaluation, commit, progress, last, end = visible(output)
    assert first == "begins"
    assert evaluation == "eval  step 30  loss 2.4100"
    assert commit.startswith("checkpoint step 150 committed")
    assert re.fullmatch(
        r"━{20} step 60/60  loss 2.3412  grad_norm 0.87  lr 3.0e-04  41.2k tok/s  eta 00:00", progress
    )
    assert (last, end) == ("ends", "")
    assert "\x1b[?25l" not in output  # the cursor stays visible: a killed run leaves the terminal as it was


def test_console_narrow_terminal_cuts_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    with terminal() as (file, arrived):
        sink = ConsoleSink(10, 1, file=file)
        for step in range(1, 11):
            sink.write(train_row(step))
        sink.close()
        progress, _ = visible(arrived())
    assert len(progress) <= 39
    assert progress.endswith("…")


def test_console_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as (file, arrived):
        sink = ConsoleSink(2, 1, file=file)
        sink.write(train_row(1))
        sink.write(train_row(2))
        sink.close()
        output = arrived()
    assert "\x1b" not in output
    assert output.count("\n") == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (si(950), "950"),
        (si(41_234.5), "41.2k"),
        (si(1.84e6), "1.8M"),
        (si(2.5e9), "2.5G"),
        (si_bytes(812), "812 B"),
        (si_bytes(12_400_000), "12.4 MB"),
        (si_bytes(1.75e12), "1.8 TB"),
        (seconds(0.083), "0.08 s"),
        (seconds(12.34), "12.3 s"),
        (seconds(3723), "1:02:03"),
        (duration(41.4), "00:41"),
        (duration(59.6), "01:00"),
        (duration(3723), "1:02:03"),
        (duration(2 * 86400 + 3 * 3600 + 4 * 60 + 5), "2d 03:04:05"),
    ],
)
def test_console_numbers_table_matches(text: str, expected: str) -> None:
    assert text == expected
