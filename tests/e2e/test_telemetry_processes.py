"""Telemetry in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.smoke


def test_telemetry_host_timing_imports_no_torch() -> None:
    code = """
import sys
import kempnerforge.telemetry.console, kempnerforge.telemetry.flops, kempnerforge.telemetry.jsonl
import kempnerforge.telemetry.wandb_sink
from kempnerforge.telemetry.spans import Spans
Spans("cpu")
assert "torch" not in sys.modules and "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
