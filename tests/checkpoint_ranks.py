"""Rank functions of test_checkpoint.py: checkpoints of a small model without DeepSpeed, on disks that fail."""

from __future__ import annotations

import hashlib
import resource
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group

from msc.pretrain.checkpoints import async_writer
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.checkpoints import format as checkpoint_format
from msc.pretrain.optimizer import OptimizerConfig, make_optimizer


def meta(step: int) -> checkpoint_directory.CheckpointMeta:
    config = {"train.clips": 80, "parallel.sp": 1, "parallel.zero.stage": 0}
    return checkpoint_directory.CheckpointMeta(step, 8, config=config, versions=checkpoint_format.library_versions())


def engine(value: float) -> SimpleNamespace:
    """As much of a stage 0 engine as checkpoints look at; its 70,000 parameters are all `value`."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 16))
    nn.utils.vector_to_parameters(torch.full((69904,), value), model.parameters())
    return SimpleNamespace(module=model, optimizer=make_optimizer(model, OptimizerConfig()))


def values(of) -> set[float]:
    return {float(v) for p in of.module.parameters() for v in p.detach().unique()}


def make_writer(run: Path, keep: int = 2) -> async_writer.CheckpointWriter:
    return async_writer.CheckpointWriter(run, checkpoint_format.CheckpointConfig(every=1, keep=keep), 60.0)


def write_beside(rank, ranks, folder):
    """Two saves on a disk that takes half a second, the weights changing meanwhile: seconds, and what was loaded."""
    init_process_group("gloo")
    async_writer.CHUNK, async_writer.hashlib = 1 << 16, SimpleNamespace(sha256=SlowHash)
    run, seconds = Path(folder), []
    out, source = make_writer(run), engine(1.0)
    for step in (1, 2):
        began = time.monotonic()
        out.save(source, meta(step))
        seconds.append(time.monotonic() - began)
        with torch.no_grad():
            for parameter in source.module.parameters():
                parameter.add_(1.0)
    unfinished = checkpoint_directory.latest(run)  # that of step 1, which the second save has waited for
    out.finish()
    target = engine(0.0)
    step = checkpoint_format.load_newest(run, target).step
    destroy_process_group()
    return seconds, unfinished.name, step, values(target)


class SlowHash:
    def __init__(self):
        self.sha = hashlib.sha256()

    def update(self, data):
        time.sleep(0.05)
        self.sha.update(data)

    def hexdigest(self):
        return self.sha.hexdigest()


def fail_on_one_rank(rank, ranks, folder):
    """Save with a disk that is full on rank 1 from the second save on until after the third; what each save did."""
    init_process_group("gloo")
    run, source, errors = Path(folder), engine(1.0), []
    out = make_writer(run)
    for step in (1, 2, 3, 4, 5):
        full = rank == 1 and step in (2, 3, 5)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else hard, hard))
        try:
            out.save(source, meta(step))
            errors.append("")
        except OSError as error:
            errors.append(str(error))
        out._join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        out.finish()
        errors.append("")
    except OSError as error:
        errors.append(str(error))
    destroy_process_group()
    return errors


def fail_on_rank_0(rank, ranks, folder):
    """Save with errors that are none of the disk's on rank 0, while publishing and then while pruning."""
    init_process_group("gloo")
    async_writer.SLOWEST = 10.0
    out, errors = make_writer(Path(folder)), []
    for step, name in ((1, "publish"), (2, "prune")):
        before = getattr(checkpoint_directory, name)
        setattr(checkpoint_directory, name, broken)
        out.save(engine(1.0), meta(step))
        errors.append(out._join())
        setattr(checkpoint_directory, name, before)
    destroy_process_group()
    return errors


def broken(*_):
    raise RuntimeError("stale handle")


def hash_slowly(rank, ranks, folder):
    """Load where rank 1 takes longer to read its files than a collective waits; the step that was loaded."""
    init_process_group("gloo", timeout=timedelta(seconds=3))
    digest = checkpoint_directory.sha256_of
    checkpoint_directory.sha256_of = lambda file: (time.sleep(5.0 if rank == 1 else 0.0), digest(file))[1]
    step = checkpoint_format.load_newest(Path(folder), engine(0.0)).step
    destroy_process_group()
    return step


def load_damaged(rank, ranks, folder):
    """What is loaded of checkpoints that hold their steps' numbers, or the error."""
    init_process_group("gloo")
    target = engine(0.0)
    try:
        result = (checkpoint_format.load_newest(Path(folder), target).step, values(target))
    except ValueError as error:
        result = (None, str(error))
    destroy_process_group()
    return result


def write_several(rank, ranks, folder, steps):
    init_process_group("gloo")
    out = make_writer(Path(folder), keep=9)
    for step in range(1, steps + 1):
        out.save(engine(float(step)), meta(step))
    out.finish()
    destroy_process_group()
