"""`msc` with faults: a program that tests start instead of it, and what it does to the ranks.

MSC_FAULTS is a JSON table:
    consumed: folder; every rank appends a line for each batch that it takes a step with, and one when it starts
    step_s: seconds that each step takes longer       chunk_s: seconds that each 8 kB of a checkpoint take longer
    nan: [rank, [clocks]]: that rank's inputs are NaN in the steps that begin there
    hang, fail: [rank, clock]: that rank sleeps for ever, or raises, instead of taking the step that begins there
    stop_at: clock of the batch at which rank 0 sends itself SIGTERM
    ahead: seconds that the clock of this process is ahead

No rank may request noise levels from another: training knows those of whole clips.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from msc.launch import cli
from msc.launch.processes import launcher

PROGRAM = "import sys, faults; sys.exit(faults.main())"


def main() -> int:
    launcher.PROGRAM = PROGRAM  # so that the ranks of a launcher are started with it, too
    faults = json.loads(os.environ["MSC_FAULTS"])
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    if rank is not None or sys.argv[sys.argv.index("--processes") + 1] == "1":  # not in a launcher
        install(faults, int(rank or 0))
    return cli.main()


def append(file: Path, line: dict) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def install(faults: dict, rank: int) -> None:
    import torch

    from msc.parallel.context_parallel import ShardedPastContext
    from msc.pretrain import train as training
    from msc.pretrain.checkpoints import async_writer

    now, true_time = {"clock": 0}, time.time
    if "ahead" in faults:
        time.time = lambda: true_time() + faults["ahead"]
    loader, call = training.loader, training.InputBuilder.__call__

    def loader_with_faults(*arguments, clock, clips, **options):
        file = Path(faults["consumed"], f"{rank}.jsonl")
        append(file, {"from": clock})
        for batch in loader(*arguments, clock=clock, clips=clips, **options):
            time.sleep(faults.get("step_s", 0))
            now["clock"], clock = clock, clock + clips
            if [rank, now["clock"]] == faults.get("hang"):
                time.sleep(1e6)
            if [rank, now["clock"]] == faults.get("fail"):
                raise RuntimeError("injected failure")
            append(file, {"clock": now["clock"], "samples": batch.samples})
            if now["clock"] == faults.get("stop_at") and rank == 0:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    def inputs_with_nan(feed, batch):
        inputs = call(feed, batch)
        if "nan" in faults and faults["nan"][0] == rank and now["clock"] in faults["nan"][1]:
            inputs.x[0, 0] = torch.nan
        return inputs

    class SlowHash:
        def __init__(self):
            self.sha = hashlib.sha256()

        def update(self, data):
            time.sleep(faults["chunk_s"])
            self.sha.update(data)

        def hexdigest(self):
            return self.sha.hexdigest()

    def refuse(*_):
        raise AssertionError("noise levels were refuse for")

    training.loader, training.InputBuilder.__call__ = loader_with_faults, inputs_with_nan
    ShardedPastContext.noise_levels = refuse
    if "chunk_s" in faults:
        async_writer.CHUNK, async_writer.hashlib = 8192, SimpleNamespace(sha256=SlowHash)
