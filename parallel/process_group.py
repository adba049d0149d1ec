"""Process group: join the ranks described by RANK, WORLD_SIZE and MASTER_*, and leave them."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

OPEN_FILES_BASE = 500  # besides connections: libraries, devices, loader workers, shards
OPEN_FILES_PER_RANK = 6  # of rank 0, which may be on any node; 5 were counted


@dataclass(frozen=True)
class RankInfo:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0


def collective_timeout(timeout_s: float) -> float:
    """The timeout of a collective in seconds, with which the ranks end within `timeout_s` after a failure."""
    return max(timeout_s / 2, timeout_s - 16)


def join_process_group(timeout_s: float) -> RankInfo:
    """Initialise torch.distributed from the environment: NCCL on GPUs, gloo on CPUs.

    NCCL's own watchdog, which ends a process without naming the missing rank, gets a longer timeout than watchdog.py.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set; start training with `msc train` or under torchrun")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    raise_open_file_limit(world_size)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend, seconds = "cpu:gloo,cuda:nccl", timeout_s + 60
    else:
        device, backend, seconds = torch.device("cpu"), "gloo", collective_timeout(timeout_s)
        keep_freed_memory()
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    return RankInfo(rank, world_size, device)


def raise_open_file_limit(world_size: int) -> None:
    """Raise the soft limit of open files where it is low (often 1024); ValueError if the hard one is too low.

    Every process group connects a rank to each other one, and the store on rank 0 has three connections per rank.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**20 if hard == resource.RLIM_INFINITY else hard
    needed = OPEN_FILES_BASE + OPEN_FILES_PER_RANK * world_size
    if most < needed:
        raise ValueError(
            f"a process may open {most} files here (ulimit -Hn), but {world_size} ranks need {needed}: raise the limit "
            "for jobs (limits.conf, or LimitNOFILE of slurmd)"
        )
    if soft != resource.RLIM_INFINITY and soft < (wanted := min(most, max(needed, 65536))):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep_freed_memory() -> None:
    """Make glibc's malloc keep what this process frees, as a GPU's allocator does; child processes are not affected.

    By default it returns large tensors to the system, and the next one costs a page fault per 4 KiB; the measured cost
    is in docs/benchmarks.md.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD (-1: never), M_MMAP_MAX of malloc.h
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, in place."""
    dist.all_reduce(values)
    return values
