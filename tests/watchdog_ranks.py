"""Rank program of test_watchdog.py: takes steps with the other ranks until a fault on rank 1."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from msc.parallel import process_group, watchdog
from msc.parallel.consistency import check_consistency
from msc.parallel.progress import Progress
from msc.parallel.watchdog import watch_ranks


def main(what: str, timeout: float) -> None:
    if what == "slow":
        watchdog.GRACE = 0.5
    world = process_group.join_process_group(60)
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    progress = Progress()
    with watch_ranks(world.rank, world.world_size, timeout, progress):
        check_consistency(
            {"optimizer.lr": 0.2 if what == "differ" and world.rank == 1 else 0.1, "torch": torch.__version__}
        )
        for step in range(1000):
            progress.at(step, "reading clips")
            if world.rank == 1 and step == 3:
                time.sleep(1.0)  # a heartbeat, so that the others know this step
                print(f"at {time.time()}", flush=True)
                happen(what)
            if what == "slow" and step == 1:  # longer than the timeout and the grace, but no rank waits so long
                time.sleep(timeout + (4.5 if world.rank == 0 else 2.5))
            progress.at(step, "backward")
            dist.all_reduce(torch.ones(1), group=group)
            if what == "slow" and step == 2:
                break
    process_group.leave_process_group()


def happen(what: str) -> None:
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "stuck":
        time.sleep(1000)
    if what == "held":  # a C call that keeps the interpreter lock
        ctypes.PyDLL(None).sleep(20)
    if what == "failed":
        raise ValueError("clip 17 is broken")


if __name__ == "__main__":
    try:
        main(sys.argv[1], float(sys.argv[2]))
    except Exception as error:
        print(f"msc: {error}", file=sys.stderr, flush=True)
        os._exit(1)
