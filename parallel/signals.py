"""Signals that ask a run to stop: collected, so that the work in hand can be finished and saved."""

import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def collect_signals(interrupting: Collection[int] = ()) -> Iterator[list[int]]:
    """Collect STOP_SIGNALS in a list instead of dying from them; the second of a kind in `interrupting` raises
    KeyboardInterrupt."""
    received: list[int] = []

    def handler(number: int, _: Any) -> None:
        received.append(number)
        if number in interrupting and received.count(number) > 1:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} came twice")

    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)
