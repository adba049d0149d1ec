"""Control plane: what ranks exchange besides tensors, by collectives or through torch.distributed's key-value store.

Background threads use the store only: the order of collectives must be the same on every rank, and a thread's is not.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
POLL_SECONDS = 0.05
STORE_TIMEOUT_S = 60.0


def gather_objects(value: T) -> list[T]:
    """A picklable value of every rank, in order of ranks. A collective."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank_0(function: Callable[[], T], slow: bool = False) -> T:
    """Call `function` on rank 0 and return its result on all ranks, or raise its error as ValueError. A collective.

    slow: the function may take longer than a collective's timeout.
    """
    key = run_on_rank_0(lambda: f"msc/rank-0/{uuid.uuid4().hex}") if slow else ""
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    if slow:
        store_barrier(connect_store(), key)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def store_barrier(store: dist.Store, key: str) -> None:
    """Wait without a timeout until every rank has called this with `key`: before a collective, after work that may
    take longer than its timeout on some ranks. The watchdog ends the wait for a rank that is lost."""
    store.add(key, 1)
    while store.add(key, 0) < dist.get_world_size():
        time.sleep(POLL_SECONDS)


def connect_store(timeout_s: float = STORE_TIMEOUT_S) -> dist.Store:
    """A new connection to the store at MASTER_ADDR and MASTER_PORT, for one thread."""
    address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def wait_for_keys(store: dist.Store, keys: Sequence[str], timeout_s: float) -> list[bytes]:
    """The values of `keys`, once all are set; TimeoutError names one that is not set in time."""
    deadline = time.monotonic() + timeout_s
    values = []
    for key in keys:
        while not store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{key} was not set in the store within {timeout_s:.0f} s; has that rank ended?")
            time.sleep(POLL_SECONDS)
        values.append(store.get(key))
    return values
