"""A console whose output breaks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.smoke

SHOW_MANY = """
import sys
from kempnerforge.telemetry.console import ConsoleSink
sink = ConsoleSink(2000, 1)
for step in range(1, 2001):
    sink.write({"step": step, "train/loss": 1.0})
sink.note("Å")
sink.close()
print("trained to the end", file=sys.stderr)
"""


@pytest.mark.parametrize("broken", ["closed pipe", "full disk", "ascii"])
def test_console_broken_output_never_stops_run(broken: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"} if broken == "ascii" else None
    command = [sys.executable, "-c", SHOW_MANY]
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe, open("/dev/full", "w") as full:
        output = {"closed pipe": pipe, "full disk": full, "ascii": subprocess.DEVNULL}[broken]
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stderr.startswith("trained to the end\n")
    if broken != "full disk":  # there Python itself cannot flush stdout when it ends
        assert done.returncode == 0
        assert done.stderr == "trained to the end\n"
