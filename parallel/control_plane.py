"""What all ranks agree on besides tensors: at the start through collectives, in background threads without them.

A background thread must not join the training's collectives: their order has to be the same on every rank, and a
thread runs when it likes. Threads agree through the key-value store that torch.distributed itself met by.
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
STORE_S = 60.0  # seconds that the store may take to answer


def gather_objects(value: T) -> list[T]:
    """A picklable value of every rank, in their order. A collective."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def run_on_rank_0(function: Callable[[], T], patient: bool = False) -> T:
    """What `function` returns on rank 0, which alone calls it; ValueError on all ranks if it failed. A collective.

    patient: it may take longer than a collective waits.
    """
    topic = run_on_rank_0(lambda: f"msc/first/{uuid.uuid4().hex}") if patient else ""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (ValueError, OSError) as error:
            box[1] = str(error)
    if patient:
        store_barrier(connect_store(STORE_S), topic)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]


def store_barrier(store: dist.Store, key: str) -> None:
    """Until every rank has called this with `key`, however long that takes: before a collective, after work that may
    take some ranks longer than its timeout. A rank that is lost meanwhile is found by watchdog.py."""
    store.add(key, 1)
    while store.add(key, 0) < dist.get_world_size():
        time.sleep(POLL_SECONDS)


def connect_store(timeout_s: float) -> dist.Store:
    """An own connection to the store at MASTER_ADDR and MASTER_PORT, for one thread of this rank."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )


def wait_for_keys(store: dist.Store, keys: Sequence[str], timeout_s: float) -> list[bytes]:
    """The values of all `keys`, once they are set; TimeoutError names one that is not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    values = []
    for key in keys:
        while not store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no word of {key} within {timeout_s:.0f} s; has that rank ended?")
            time.sleep(POLL_SECONDS)
        values.append(store.get(key))
    return values
