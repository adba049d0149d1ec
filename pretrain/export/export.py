"""`msc export`: a checkpoint as weights that need nothing of the run folder, proved to be the trained ones.

Tensor by tensor from the checkpoint's slices to the new files, in parts: one process and little memory are enough
for a model of any size, from checkpoints of any number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msc.datasets.files import check_replaceable, free_bytes, partial_folder, publish_folder, write_atomically

from ..checkpoints import directory as checkpoint_directory
from ..checkpoints import format as checkpoint_format
from ..checkpoints.directory import CheckpointMeta
from ..checkpoints.exported_weights import FORMAT, Shapes, abbreviated, open_safetensors, safetensors_header
from ..config import Config
from ..inference.load import read_run
from ..model.transformer import MSCTransformer
from ..run_folder import LatentSpace
from . import model_card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEYS = {"ema": "ema", "raw": "weight"}  # what a checkpoint calls them
PART = 1 << 23  # elements read, converted and written at a time
SHARD = 5_000_000_000


@dataclass(frozen=True)
class Source:
    """A checkpoint to take weights from. shapes: of everything that the model keeps, in its order."""

    path: Path
    meta: CheckpointMeta
    shapes: Shapes

    def parts(self, slices: checkpoint_format.ParameterReader, name: str, which: str) -> Iterator[Tensor]:
        """The flattened fp32 values of a tensor, a part at a time."""
        numel = math.prod(self.shapes[name])
        for start in range(0, numel, PART):
            yield slices.read(name, KEYS[which], start, min(PART, numel - start))

    def open(self) -> checkpoint_format.ParameterReader:
        return checkpoint_format.ParameterReader(self.path)


def export(
    run: Path, out: Path | None = None, weights: str = "ema", dtype: str = "fp32", max_shard_size: int = SHARD,
    step: str | None = None, push_to: str | None = None,
) -> str:  # fmt: skip
    """Write the weights of a run's newest checkpoint (or that of `step`) as safetensors; returns what was done.

    weights: "ema", "raw" or "both". max_shard_size: bytes, above which they are split into files with an index.
    push_to: repository of the Hugging Face Hub to upload the folder to afterwards; a new one is private.
    All tensors are read again and compared. Weights that are not split are also loaded with
    `MSCTransformer.from_pretrained` and must give bit-identical outputs if they are in fp32.
    """
    replace_own = out is None  # the run's own folder may be renewed; any other must be new or empty
    out = run / "export" if out is None else out
    check_replaceable(out, overwrite=replace_own, proof="config.json")
    config, space = read_run(run)
    source = open_source(run, config, step)
    asked = ("ema", "raw") if weights == "both" else (weights,)
    check_space(out, source, len(asked) * DTYPES[dtype].itemsize)
    facts = describe(config, space, source.meta, asked, dtype)
    told = []
    with partial_folder(out) as aside:
        write_atomically(aside / "config.json", json.dumps(facts, indent=1).encode())
        for which in asked:
            stem = "model" if which == asked[0] else which
            files = write_weights(aside, stem, source, which, DTYPES[dtype], max_shard_size)
            proof = "every tensor read again and compared"
            if len(files) == 1 and dtype == "fp32":
                check_outputs(source, which, config, aside)
                proof += ", outputs of the loaded model bit-identical"
            size = sum((aside / file).stat().st_size for file in files)
            named = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
            told.append(f"{which:<4} {named} ({size / 1e6:,.1f} MB): {proof}")
        kept = model_card.write_card(aside, run, facts, config, before=out / "README.md", repository=push_to)
        model_card.write_pipeline(aside, facts)
        publish_folder(aside, out)
    count = sum(map(math.prod, source.shapes.values()))
    told.insert(0, f"{count:,} parameters of step {source.meta.step:,} in {dtype} written to {out}")
    if kept:
        told.append(f"{out / 'README.md'} is not as it was written, and kept: its figures may be of an earlier export")
    if push_to is not None:
        told.append(model_card.push(out, push_to, f"step {source.meta.step}"))
    return "\n".join(told)


def open_source(run: Path, config: Config, step: str | None) -> Source:
    """The checkpoint to export, checked by its checksums; ValueError if it is damaged or not of the run's model."""
    path = checkpoint_directory.find(run, step)
    if problems := checkpoint_directory.verify(path):
        raise ValueError(f"{'; '.join(problems)}: export another one with --checkpoint, `msc checkpoints` lists them")
    meta = CheckpointMeta.read(path)
    with torch.device("meta"):
        shapes = MSCTransformer(config.model).shapes()
    held = meta.parameters
    if lost := sorted(shapes.keys() ^ held.keys()):  # such as parameters that were frozen: they are not checkpointed
        raise ValueError(f"{path} and the run's model do not hold the same tensors: {abbreviated(lost)}")
    if other := [name for name in shapes if shapes[name] != held[name]]:
        raise ValueError(f"{path} holds {abbreviated(other)} in another shape than the run's model")
    return Source(path, meta, shapes)


def check_space(out: Path, source: Source, each: int) -> None:
    free, needed = free_bytes(out), each * sum(map(math.prod, source.shapes.values()))
    if free < needed:
        raise OSError(f"the disk of {out} has {free / 1e9:.1f} GB free; the weights take {needed / 1e9:.1f} GB")


def describe(
    config: Config, space: LatentSpace, meta: CheckpointMeta, weights: tuple[str, ...], dtype: str
) -> dict[str, Any]:
    """config.json: what a reader of the weights must know, and where they come from."""
    return {
        "architectures": ["MSCTransformer"],
        "format": FORMAT,
        "weights": list(weights),
        "dtype": dtype,
        "model": asdict(config.model),
        "data": asdict(space),
        "diffusion": asdict(config.diffusion),
        "training": {
            "step": meta.step,
            "clips": meta.clock,
            "clips_in_set": meta.clips,
            "precision": config.parallel.precision,
            "versions": meta.versions,
        },
    }


def write_weights(
    folder: Path, stem: str, source: Source, which: str, dtype: torch.dtype, limit: int
) -> list[str]:  # fmt: skip
    """Write and compare all tensors; returns the names of the files. More than one have an index."""
    groups = split({name: math.prod(shape) * dtype.itemsize for name, shape in source.shapes.items()}, limit)
    of = f"-of-{len(groups):05d}"
    files = [f"{stem}-{i + 1:05d}{of}.safetensors" for i in range(len(groups))]
    files = files if len(groups) > 1 else [f"{stem}.safetensors"]
    for file, names in zip(files, groups, strict=True):
        # Opened for every file anew: what was read through a mapping stays in memory while it is open.
        with source.open() as slices:
            write_file(folder / file, source, slices, names, which, dtype)
            compare_file(folder / file, source, slices, names, which, dtype)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(map(math.prod, source.shapes.values())) * dtype.itemsize},
            "weight_map": {name: file for file, names in zip(files, groups, strict=True) for name in names},
        }
        write_atomically(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1).encode())
    return files


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Cut tensors into runs of at most `limit` bytes; a larger tensor is alone."""
    groups: list[list[str]] = []
    held = limit + 1
    for name, size in sizes.items():
        if held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def write_file(
    path: Path,
    source: Source,
    slices: checkpoint_format.ParameterReader,
    names: list[str],
    which: str,
    dtype: torch.dtype,
) -> None:
    """One safetensors file, without holding more than a part of a tensor. (The library's writer takes all at once.)"""
    with path.open("wb") as file:
        file.write(safetensors_header({name: source.shapes[name] for name in names}, dtype))
        for name in names:
            for part in source.parts(slices, name, which):
                converted = part.to(dtype)
                if dtype == torch.float16 and not converted.isfinite().all() and part.isfinite().all():
                    raise ValueError(f"{name} holds values up to {part.abs().max():.3g}, too large for fp16: use bf16")
                file.write(converted.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def compare_file(
    path: Path,
    source: Source,
    slices: checkpoint_format.ParameterReader,
    names: list[str],
    which: str,
    dtype: torch.dtype,
) -> None:
    """RuntimeError unless the file, read by the safetensors library, holds exactly the checkpoint's tensors."""
    with open_safetensors(path) as opened:
        for name in names:
            tensor = opened.get_tensor(name)
            same, at = tensor.dtype == dtype and tuple(tensor.shape) == source.shapes[name], 0
            for part in source.parts(slices, name, which):
                stored = tensor.flatten()[at : at + part.numel()]
                same = same and torch.equal(stored.view(torch.uint8), part.to(dtype).view(torch.uint8))
                at += part.numel()
            if not same:
                raise RuntimeError(f"{path.name} does not hold {name} as the checkpoint does; please report this")


@torch.no_grad()
def check_outputs(source: Source, which: str, config: Config, folder: Path) -> None:
    """RuntimeError unless the exported model computes the same as the trained one, on a small random clip."""
    with torch.device("meta"):
        trained = MSCTransformer(config.model)
    trained.load_state_dict(dict(checkpoint_format.weights(source.path, which)), assign=True)
    model = config.model
    side = model.patch * math.lcm(*(scale.space for scale in model.scales))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4 * model.frames_per_unit, model.channels, side, side, generator=generator)
    t = torch.rand(1, 4, generator=generator).repeat_interleave(model.frames_per_unit, 1)
    if not torch.equal(trained.eval()(x, t), MSCTransformer.from_pretrained(folder, which)(x, t)):
        raise RuntimeError(f"the exported {which} weights do not reproduce the trained model; please report this")
