"""Checkpoints that any world can read: what is in them, and loading them.

A slice is `name|start|key` -> flat fp32 values of one parameter's weight, Adam moment or average from element
`start` on, so that loading at another number of ranks or ZeRO stage only looks up other slices. Writing them
beside training: async_writer.py. Which there are, and whether they are whole: directory.py.
"""

from __future__ import annotations

import platform
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from msc.parallel import control_plane, deepspeed_zero

from . import directory as checkpoint_directory
from .directory import CheckpointMeta, latest

__all__ = ["CheckpointConfig", "ParameterReader", "latest", "load", "load_newest", "weights"]

STORE_S = 60.0  # seconds that the store may take to answer


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
    """Of what takes part in the numbers: bit-identical continuation needs the same."""
    names = ("torch", "deepspeed", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def resume_differences(before: CheckpointMeta | None, clips: int, order: dict[str, Any] | None = None) -> list[str]:
    """What keeps a resumed run from being the same to the last bit, or from seeing the same clips.

    order: settings that the order of clips depends on, beside the number of clips.
    """
    if before is None:
        return []
    then, now, found = before.versions, library_versions(), []
    if other := [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]:
        found.append(f"other versions than before, equal to rounding only: {', '.join(other)}")
    if (held := before.clips) not in (None, clips):
        found.append(
            f"the shards hold {clips} clips to train on, and held {held} when the checkpoint was written: the order is "
            "another from here on, and clips of this epoch may come again or not at all"
        )
    for name, value in (order or {}).items():
        if (held := before.config.get(name, value)) != value:
            found.append(
                f"{name} is {value}, and was {held} when the checkpoint was written: the order of clips is another "
                "from here on, and clips of this epoch may come again or not at all"
            )
    return found


def say(text: str) -> None:
    print(f"msc: {text}", file=sys.stderr, flush=True)


def load_newest(run: Path, engine: Any) -> CheckpointMeta | None:
    """Load the newest whole checkpoint on all ranks: what was saved with it; None if there is none.

    One that is damaged is named, with the reason, and the one before it is taken. ValueError if none is whole.
    """
    bad: list[tuple[Path, list[str]]] = []
    topic, there = control_plane.run_on_rank_0(
        lambda: (f"msc/load/{uuid.uuid4().hex}", checkpoint_directory.resume_candidates(run))
    )
    store = control_plane.connect_store(STORE_S)
    for path in there:
        share = checkpoint_directory.verify(path, (dist.get_rank(), dist.get_world_size()))
        control_plane.store_barrier(store, f"{topic}/{path.name}")  # hashing may take longer than a collective waits
        shares = control_plane.gather_objects(share)
        if problems := sorted({problem for share in shares for problem in share}):
            bad.append((path, problems))
            continue
        control_plane.run_on_rank_0(lambda: _pass_over(run, bad, path))  # noqa: B023 - called at once
        return load(path, engine)
    if bad:
        raise ValueError(
            f"no checkpoint of {run} is whole: " + "; ".join(problem for _, problems in bad for problem in problems)
        )
    if dist.get_rank() == 0:
        say(f"{run} has no checkpoint yet: training begins at the first step")
    return None


def _pass_over(run: Path, bad: list[tuple[Path, list[str]]], good: Path) -> None:
    """Say which checkpoints are damaged and what is used instead, and put them out of the way."""
    for path, problems in bad:
        moved = checkpoint_directory.rename_aside(path, "damaged")
        say(f"{'; '.join(problems)}; kept as {moved.name}, training goes on from {good.name}")
    if bad:
        checkpoint_directory.set_latest(run, good)


def load(path: Path, engine: Any) -> CheckpointMeta:
    """Restore weights, moments and averages into an engine of any world size and stage; returns what was saved."""
    meta = CheckpointMeta.read(path)
    expected = meta.parameters
    missing = expected.keys() ^ {name for name, p in engine.module.named_parameters() if p.requires_grad}
    if missing:
        raise ValueError(f"{path} and the model do not have the same parameters: {sorted(missing)[0]}")
    with ParameterReader(path, meta) as slices:
        for piece in deepspeed_zero.local_slices(engine):
            if expected.get(piece.name) != piece.shape:
                raise ValueError(
                    f"{path} holds {piece.name} with shape {expected.get(piece.name)}, the model has {piece.shape}"
                )
            for key, value in piece.state.items():
                value.copy_(slices.read(piece.name, key, piece.start, piece.numel))
    deepspeed_zero.set_adam_steps(engine, meta.adam_steps)
    deepspeed_zero.copy_masters_to_model(engine)
    return meta


class ParameterReader:
    """Random access to a checkpoint's parameters without loading it whole."""

    def __init__(self, path: Path, meta: CheckpointMeta):
        self._stack = ExitStack()
        self._where: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        for file in meta.files:
            opened = self._stack.enter_context(safe_open(path / file, framework="pt"))
            for tensor in opened.keys():  # noqa: SIM118 - not a dict
                name, start, key = tensor.split("|")
                self._where[name, key].append((int(start), opened, tensor))

    def __enter__(self) -> ParameterReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter's "weight", "exp_avg", "exp_avg_sq" or "ema"."""
        out = torch.empty(numel)
        filled = 0
        for first, opened, tensor in self._where[name, key]:
            part = opened.get_slice(tensor)
            a, b = max(start, first), min(start + numel, first + part.get_shape()[0])
            if a < b:
                out[a - start : b - start] = part[a - first : b - first]
                filled += b - a
        if filled != numel:
            raise ValueError(f"the checkpoint holds {filled} of the {numel} values asked of {name} ({key})")
        return out


@contextmanager
def open_weights(path: Path, which: str = "ema") -> Iterator[Callable[[str], Tensor]]:
    """While open, reads any whole parameter of a checkpoint in fp32: "ema" averaged or "raw" as trained."""
    meta = CheckpointMeta.read(path)
    with ParameterReader(path, meta) as slices:

        def read(name: str) -> Tensor:
            shape = torch.Size(meta.parameters[name])
            return slices.read(name, {"raw": "weight"}.get(which, which), 0, shape.numel()).view(shape)

        yield read


def weights(path: Path, which: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """All parameters of a checkpoint, one at a time, in fp32: "ema" averaged or "raw" as trained."""
    with open_weights(path, which) as read:
        for name in CheckpointMeta.read(path).parameters:
            yield name, read(name)
