"""Checkpoint format: slices of parameters that any number of ranks and any ZeRO stage can load.

A slice is `name|start|key` -> flat fp32 values of one parameter's weight, Adam moment or average from element `start`
on. Loading at another world size or stage looks up other slices.
"""

from __future__ import annotations

import platform
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from msc.parallel import control_plane, deepspeed_zero

from ..model.exported_weights import shape_differences
from . import directory as checkpoint_directory
from .directory import CheckpointMeta

log = getLogger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """every: optimizer steps between checkpoints (one is always written at the end). keep: how many of the last to
    keep; keep_every: those of every such step are kept as well (0: none)."""

    every: int = 500
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every ({self.every}) and checkpoint.keep ({self.keep}) must be at least 1")
        if self.keep_every < 0 or self.keep_every % self.every:
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every}; it must be 0 or a multiple of checkpoint.every "
                f"({self.every}), or no checkpoint is written at those steps"
            )


def library_versions() -> dict[str, str]:
    """Versions that must stay the same for a resumed run to be bit-identical."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "deepspeed", "numpy", "safetensors")
    }


def resume_differences(meta: CheckpointMeta | None, clips: int, order: dict[str, Any]) -> list[str]:
    """What keeps a resumed run from being bit-identical, or from seeing the same clips.

    order: settings on which the order of clips depends, beside the number of clips.
    """
    if meta is None:
        return []
    texts, then, now = [], meta.versions, library_versions()
    if changed := [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]:
        texts.append(f"other versions than before, equal to rounding only: {', '.join(changed)}")
    values = {"the number of training clips": (meta.clips or clips, clips)}
    values |= {name: (meta.config.get(name, value), value) for name, value in order.items()}
    return texts + [
        f"{name} is {value}, and was {before} when the checkpoint was written: the order of clips is another from "
        "here on, and clips of this epoch may come again or not at all"
        for name, (before, value) in values.items()
        if before != value
    ]


def load_newest(run: Path, engine: Any) -> CheckpointMeta | None:
    """Load the newest intact checkpoint on all ranks; None if the run has none.

    Damaged ones are logged and renamed, and the one before is used. ValueError if none is intact.
    """
    damaged: list[tuple[Path, list[str]]] = []
    key, candidates = control_plane.run_on_rank_0(
        lambda: (f"msc/load/{uuid.uuid4().hex}", checkpoint_directory.resume_candidates(run))
    )
    store = control_plane.connect_store()
    for path in candidates:
        own = checkpoint_directory.verify(path, (dist.get_rank(), dist.get_world_size()))
        control_plane.store_barrier(store, f"{key}/{path.name}")  # hashing may take longer than a collective waits
        if defects := sorted({defect for defects in control_plane.gather_objects(own) for defect in defects}):
            damaged.append((path, defects))
            continue

        def set_damaged_aside(intact: Path = path) -> None:
            for one, defects in damaged:
                name = checkpoint_directory.rename_aside(one, "damaged").name
                log.warning("%s; kept as %s, training resumes from %s", "; ".join(defects), name, intact.name)
            if damaged:
                checkpoint_directory.set_latest(run, intact)

        control_plane.run_on_rank_0(set_damaged_aside)
        return load(path, engine)
    if damaged:
        defects = [defect for _, defects in damaged for defect in defects]
        raise ValueError(f"no checkpoint of {run} is intact: {'; '.join(defects)}")
    log.info("%s has no checkpoint yet: training begins at the first step", run)
    return None


def load(path: Path, engine: Any) -> CheckpointMeta:
    """Restore weights, moments and averages into an engine of any world size and stage."""
    with ParameterReader(path) as reader:
        meta = reader.meta
        if differences := shape_differences(meta.parameters, deepspeed_zero.parameter_shapes(engine)):
            raise ValueError(f"{path} does not match the model: {differences}")
        for part in deepspeed_zero.local_slices(engine):
            for key, value in part.state.items():
                value.copy_(reader.read(part.name, key, part.start, part.numel))
    deepspeed_zero.set_adam_steps(engine, meta.adam_steps)
    deepspeed_zero.copy_masters_to_model(engine)
    return meta


class ParameterReader:
    """Random access to a checkpoint's parameters without loading it whole; it is not pruned while this is open."""

    def __init__(self, path: Path):
        self._stack = ExitStack()
        self._stack.enter_context(checkpoint_directory.lock_for_reading(path))
        self.meta = CheckpointMeta.read(path)
        self._slices: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        for file in self.meta.files:
            opened = self._stack.enter_context(safe_open(path / file, framework="pt"))
            for tensor in opened.keys():  # noqa: SIM118 - not a dict
                name, start, key = tensor.split("|")
                self._slices[name, key].append((int(start), opened, tensor))

    def __enter__(self) -> ParameterReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter's "weight", "exp_avg", "exp_avg_sq" or "ema"."""
        out, filled = torch.empty(numel), 0
        for first, opened, tensor in self._slices[name, key]:
            part = opened.get_slice(tensor)
            a, b = max(start, first), min(start + numel, first + part.get_shape()[0])
            if a < b:
                out[a - start : b - start] = part[a - first : b - first]
                filled += b - a
        if filled != numel:
            raise ValueError(f"the checkpoint holds {filled} of {numel} values of {name} ({key})")
        return out

    def tensor(self, name: str, which: str = "ema") -> Tensor:
        """A whole parameter in fp32: "ema" averaged or "raw" as trained."""
        shape = torch.Size(self.meta.parameters[name])
        return self.read(name, {"raw": "weight"}.get(which, which), 0, shape.numel()).view(shape)


def weights(path: Path, which: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """All parameters of a checkpoint, one at a time, in fp32: "ema" averaged or "raw" as trained."""
    with ParameterReader(path) as reader:
        for name in reader.meta.parameters:
            yield name, reader.tensor(name, which)
