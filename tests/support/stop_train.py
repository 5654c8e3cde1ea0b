"""Run ``scripts/train.py`` with faults that a test has chosen, under a real launcher.

Each rank writes the file ``pid.RANK`` when it begins, and ``status.RANK`` when it ends by itself. A
rank that is killed, or that ends with ``os._exit``, writes no status.
"""

import atexit
import json
import os
import sys
from pathlib import Path

FAULTS = "KEMPNERFORGE_TEST_FAULTS"
"""JSON with names of functions of ``fault_injection.py`` and their arguments."""
MARKS = "KEMPNERFORGE_TEST_MARKS"
"""Folder of these files."""

_status: list[int] = []


def _leave_status(path: Path) -> None:
    path.write_text(str(_status[0]) if _status else "an exception")


def main() -> int:
    """Inject the faults, train, and record the status."""
    marks, rank = Path(os.environ[MARKS]), os.environ["RANK"]
    atexit.register(_leave_status, marks / f"status.{rank}")  # registered first, so that it is called last
    (marks / f"pid.{rank}").write_text(str(os.getpid()))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support import fault_injection

    from kempnerforge.cli.train import main as train

    for name, arguments in json.loads(os.environ[FAULTS]):
        getattr(fault_injection, name)(**arguments)
    _status.append(train())
    return _status[0]


if __name__ == "__main__":
    sys.exit(main())
