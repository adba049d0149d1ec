"""What a process that wants to train in a run folder is told; run by test_slurm.py in several at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from msc.pretrain.presets import preset
from msc.pretrain.requests import TrainingStart
from msc.pretrain.tracking import heartbeat
from msc.pretrain.train import train


def each_for_itself(rank: int, ranks: int, run: Path) -> str:
    """All have found the run free before the first of them writes."""
    heartbeat.SETTLE_S = 2.0  # on a busy machine
    check_free = heartbeat.check_not_training

    def check_and_meet(run: Path, say: Callable[[str], None]) -> None:
        check_free(run, say)
        run.with_name(f"{rank}.checked").touch()
        while len(list(run.parent.glob("*.checked"))) < ranks:
            time.sleep(0.01)

    heartbeat.check_not_training = check_and_meet
    return told(lambda: heartbeat.acquire_run(run, 1, print))


def as_one_run(rank: int, ranks: int, run: Path) -> str:
    return told(lambda: train(TrainingStart(preset("demo"), run)))


def told(start: Callable[[], object]) -> str:
    try:
        start()
    except ValueError as error:
        return str(error)
    return ""
