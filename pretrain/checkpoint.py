"""Checkpoints that any world can read: every rank writes the slices of parameters it holds.

    run/checkpoints/step-00000500/   rank-00000.safetensors ...  meta.json
    run/checkpoints/latest           the name of the newest complete one

A slice is `name|start|key` -> flat fp32 values of one parameter's weight, Adam moment or average from element
`start` on, so that loading at another number of ranks or ZeRO stage only looks up other slices. A checkpoint
is written aside, synced, renamed, and `latest` moved last: a crash at any moment leaves the previous one whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from msc.datasets.files import sync_folder, write_atomically
from msc.parallel import zero

FORMAT = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """every: optimizer steps between checkpoints (one is always written at the end). keep: how many to keep."""

    every: int = 500
    keep: int = 3

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every ({self.every}) and checkpoint.keep ({self.keep}) must be at least 1")


def folder(run: Path) -> Path:
    return run / "checkpoints"


def latest(run: Path) -> Path | None:
    """Newest complete checkpoint of a run, None where there is none."""
    pointer = folder(run) / "latest"
    if not pointer.is_file():
        return None
    path = folder(run) / pointer.read_text().strip()
    if not (path / "meta.json").is_file():
        raise ValueError(f"{pointer} names {path.name}, which is not a complete checkpoint")
    return path


def save(run: Path, engine: Any, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint from all ranks; returns its folder, or raises OSError on every rank if one failed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    target = folder(run) / f"step-{step:08d}"
    aside = folder(run) / f".{target.name}.writing"

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> dict[str, Any]:
        path = aside / f"rank-{rank:05d}.safetensors"
        parts = zero.pieces(engine, (rank, world))
        tensors = {f"{p.name}|{p.start}|{key}": value.cpu() for p in parts for key, value in p.state.items()}
        save_file(tensors, path)
        return {"file": path.name, "sha256": _sync_and_hash(path), "shapes": {p.name: p.shape for p in parts}}

    def publish() -> None:
        if rank != 0:
            return
        meta = {
            "format": FORMAT,
            "step": step,
            "adam_steps": zero.steps_taken(engine),
            "world": world,
            "files": {r["file"]: r["sha256"] for r in reports},
            "parameters": {name: shape for r in reports for name, shape in r["shapes"].items()},
            **facts,
        }
        write_atomically(aside / "meta.json", json.dumps(meta, indent=1).encode())
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
        sync_folder(target.parent)
        write_atomically(folder(run) / "latest", target.name.encode())
        for old in sorted(folder(run).glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    try:
        _together(begin)
        reports = _together(write)
        _together(publish)
    except OSError as error:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"checkpoint of step {step} could not be written, the previous one is untouched: {error}"
        ) from None
    return target


def _together(part: Callable[[], Any]) -> list[Any]:
    """Run a part on every rank; all its results, or OSError on every rank if it failed on one."""
    try:
        result, error = part(), None
    except Exception as failure:  # any failure on one rank must be told to all, whatever it is
        result, error = None, f"rank {dist.get_rank()}: {failure}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (result, error))
    for _, failed in found:
        if failed is not None:
            raise OSError(failed)
    return [result for result, _ in found]


def read_meta(path: Path) -> dict[str, Any]:
    meta = json.loads((path / "meta.json").read_text())
    if meta["format"] > FORMAT:
        raise ValueError(f"{path} has checkpoint format {meta['format']}; this version reads up to {FORMAT}")
    return meta


def load(path: Path, engine: Any) -> dict[str, Any]:
    """Restore weights, moments and averages into an engine of any world size and stage; returns the facts saved."""
    meta = read_meta(path)
    _verify(path, meta)
    expected = {name: tuple(shape) for name, shape in meta["parameters"].items()}
    missing = expected.keys() ^ {name for name, p in engine.module.named_parameters() if p.requires_grad}
    if missing:
        raise ValueError(f"{path} and the model do not have the same parameters: {sorted(missing)[0]}")
    with Slices(path, meta) as slices:
        for piece in zero.pieces(engine):
            if expected.get(piece.name) != piece.shape:
                raise ValueError(
                    f"{path} holds {piece.name} with shape {expected.get(piece.name)}, the model has {piece.shape}"
                )
            for key, value in piece.state.items():
                value.copy_(slices.read(piece.name, key, piece.start, piece.numel))
    zero.restore_steps(engine, meta["adam_steps"])
    zero.publish_masters(engine)
    return meta


def _verify(path: Path, meta: dict[str, Any]) -> None:
    """Check the files' checksums, shared out over the ranks; all ranks raise if one file is bad."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bad = [
        file for i, (file, sha) in enumerate(meta["files"].items()) if i % world == rank and _hash(path / file) != sha
    ]
    found: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(found, bad)
    for file in (file for files in found for file in files):
        raise ValueError(f"{path}: {file} is missing or does not match its checksum")


class Slices:
    """Random access to a checkpoint's parameters without loading it whole."""

    def __init__(self, path: Path, meta: dict[str, Any]):
        self._stack = ExitStack()
        self._where: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        for file in meta["files"]:
            opened = self._stack.enter_context(safe_open(path / file, framework="pt"))
            for tensor in opened.keys():  # noqa: SIM118 - not a dict
                name, start, key = tensor.split("|")
                self._where[name, key].append((int(start), opened, tensor))

    def __enter__(self) -> Slices:
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


def weights(path: Path, which: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """All parameters of a checkpoint, one at a time, in fp32: "ema" averaged or "raw" as trained."""
    meta = read_meta(path)
    with Slices(path, meta) as slices:
        for name, shape in meta["parameters"].items():
            numel = int(torch.Size(shape).numel())
            yield name, slices.read(name, {"raw": "weight"}.get(which, which), 0, numel).view(*shape)


# Files that survive a power cut --------------------------------------------------------------------------


def _hash(path: Path) -> str:
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_and_hash(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _hash(path)
