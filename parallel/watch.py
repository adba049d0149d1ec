"""Who is missing when a collective fails: every rank tells the others where it is, and they read it when stuck.

A collective that fails says "connection closed" or "timed out" on the ranks that waited, and nothing of the one
that they waited for. So each rank writes a beat, its step and its phase to the TCP store of the process group,
from a thread. A rank whose collective fails, or whose main thread stands still, reads what all have written, says
in one line who is silent, failed or behind, leaves the same line in the store for the others, and ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .exchange import first_line

GRACE = 5.0  # seconds in which a rank that learns of a failure may still find its own words
EXIT = 1
# torchrun keeps one store over its restarts
PREFIX = f"msc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
VERDICT = f"{PREFIX}/verdict"


@dataclass(frozen=True)
class Place:
    """Where a rank is. count: phases entered so far, in which all ranks agree; beat: grows while it lives."""

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = "starting"
    count: int = 0
    beat: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.phase}"


def verdict(before: dict[int, Place], now: dict[int, Place], size: int) -> str:
    """Who keeps the others waiting, from two readings some beats apart; "" if nobody stands out.

    First ranks that have gone silent; if none has, ranks that are behind.
    """
    absent = [rank for rank in range(size) if rank not in now]
    silent = [p for rank, p in now.items() if rank in before and p.beat == before[rank].beat]
    if absent or silent:
        names = [f"{p} is silent, last heard of in {p.where}" for p in silent]
        return "; ".join(names + [f"rank {rank} has never been heard of" for rank in absent])
    most = max(p.count for p in now.values())
    behind = [p for p in now.values() if p.count < most]
    return "; ".join(f"{p} is alive but stays behind in {p.where}" for p in behind)


class Watch:
    """This rank's place, told to the others from a thread; and a second thread that ends a rank that is stuck.

    timeout: seconds that a rank may stand still, or a neighbour be silent, before somebody must be missing.
    """

    def __init__(self, rank: int, size: int, timeout: float):
        self.size, self.timeout, self.interval = size, timeout, min(1.0, timeout / 10)
        self.place = Place(rank, socket.gethostname(), os.getpid())
        self._moved = self._answered = self._neighbour_beat_at = time.monotonic()
        self._neighbour: Place | None = None
        self._beats = 0
        self._heard: tuple[str, float] | None = None  # a verdict in the store, and when it was seen
        self._over = threading.Event()
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: a blocking call of the process group's must not hold up the beats.
        self._store = dist.TCPStore(
            *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(timeout, 1))
        )
        self._tell()
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True, name=f"watch-{target.__name__}").start()

    def at(self, step: int, phase: str) -> None:
        """Where the main thread is now. All ranks must call it in the same order."""
        self.place = replace(self.place, step=step, phase=phase, count=self.place.count + 1)
        self._moved = time.monotonic()

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends, and why."""
        reason = f"{type(error).__name__}: {first_line(error)}"
        self._announce(f"{self.place} failed in {self.place.where}: {reason}")
        self._linger()

    def explain(self, error: BaseException) -> str:
        """One line on a collective of this rank that failed; the others are told the same."""
        if self._over.is_set():  # the other thread is saying it
            time.sleep(GRACE)
        found = self._judge() or "all ranks answer and none is behind; they may have called different collectives"
        self._linger()
        return f"rank {self.place.rank}: {found}; waited for in {self.place.where}: {first_line(error)}"

    def end(self) -> None:
        self._over.set()

    # The store, from threads that may be stuck in it -----------------------------------------------------

    def _tell(self) -> None:
        self._beats += 1
        place = replace(self.place, beat=self._beats)  # a copy: the main thread moves on meanwhile
        self._store.set(f"{PREFIX}/{place.rank}", json.dumps(asdict(place)))

    def _read(self, rank: int) -> Place | None:
        key = f"{PREFIX}/{rank}"
        return Place(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _read_all(self) -> dict[int, Place]:
        return {rank: place for rank in range(self.size) if (place := self._read(rank)) is not None}

    def _hear(self) -> None:
        if self._heard is None and self._store.check([VERDICT]):
            self._heard = self._store.get(VERDICT).decode(), time.monotonic()

    def _beat(self) -> None:
        """Write this rank's place and look at the next rank's, until the end or the store's."""
        with suppress(RuntimeError):
            while not self._over.wait(self.interval):
                self._tell()
                neighbour = self._read((self.place.rank + 1) % self.size)
                if neighbour != self._neighbour:
                    self._neighbour, self._neighbour_beat_at = neighbour, time.monotonic()
                self._hear()
                self._answered = time.monotonic()

    def _look(self) -> None:
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if self._heard is not None and now - self._heard[1] > GRACE:
                return self._stop(self._heard[0])
            late = now - min(self._moved + GRACE, self._answered, self._neighbour_beat_at) > self.timeout
            if late and (found := self._judge()):
                return self._stop(found)
        return None

    def _judge(self) -> str:
        """A verdict of an earlier rank, or this one's own; left in the store for all."""
        before = self._bounded(self._read_all)
        for _ in range(5 if before else 0):
            if self._heard is not None:
                return self._heard[0]
            time.sleep(self.interval / 2)
            self._bounded(self._hear)
        now = self._bounded(self._read_all) if before else None
        if not before or not now:
            return "rank 0, which keeps the store, does not answer"
        found = verdict(before, now, self.size)
        if found:
            self._announce(found)
        return found

    def _announce(self, found: str) -> None:
        """Leave a verdict in the store."""
        self._heard = found, time.monotonic()
        self._bounded(lambda: self._store.set(VERDICT, found))

    def _linger(self) -> None:
        """Before the process ends: the store goes with rank 0, so let the others read first what is in it."""
        self.end()
        if self.place.rank == 0:
            time.sleep(3 * self.interval)

    def _bounded(self, action: Callable[[], Any]) -> Any:
        """What the store answers, None if it does not within a few beats."""
        answers: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(action())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(max(2.0, 2 * self.interval))
        return answers[0] if answers else None

    def _stop(self, found: str) -> None:
        """End the process: its main thread is stuck where no exception reaches it."""
        if not self._over.is_set():
            line = f"msc: rank {self.place.rank}: {found}; waited for in {self.place.where}"
            print(line, file=sys.stderr, flush=True)
            self._linger()
            os._exit(EXIT)


@contextmanager
def watching(rank: int, size: int, timeout: float) -> Iterator[Callable[[int, str], None]]:
    """Watch the ranks while the block runs; yields `at(step, phase)`, for all ranks to call in the same order.

    A collective that fails in the block becomes a ConnectionError that names who is missing, the same on all
    ranks; any other error is told to the others and passes through.
    """
    if size == 1:
        yield lambda step, phase: None
        return
    watch = Watch(rank, size, timeout)
    try:
        yield watch.at
    except BaseException as error:
        if not of_communication(error):
            watch.failed(error)
            raise
        raise ConnectionError(watch.explain(error)) from None
    finally:
        watch.end()


def of_communication(error: BaseException) -> bool:
    words = ("gloo", "NCCL", "Connection closed", "Timed out waiting", "Broken pipe")
    named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return named or isinstance(error, ConnectionError | dist.DistError)
