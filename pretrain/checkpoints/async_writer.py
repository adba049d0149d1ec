"""Writes checkpoints while training goes on: every rank the slices it holds, beside its training.

A checkpoint is written aside, synced, renamed, and `latest` moved last: a crash at any moment leaves the previous
one whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from msc.datasets.files import write_atomically
from msc.parallel import control_plane, deepspeed_zero

from . import directory as checkpoint_directory
from .directory import CheckpointMeta
from .exported_weights import safetensors_header
from .format import CheckpointConfig, say

CHUNK = 1 << 23  # bytes written at a time; writing and hashing them lets other threads run
SLOWEST = 3600.0  # seconds by which a rank's disk may be slower than another's; one that died ends training before
LAST_CHANCE = 3.0  # seconds for what is being written when another rank seems lost


def pinned(numel: int) -> Tensor:
    """fp32 in host memory that a GPU copies to while its host goes on.

    Not torch's own pinned memory, which comes in powers of two: up to twice as much. And not for children: of pinned
    pages every forked worker of a loader would get a copy.
    """
    pages = mmap.mmap(-1, 4 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    buffer, portable = torch.frombuffer(pages, dtype=torch.float32), 1
    if error := int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, portable)):
        say(f"{buffer.nbytes / 1e9:.1f} GB for checkpoints cannot be pinned (CUDA error {error}); copies take longer")
    return buffer


class Writer:
    """Writes a run's checkpoints while training goes on. Made by all ranks together; nothing else is a collective.

    `save` copies this rank's slices to host buffers, which are kept, and returns; a thread writes them and agrees
    with the other ranks' threads through the store. A write that fails is told at once on stderr, and the next
    `save` waits for its own; if that fails, too, or at `wait`, OSError is raised on every rank.
    """

    def __init__(self, run: Path, config: CheckpointConfig, timeout_s: float):
        self.run, self.config, self.timeout_s = run, config, timeout_s
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.session = control_plane.run_on_rank_0(self._begin)
        self.store = control_plane.connect_store(timeout_s)
        self._buffer: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._failure, self._begun = "", 0
        self.seconds = 0.0  # that the last write took
        self.step: int | None = None  # of the checkpoint last begun, or loaded

    def reserve(self, engine: Any) -> None:
        """Take the memory that checkpoints are copied to. At the start, because pinning many GB takes seconds, in
        which training would stand still at the first checkpoint."""
        numel = sum(value.numel() for piece in self._pieces(engine) for value in piece.state.values())
        self._buffer = pinned(numel) if torch.cuda.is_available() and numel else torch.empty(numel)

    def _pieces(self, engine: Any) -> list[deepspeed_zero.LocalSlice]:
        return deepspeed_zero.local_slices(engine, (self.rank, self.world))

    def _begin(self) -> str:
        checkpoint_directory.remove_unfinished(self.run)
        return uuid.uuid4().hex[:8]

    def save(self, engine: Any, meta: CheckpointMeta) -> dict[str, float]:
        """Begin a checkpoint of the engine's state at a step, if there is none yet; returns seconds for the metrics."""
        began = time.perf_counter()
        if self.writing and self.rank == 0:
            say(f"the checkpoint of step {self.step} is still being written; training waits for it")
        failed = self._join()
        step = meta.step
        if step == self.step and not failed:
            return {}
        seconds = {"saving/write_s": self.seconds} if self.seconds else {}
        layout = self._copy(engine)
        meta = replace(
            meta,
            adam_steps=deepspeed_zero.adam_steps(engine),
            world=self.world,
            parameters=deepspeed_zero.parameter_shapes(engine),
        )
        self.step, self._begun = step, self._begun + 1
        self._thread = threading.Thread(target=self._work, args=(layout, meta), name="checkpoint", daemon=True)
        self._thread.start()
        if failed:  # not twice in a row without stopping
            self.wait()
        return {**seconds, "saving/stall_s": time.perf_counter() - began}

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until what `save` began is on disk; OSError on every rank if it is not."""
        if failure := self._join():
            raise OSError(failure)

    def finish(self) -> None:
        """`wait` on all ranks together: none may end, and with rank 0 the store, before all know the outcome."""
        for failure in control_plane.gather_objects(self._join()):
            if failure:
                raise OSError(failure)

    def _join(self) -> str:
        if self._thread is not None:
            self._thread.join()
        return self._failure

    def leave(self, others_live: bool) -> None:
        """Before a failed run ends: give what is being written a last chance, a short one if a rank seems lost."""
        if self._thread is not None:
            self._thread.join(self.timeout_s if others_live else LAST_CHANCE)

    def _copy(self, engine: Any) -> dict[str, tuple[int, int]]:
        """Copy this rank's slices into the host buffer; where each begins and ends, in elements."""
        parts = [
            (f"{piece.name}|{piece.start}|{key}", value)
            for piece in self._pieces(engine)
            for key, value in piece.state.items()
        ]
        if self._buffer is None:
            self.reserve(engine)
        assert self._buffer is not None
        layout, at = {}, 0
        for name, value in parts:
            assert value.dtype == torch.float32
            layout[name] = (at, at + value.numel())
            self._buffer[at : at + value.numel()].copy_(value, non_blocking=True)
            at += value.numel()
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return layout

    # In the thread ---------------------------------------------------------------------------------------

    def _work(self, layout: dict[str, tuple[int, int]], meta: CheckpointMeta) -> None:
        began = time.perf_counter()
        try:
            self._failure = self._write(layout, meta)
        except Exception as error:  # also the store's, when another rank has ended: whatever it is, it must be told
            self._failure = f"rank {self.rank}: {error}"
        self.seconds = time.perf_counter() - began
        if self._failure:
            self._failure = (
                f"the checkpoint of step {meta.step} could not be written, earlier ones stay: {self._failure}"
            )
            if self.rank == 0:
                say(self._failure)

    def _write(self, layout: dict[str, tuple[int, int]], meta: CheckpointMeta) -> str:
        """Write this rank's file, and on rank 0 publish all of them; what went wrong, the same on every rank."""
        step = meta.step
        assert self._buffer is not None
        aside = (
            checkpoint_directory.checkpoints_dir(self.run)
            / f".{checkpoint_directory.checkpoint_name(step)}.writing-{self.session}"
        )
        report: dict[str, Any] = {"file": f"rank-{self.rank:05d}.safetensors"}
        try:
            aside.mkdir(parents=True, exist_ok=True)
            report["bytes"], report["sha256"] = write_slices(aside / report["file"], self._buffer, layout)
        except Exception as error:  # whatever it is, rank 0 waits for this report
            report["error"] = f"rank {self.rank}: {error}"
        topic = f"msc/checkpoint/{self.session}/{self._begun}"
        self.store.set(f"{topic}/{self.rank}", json.dumps(report))
        if self.rank != 0:
            (verdict,) = control_plane.wait_for_keys(
                self.store, [f"{topic}/verdict"], 2 * SLOWEST
            )  # rank 0 waits for all
            return verdict.decode()
        keys, failure = [f"{topic}/{rank}" for rank in range(self.world)], "rank 0 has ended"
        try:
            failure = self._publish(aside, meta, keys)
        except Exception as error:
            failure = f"rank 0: {error}"
        finally:  # the others wait for it
            if failure:
                shutil.rmtree(aside, ignore_errors=True)
            self.store.set(f"{topic}/verdict", failure)
        try:
            if not failure:
                checkpoint_directory.prune(self.run, step, self.config.keep, self.config.keep_every)
            for key in keys:
                self.store.delete_key(key)
        except Exception as error:  # the others know the verdict already: it stays
            say(f"cleaning up after the checkpoint of step {step} failed: {error}")
        return failure

    def _publish(self, aside: Path, meta: CheckpointMeta, keys: list[str]) -> str:
        """On rank 0: once all ranks have reported under `keys`, publish their files, or say what went wrong."""
        reports = [json.loads(told) for told in control_plane.wait_for_keys(self.store, keys, SLOWEST)]
        if failure := "; ".join(r["error"] for r in reports if "error" in r):
            return failure
        files, sizes = ({r["file"]: r[fact] for r in reports} for fact in ("sha256", "bytes"))
        write_atomically(aside / "meta.json", replace(meta, files=files, bytes=sizes).to_json().encode())
        checkpoint_directory.publish(self.run, aside, meta.step)
        return ""


def write_slices(path: Path, buffer: Tensor, layout: dict[str, tuple[int, int]]) -> tuple[int, str]:
    """Write slices of a contiguous float32 buffer as a safetensors file and sync it; its size in bytes and sha256.

    Not safetensors' own writer, which holds on to Python's lock and so would stop the training that goes on.
    """
    head = safetensors_header({name: (end - start,) for name, (start, end) in layout.items()})
    data = buffer.numpy().view(np.uint8).data
    sha = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in (head, data):
            left = memoryview(part)
            while len(left):
                written = file.write(left[:CHUNK])
                sha.update(left[:written])
                left = left[written:]
        os.fsync(file.fileno())
        return file.tell(), sha.hexdigest()
