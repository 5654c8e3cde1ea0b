"""The ranks of one start find each other in a store that earlier starts have used."""

from __future__ import annotations

import datetime
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kempnerforge.distributed.agent_store import POLL_S, store_of_this_start

TIMEOUT = datetime.timedelta(seconds=60)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


def _join(server: TCPStore, rank: int, num_ranks: int) -> PrefixStore:
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=TIMEOUT)
    return store_of_this_start(client, rank=rank, num_ranks=num_ranks, timeout=TIMEOUT)


def _start(pool: ThreadPoolExecutor, server: TCPStore, ranks: list[int]) -> list[Future[PrefixStore]]:
    return [pool.submit(_join, server, rank, 3) for rank in ranks]


def test_store_of_this_start_second_has_new_keys(server: TCPStore) -> None:
    with ThreadPoolExecutor(3) as pool:
        for start in ("first", "second"):
            stores = [joining.result() for joining in _start(pool, server, [0, 1, 2])]
            assert not any(store.check(["address"]) for store in stores)
            stores[1].set("address", start)
            assert [store.get("address") for store in stores] == [start.encode()] * 3


def test_store_of_this_start_early_rank_waits(server: TCPStore) -> None:
    with ThreadPoolExecutor(3) as pool:
        for joining in _start(pool, server, [0, 1, 2]):
            joining.result()
        early = _start(pool, server, [1, 2])
        time.sleep(10 * POLL_S)
        assert not any(joining.done() for joining in early)
        (first,) = _start(pool, server, [0])
        first.result().set("address", "new")
        assert [joining.result().get("address") for joining in early] == [b"new"] * 2


def test_store_of_this_start_no_rank_0_times_out(server: TCPStore) -> None:
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=TIMEOUT)
    server.set("kempnerforge/start/prefix", "old")
    with pytest.raises(TimeoutError, match="rank 1 waited"):
        store_of_this_start(client, rank=1, num_ranks=2, timeout=datetime.timedelta(seconds=0.1))
