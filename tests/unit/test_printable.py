"""What others write into a shared folder reaches no terminal as control characters, and no link is read."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TextIO, cast

import pytest

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.retention import pins, read_locks
from kempnerforge.checkpoint.run import metadata
from kempnerforge.cli import app
from kempnerforge.errors import RunFolderError
from kempnerforge.goodput.event_log import read_events
from kempnerforge.printable import PrintableStream, printable, printable_output
from kempnerforge.telemetry.console import ConsoleSink
from kempnerforge.telemetry.curves import read_curves

pytest_plugins = ["support.ckpt_fixtures"]

TITLE = "\x1b]0;owned\x07"
"""Sets the title of a terminal's window."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 漢", "plain é 漢"),
        (TITLE, "\\x1b]0;owned\\x07"),
        ("a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        ("\x9b2J \u202edlrow \u2028 \ud800", "\\x9b2J \\u202edlrow \\u2028 \\ud800"),
    ],
)
def test_printable_unfit_characters_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_printable_lines_and_colours_stay_in_output() -> None:
    assert printable("a\nb\tc\r", lines=True) == "a\nb\tc\\x0d"
    assert printable_output(f"\x1b[1;32mok\x1b[0m\n{TITLE}\x1b[2J") == (
        "\x1b[1;32mok\x1b[0m\n\\x1b]0;owned\\x07\\x1b[2J"
    )


def test_printable_stream_passes_all_else_on() -> None:
    under = io.StringIO()
    stream = PrintableStream(under)
    print(TITLE, file=cast(TextIO, stream), flush=True)
    assert under.getvalue() == "\\x1b]0;owned\\x07\n"
    assert not stream.isatty()


def test_cli_note_of_a_pin_and_error_are_printable(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pins.pin(run / "checkpoints", 40, note=f"keep{TITLE}")

    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["kempnerforge", *arguments])
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        with pytest.raises(SystemExit):
            app.main()

    command("ckpt", "explain", str(run), "40")
    printed = capsys.readouterr().out
    assert "keep\\x1b]0;owned" in printed.replace("\n", "")
    assert "\x1b]" not in printed
    command("ckpt", "ls", str(run / f"missing{TITLE}"))
    error = capsys.readouterr().err
    assert "missing\\x1b]0;owned" in error
    assert "\x1b" not in error


def test_console_warning_is_printable() -> None:
    file = io.StringIO()
    console = ConsoleSink(10, 1, file=file)
    console.warn(f"held by {TITLE}")
    console.close()
    assert "held by \\x1b]0;owned\\x07" in file.getvalue()


def make_other_kind(path: Path, kind: str, secret: Path) -> None:
    """Make ``path`` a link to ``secret``, a pipe or a folder."""
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_small_files_of_other_kinds_are_not_read(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"step": 1, "attempt": 1, "event": "start", "time": 1.0, "loss": 2.0}))

    for name in ("ledger.jsonl", "metrics.jsonl", metadata.RUN_FILE):
        make_other_kind(tmp_path / name, kind, secret)
    with pytest.raises(OSError, match=r"which is not read|is not a regular file"):
        read_events(tmp_path)
    with pytest.raises(OSError, match=r"which is not read|is not a regular file"):
        read_curves(tmp_path / "metrics.jsonl", ["loss"], {})
    with pytest.raises((OSError, RunFolderError), match=r"which is not read|is not a regular file"):
        metadata.read(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_pins_and_holds_of_other_kinds_count_unread(tmp_path: Path, kind: str) -> None:
    """A name alone keeps a step. What a link leads to is not shown."""
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"user": "u", "host": "h", "time": 1.0, "note": "a secret"}))
    for path in (
        tmp_path / pins.FOLDER / paths.step_name(4),
        tmp_path / read_locks.FOLDER / f"{paths.step_name(4)}.{'ab' * 8}.json",
    ):
        path.parent.mkdir()
        make_other_kind(path, kind, secret)
    assert pins.read(tmp_path) == {4: pins.Pin()}
    assert [reader for readers in read_locks.readers(tmp_path).values() for reader in readers] == ["a reader"]


def test_curves_foreign_rows_left_out(tmp_path: Path) -> None:
    rows = ['{"step": 1, "attempt": 1, "loss": 2}', '{"step": "x", "attempt": [1], "loss": 3}', "[]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    found = read_curves(tmp_path / "metrics.jsonl", ["loss"], {})
    assert list(found.counting["loss"].values) == [2.0]


def test_read_mark_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsio.read_mark(tmp_path / "none")
