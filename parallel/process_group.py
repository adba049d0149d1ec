"""Join the world of processes that RANK, WORLD_SIZE and MASTER_* describe, and leave it."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

OPEN_FILES_BASE = 500  # that a rank has open besides its connections: libraries, devices, loader workers, shards
OPEN_FILES_PER_RANK = 6  # that each rank of the world costs the first one; 5 were counted. Any node may be the first's


@dataclass(frozen=True)
class RankInfo:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0


def collective_timeout(timeout_s: float) -> float:
    """Seconds that a collective may wait, so that what follows a failure is over after `timeout_s`."""
    return max(timeout_s / 2, timeout_s - 16)


def join_process_group(timeout_s: float) -> RankInfo:
    """Initialise torch.distributed from the environment: NCCL on GPUs, gloo on CPUs.

    A collective that some rank does not join in time fails on the others, and they end within `timeout_s`. NCCL's
    own watchdog, which ends a process without a word on who is missing, gets longer: watchdog.py comes first.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set; start training with `msc train` or under torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    raise_open_file_limit(size)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend, seconds = "cpu:gloo,cuda:nccl", timeout_s + 60
    else:
        device, backend, seconds = torch.device("cpu"), "gloo", collective_timeout(timeout_s)
        keep_freed_memory()
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    return RankInfo(rank, size, device)


def raise_open_file_limit(size: int) -> None:
    """Raise this process's limit of open files where it is low; ValueError if that is too few for `size` ranks.

    Every process group is a connection to each of its ranks, and the first rank keeps a store to which all others
    connect three times: some 5 for each rank there. Many systems begin with 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**20 if hard == resource.RLIM_INFINITY else hard
    needed = OPEN_FILES_BASE + OPEN_FILES_PER_RANK * size
    if most < needed:
        raise ValueError(
            f"a process may open {most} files here (ulimit -Hn), but {size} ranks need {needed}: raise the limit for "
            "jobs (limits.conf, or LimitNOFILE of slurmd)"
        )
    if soft != resource.RLIM_INFINITY and soft < (enough := min(most, max(needed, 65536))):
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def keep_freed_memory() -> None:
    """Let this process keep what it frees, as the allocator on a GPU does; only glibc is asked.

    It otherwise returns every large tensor to the system at once, and the next one costs a page fault every 4 KiB;
    docs/benchmarks.md says what that was measured to cost. Processes started from here are not affected.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD (-1: never), M_MMAP_MAX of malloc.h
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def total(value: float, device: torch.device) -> float:
    """Sum of a number over all ranks, in float64."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a small tensor over all ranks, in place."""
    dist.all_reduce(values)
    return values
