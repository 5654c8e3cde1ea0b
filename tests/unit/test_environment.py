"""Settings of the process."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
from kempnerforge.train.environment import raise_open_file_limit
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
raise_open_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE), hard)
"""


def test_open_file_limit_is_raised_to_what_is_allowed() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    soft, hard, hard_before = map(int, done.stdout.split())
    assert hard == hard_before
    assert soft == (min(hard, 1 << 16) if hard > 0 else 1 << 16)
