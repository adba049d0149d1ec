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
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()

    report: dict[str, Any] = {"file": f"rank-{rank:05d}.safetensors"}
    try:
        parts = zero.pieces(engine, (rank, world))
        tensors = {f"{p.name}|{p.start}|{key}": value.cpu() for p in parts for key, value in p.state.items()}
        path = aside / report["file"]
        save_file(tensors, path)
        report |= {"sha256": _sync_and_hash(path), "shapes": {p.name: p.shape for p in parts}}
    except Exception as error:  # any failure on one rank must be told to all, whatever it is
        report["error"] = f"rank {rank}: {error}"
    reports: list[dict[str, Any]] = [{} for _ in range(world)]
    dist.all_gather_object(reports, report)
    errors = [r["error"] for r in reports if "error" in r]
    if errors:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"checkpoint of step {step} could not be written, the previous one is untouched: {errors[0]}")

    if rank == 0:
        meta = {
            "format": FORMAT,
            "step": step,
            "adam_steps": zero.steps_taken(engine),
            "world": world,
            "files": {r["file"]: r["sha256"] for r in reports},
            "parameters": {name: shape for r in reports for name, shape in r["shapes"].items()},
            **facts,
        }
        _write_synced(aside / "meta.json", json.dumps(meta, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
        _sync_folder(target.parent)
        pointer = folder(run) / "latest"
        _write_synced(pointer.with_suffix(".writing"), target.name)
        os.replace(pointer.with_suffix(".writing"), pointer)
        _sync_folder(target.parent)
        _prune(run, keep)
    dist.barrier()
    return target


def _prune(run: Path, keep: int) -> None:
    for old in sorted(folder(run).glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


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


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
