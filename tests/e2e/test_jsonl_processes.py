"""Rows of a process that is killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kempnerforge.telemetry.jsonl import read_rows

pytestmark = pytest.mark.smoke


def test_jsonl_kills_leave_at_most_one_torn_line_each(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = """
import sys
from pathlib import Path
from kempnerforge.telemetry.jsonl import JsonlSink
sink = JsonlSink(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
step = 0
while True:
    step += 1
    sink.write({"step": step, "train/loss": 1 / step, "note": "x" * 3000})
"""
    draw = random.Random(11)
    for attempt in range(1, 6):
        command = [sys.executable, "-c", code, str(path), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            killed_at = path.stat().st_size + draw.randrange(4, 200) * 1000
            deadline = time.monotonic() + 60
            while path.stat().st_size < killed_at:
                assert time.monotonic() < deadline, f"attempt {attempt} writes nothing more"
            process.send_signal(signal.SIGKILL)
    read = read_rows(path)
    assert read.torn <= 5
    for attempt in range(1, 6):
        steps = [row["step"] for row in read.rows if row["attempt"] == attempt]
        assert steps == list(range(1, len(steps) + 1))
        assert steps
