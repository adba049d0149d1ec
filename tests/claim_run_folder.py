"""Rank functions of test_slurm.py: several processes that acquire one run folder; they return the error message."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from msc.pretrain.presets import preset
from msc.pretrain.tracking import heartbeat
from msc.pretrain.train import train
from msc.pretrain.training_start import TrainingStart


def each_for_itself(rank: int, ranks: int, run: Path) -> str:
    """Every process sees the run as free before the first of them writes."""
    heartbeat.SETTLE_S = 2.0  # on a busy machine
    check_not_training = heartbeat.check_not_training

    def check_and_meet(run: Path) -> None:
        check_not_training(run)
        run.with_name(f"{rank}.checked").touch()
        while len(list(run.parent.glob("*.checked"))) < ranks:
            time.sleep(0.01)

    heartbeat.check_not_training = check_and_meet
    return error_of(lambda: heartbeat.acquire_run(run, 1))


def as_one_run(rank: int, ranks: int, run: Path) -> str:
    return error_of(lambda: train(TrainingStart(preset("demo"), run)))


def error_of(start: Callable[[], object]) -> str:
    try:
        start()
    except ValueError as error:
        return str(error)
    return ""
