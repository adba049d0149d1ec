"""Asynchronous checkpoint writer: every rank copies its slices to host memory, and a thread writes them to disk.

Files are written to a hidden folder and synced, the folder is renamed, and `latest` moved last: a crash at any moment
leaves the previous checkpoint intact.
"""

from __future__ import annotations

import hashlib
import json
import logging
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

from msc.parallel import control_plane, deepspeed_zero

from ..model.exported_weights import safetensors_header
from ..run_folder import RunFolder
from . import directory as checkpoint_directory
from .directory import CheckpointMeta
from .format import CheckpointConfig

log = logging.getLogger(__name__)
Layout = dict[str, tuple[int, int]]  # of a buffer: first element and end of every slice

CHUNK = 1 << 23  # bytes written at a time; other threads run while a chunk is written and hashed
SLOWEST = 3600.0  # seconds by which a rank's disk may be slower than another's; a rank that died ends training before
LAST_CHANCE = 3.0  # seconds to finish a write when another rank seems lost


def pinned_buffer(numel: int) -> Tensor:
    """fp32 host memory that a GPU copies to asynchronously.

    Not torch's own pinned memory, which comes in powers of two, and not inherited by forked loader workers, each of
    which would get a copy of pinned pages.
    """
    pages = mmap.mmap(-1, 4 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    buffer, portable = torch.frombuffer(pages, dtype=torch.float32), 1
    if error := int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, portable)):
        log.warning(
            "%.1f GB for checkpoints cannot be pinned (CUDA error %d): slower copies", buffer.nbytes / 1e9, error
        )
    return buffer


class CheckpointWriter:
    """Writes a run's checkpoints during training. All ranks create it together; `finish` is the only other collective.

    The ranks' threads coordinate through the store. A failed write is logged at once, and the next `save` waits for its
    own; if that fails, too, or the last one does, OSError is raised on every rank.
    """

    def __init__(self, run: Path, config: CheckpointConfig, timeout_s: float):
        def begin() -> str:
            for pattern in (".step-*.writing*", ".step-*.old"):  # what a killed run was writing
                for folder in RunFolder(run).checkpoints.glob(pattern):
                    shutil.rmtree(folder, ignore_errors=True)
            return uuid.uuid4().hex[:8]

        self.run, self.config, self.timeout_s = run, config, timeout_s
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.session = control_plane.run_on_rank_0(begin)
        self.store = control_plane.connect_store(timeout_s)
        self._buffer: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._failure, self._saves = "", 0
        self.seconds = 0.0  # of the last write
        self.step: int | None = None  # of the checkpoint last begun, or loaded

    def reserve(self, engine: Any) -> Tensor:
        """The host buffer, allocated at the first call: pinning many GB takes seconds."""
        if self._buffer is None:
            numel = sum(value.numel() for _, value in self._slices(engine))
            self._buffer = pinned_buffer(numel) if torch.cuda.is_available() and numel else torch.empty(numel)
        return self._buffer

    def _slices(self, engine: Any) -> list[tuple[str, Tensor]]:
        parts = deepspeed_zero.local_slices(engine, (self.rank, self.world_size))
        return [(f"{part.name}|{part.start}|{key}", value) for part in parts for key, value in part.state.items()]

    def save(self, engine: Any, meta: CheckpointMeta) -> dict[str, float]:
        """Begin a checkpoint of the engine's state, if there is none of this step; returns seconds for the metrics."""
        began = time.perf_counter()
        if self.writing:
            log.info("the checkpoint of step %d is still being written; training waits for it", self.step)
        failed = self._join()
        if meta.step == self.step and not failed:
            return {}
        metrics = {"saving/write_s": self.seconds} if self.seconds else {}

        buffer, layout, end = self.reserve(engine), {}, 0
        for name, value in self._slices(engine):
            assert value.dtype == torch.float32
            layout[name] = start, end = end, end + value.numel()
            buffer[start:end].copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        steps, shapes = deepspeed_zero.adam_steps(engine), deepspeed_zero.parameter_shapes(engine)
        meta = replace(meta, adam_steps=steps, world=self.world_size, parameters=shapes)

        self.step, self._saves = meta.step, self._saves + 1
        self._thread = threading.Thread(target=self._work, args=(buffer, layout, meta), name="checkpoint", daemon=True)
        self._thread.start()
        if failed and (failure := self._join()):  # not twice in a row without stopping
            raise OSError(failure)
        return {**metrics, "saving/stall_s": time.perf_counter() - began}

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. A collective: no rank may end, and with rank 0 the store, before
        all know the outcome."""
        for failure in control_plane.gather_objects(self._join()):
            if failure:
                raise OSError(failure)

    def _join(self) -> str:
        if self._thread is not None:
            self._thread.join()
        return self._failure

    def wait_after_failure(self, others_live: bool) -> None:
        """Before a failed run ends, wait for the last checkpoint; only briefly if a rank seems lost."""
        if self._thread is not None:
            self._thread.join(self.timeout_s if others_live else LAST_CHANCE)

    # In the thread ---------------------------------------------------------------------------------------

    def _work(self, buffer: Tensor, layout: Layout, meta: CheckpointMeta) -> None:
        began = time.perf_counter()
        try:
            failure = self._write(buffer, layout, meta)
        except Exception as error:  # any, also the store's when another rank has ended: training must know
            failure = f"rank {self.rank}: {error}"
        self.seconds = time.perf_counter() - began
        self._failure = (
            failure and f"the checkpoint of step {meta.step} could not be written, earlier ones stay: {failure}"
        )
        if failure and self.rank == 0:
            log.warning(self._failure)

    def _write(self, buffer: Tensor, layout: Layout, meta: CheckpointMeta) -> str:
        """Write this rank's file, and on rank 0 publish all of them; returns the failure, the same on every rank."""
        name = f".{checkpoint_directory.checkpoint_name(meta.step)}.writing-{self.session}"
        folder = RunFolder(self.run).checkpoints / name
        report: dict[str, Any] = {"file": f"rank-{self.rank:05d}.safetensors"}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report["bytes"], report["sha256"] = write_slices(folder / report["file"], buffer, layout)
        except Exception as error:  # any: rank 0 waits for this report
            report["error"] = f"rank {self.rank}: {error}"
        key = f"msc/checkpoint/{self.session}/{self._saves}"
        self.store.set(f"{key}/{self.rank}", json.dumps(report))
        if self.rank != 0:
            return control_plane.wait_for_keys(self.store, [f"{key}/outcome"], 2 * SLOWEST)[0].decode()
        keys, failure = [f"{key}/{rank}" for rank in range(self.world_size)], "rank 0 has ended"
        try:
            reports = [json.loads(text) for text in control_plane.wait_for_keys(self.store, keys, SLOWEST)]
            failure = "; ".join(report["error"] for report in reports if "error" in report)
            if not failure:
                files, sizes = ({report["file"]: report[fact] for report in reports} for fact in ("sha256", "bytes"))
                replace(meta, files=files, bytes=sizes).write(folder)
                checkpoint_directory.publish(self.run, folder, meta.step)
        except Exception as error:
            failure = f"rank 0: {error}"
        finally:  # the others wait for it
            if failure:
                shutil.rmtree(folder, ignore_errors=True)
            self.store.set(f"{key}/outcome", failure)
        try:
            if not failure:
                checkpoint_directory.prune(self.run, meta.step, self.config.keep, self.config.keep_every)
            for key in keys:
                self.store.delete_key(key)
        except Exception as error:  # the others have the outcome already
            log.warning("cleaning up after the checkpoint of step %d failed: %s", meta.step, error)
        return failure


def write_slices(path: Path, buffer: Tensor, layout: Layout) -> tuple[int, str]:
    """Write slices of a contiguous float32 buffer as a safetensors file and sync it; its size in bytes and sha256.

    safetensors' own writer would hold Python's interpreter lock, and training with it.
    """
    header = safetensors_header({name: (end - start,) for name, (start, end) in layout.items()})
    sha = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in (header, buffer.numpy().view(np.uint8).data):
            left = memoryview(part)
            while len(left):
                written = file.write(left[:CHUNK])
                sha.update(left[:written])
                left = left[written:]
        os.fsync(file.fileno())
        return file.tell(), sha.hexdigest()
