"""Runs a function in several real processes that communicate over gloo, and returns the result of each."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """`[function(rank, ranks, *arguments) for rank in ...]`, each in its own process; raises what a rank raised."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one, (function, ranks, free_port(), folder, arguments), nprocs=ranks, join=True)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _one(rank: int, function: Callable, ranks: int, port: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        result = function(rank, ranks, *arguments)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(result, Path(folder) / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
    until = time.monotonic() + 30  # the store goes with the first rank, and another's thread may still ask it
    while time.monotonic() < until and not all((Path(folder) / f"{r}.pt").exists() for r in range(ranks)):
        time.sleep(0.02)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of torch's that are still there at an orderly end may abort it, about once in a hundred
