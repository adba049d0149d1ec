"""Progress of a process: the step and phase that its main thread is in, for the watchdog and the heartbeat file."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """count: phases entered before, the same on all ranks. since: Unix time; entered: the same on a monotonic clock."""

    step: int = 0
    name: str = "starting"
    count: int = 0
    since: float = field(default_factory=time.time)
    entered: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"step {self.step}, {self.name}"


class Progress:
    """The main thread calls `at`; other threads read `phase`, which is replaced as a whole."""

    def __init__(self) -> None:
        self.phase = Phase()

    def at(self, step: int, name: str) -> None:
        """Enter a phase. All ranks must enter the same phases in the same order."""
        self.phase = Phase(step, name, self.phase.count + 1)
