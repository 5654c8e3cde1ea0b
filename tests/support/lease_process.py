"""A process that takes leases, controlled by JSON lines on its standard input. Started by ``test_lease.py``.

{"do": "acquire", "dir": PATH, ...}   -> {"attempt": 3, "took_over": "...", ...} or {"error": ...}
{"do": "check"}, {"do": "release"}    -> {} or {"error": "LeaseLostError", "text": "..."}
{"do": "lost"}                        -> {"lost": "..."}
{"do": "rename", "from": A, "to": B}  -> {} or {"error": ...}
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.run import lease
from kempnerforge.checkpoint.run.lease import Lease

held: Lease | None = None


def do(request: dict[str, Any]) -> dict[str, Any]:
    global held
    what = request.pop("do")
    if what == "acquire":
        logged = io.StringIO()
        lease.log.handlers = [logging.StreamHandler(logged)]
        held = lease.acquire(Path(request.pop("dir")), **request)
        return {"attempt": held.attempt, "took_over": held.took_over, "logged": logged.getvalue()}
    if what == "rename":
        fsio.publish(Path(request["from"]), Path(request["to"]))
        return {}
    assert held is not None
    if what == "lost":
        return {"lost": held.lost}
    (held.check if what == "check" else held.release)()
    return {}


if __name__ == "__main__":
    # Looks are cheap in this test. On a shared file system they are less frequent.
    lease._LOOK_EVERY_S = 0.02
    # No power failure happens in a test, and a sync that waits for other writers would make a live
    # holder look dead.
    os.fsync = os.fdatasync = lambda _fd: None
    for line in sys.stdin:
        try:
            answer = do(json.loads(line))
        except Exception as error:  # noqa: BLE001 - the test checks it
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)
    os._exit(0)
