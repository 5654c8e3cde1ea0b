"""The store of torchrun, apart from what an earlier start of the ranks has written into it.

torchrun keeps one store for all restarts (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE``), and torch puts
the addresses of the ranks under the same keys each time. A rank that is early reads the address of
a killed one, and all ranks wait until a time-out. So the ranks of a start agree on a prefix first.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

POLL_S = 0.02
_PREFIX = "kempnerforge/start"


def store_of_this_start(
    store: Store, *, rank: int, num_ranks: int, timeout: datetime.timedelta
) -> PrefixStore:
    """Return ``store`` under a prefix that only the ranks of this start use.

    Rank 0 publishes a new prefix, every other rank answers with a number of its own, and rank 0
    publishes all answers. A prefix whose answers lack a rank's number is that of an earlier start.

    Collective: all ranks. Blocks: until all ranks have answered. Raises TimeoutError, or
    torch.distributed.DistStoreError on rank 0, after ``timeout``.
    """
    if rank == 0:
        prefix = uuid.uuid4().hex
        store.set(f"{_PREFIX}/prefix", prefix)
        answers = [store.get(f"{_PREFIX}/{prefix}/{other}").decode() for other in range(1, num_ranks)]
        store.set(f"{_PREFIX}/{prefix}/answers", json.dumps(answers))
        return PrefixStore(f"{_PREFIX}/{prefix}", store)
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    answered = ""
    while time.monotonic() < deadline:
        prefix = store.get(f"{_PREFIX}/prefix").decode()
        if prefix != answered:
            store.set(f"{_PREFIX}/{prefix}/{rank}", own)
            answered = prefix
        answers = f"{_PREFIX}/{prefix}/answers"
        if store.check([answers]) and own in json.loads(store.get(answers)):
            return PrefixStore(f"{_PREFIX}/{prefix}", store)
        time.sleep(POLL_S)
    raise TimeoutError(f"rank {rank} waited {timeout} for rank 0 at the start")
