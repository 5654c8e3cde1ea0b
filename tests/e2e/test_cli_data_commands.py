"""``kempnerforge data`` starts without torch; unit/test_cli_data_errors.py has what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.smoke


def test_data_command_imports_no_torch():
    code = "import sys, kempnerforge.cli.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
