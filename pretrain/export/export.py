"""`msc export`: write a checkpoint's weights as safetensors that need nothing of the run folder, and verify them.

Tensor by tensor from the checkpoint's slices to the new files, in parts: one process and little memory are enough
for a model of any size, from checkpoints of any number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from msc.datasets.files import (
    check_replaceable,
    format_bytes,
    free_bytes,
    partial_folder,
    publish_folder,
    write_atomically,
)

from ..checkpoints import directory as checkpoint_directory
from ..checkpoints import format as checkpoint_format
from ..checkpoints import pretrained
from ..checkpoints.directory import CheckpointMeta
from ..config import Config
from ..inference.load import read_run
from ..model.exported_weights import FORMAT, Shapes, abbreviated, check_sizes, open_safetensors, safetensors_header
from ..model.latent_space import LatentSpace
from ..model.transformer import MSCTransformer
from ..run_folder import RunFolder
from . import model_card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEYS = {"ema": "ema", "raw": "weight"}  # their names in a checkpoint
PART = 1 << 23  # elements read, converted and written at a time
MAX_SHARD_SIZE = 5_000_000_000  # bytes
Layout = Literal["msc", "diffusers"]
Parts = Callable[[str, int], Iterator[Tensor]]  # (name, elements) -> the tensor's values, flattened, in parts


@dataclass(frozen=True)
class Source:
    """A checkpoint to take weights from. shapes: of all tensors of the model, in its order."""

    path: Path
    meta: CheckpointMeta
    shapes: Shapes

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def export(
    run: Path, out: Path | None = None, weights: str = "ema", dtype: str = "fp32",
    max_shard_size: int = MAX_SHARD_SIZE, step: str | None = None, push_to: str | None = None, layout: Layout = "msc",
) -> str:  # fmt: skip
    """Write the weights of a run's newest checkpoint (or that of `step`) as safetensors; returns a report.

    weights: "ema", "raw" or "both". max_shard_size: bytes, above which they are split into files with an index.
    push_to: repository of the Hugging Face Hub to upload the folder to afterwards; a new one is private. layout:
    "diffusers" writes the transformer of a published model that the run started from, as diffusers' own class.
    All tensors are read back and compared. Weights that are not split are also loaded with
    `MSCTransformer.from_pretrained` and must give bit-identical outputs if they are in fp32.
    """
    folder = RunFolder(run).export if out is None else out
    # the run's own folder may be replaced; any other must be new or empty
    check_replaceable(folder, overwrite=out is None, proof="config.json")
    config, space = read_run(run)
    sets = ("ema", "raw") if weights == "both" else (weights,)
    with checkpoint_directory.held(run, step) as path, partial_folder(folder) as partial:
        source = open_source(path, config)
        if layout == "diffusers":
            return export_to_diffusers(source, config, folder, partial, weights, dtype, max_shard_size)
        facts = describe(config, space, source.meta, sets, dtype)
        report = [f"{source.elements:,} parameters of step {source.meta.step:,} in {dtype} written to {folder}"]
        free, needed = free_bytes(folder), len(sets) * DTYPES[dtype].itemsize * source.elements
        if free < needed:
            sizes = f"{format_bytes(free)} free; the weights take {format_bytes(needed)}"
            raise OSError(f"the disk of {folder} has {sizes}: free some, or name another --out")
        write_atomically(partial / "config.json", json.dumps(facts, indent=1).encode())
        for name in sets:
            stem = "model" if name == sets[0] else name
            files = write_weights(partial, stem, source, name, DTYPES[dtype], max_shard_size)
            checks = "every tensor read again and compared"
            if len(files) == 1 and dtype == "fp32":
                check_outputs(source, name, config, partial)
                checks += ", outputs of the loaded model bit-identical"
            size = sum((partial / file).stat().st_size for file in files)
            names = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
            report.append(f"{name:<4} {names} ({size / 1e6:,.1f} MB): {checks}")
        kept = model_card.write_card(partial, run, facts, config, previous=folder / "README.md", repository=push_to)
        model_card.write_pipeline(partial, facts)
        publish_folder(partial, folder)
    if kept:
        report.append(f"{folder / 'README.md'} was edited and is kept: its figures may be of an earlier export")
    if push_to is not None:
        report.append(model_card.push(folder, push_to, f"step {source.meta.step}"))
    return "\n".join(report)


def export_to_diffusers(
    source: Source, config: Config, folder: Path, partial: Path, weights: str, dtype: str, max_shard_size: int
) -> str:
    """Write a transformer that diffusers' class of its family loads; returns a report."""
    if reason := pretrained.unsupported(config.model):
        raise ValueError(f"the model of {source.path.parents[1]} is none of diffusers': {reason}")
    if weights == "both":
        raise ValueError("a folder of diffusers holds one set of weights: export ema or raw")
    origins = pretrained.sources(config.model)
    if left := sorted(source.shapes.keys() - {origin.name for origin in origins.values()}):
        raise ValueError(f"the model has what diffusers' class has not: {abbreviated(left)}")
    theirs = replace(source, shapes={name: origin.part.shape for name, origin in origins.items()})

    def parts(reader: checkpoint_format.ParameterReader, key: str, kind: torch.dtype, name: str, _: int) -> Any:
        origin = origins[name]
        numel = math.prod(source.shapes[origin.name])
        ours = torch.cat(list(converted_parts(reader, key, kind, origin.name, numel)))
        yield origin.of(ours.view(source.shapes[origin.name])).flatten()

    write_atomically(partial / "config.json", json.dumps(pretrained.settings_of(config.model), indent=1).encode())
    files = write_weights(partial, pretrained.STEM, theirs, weights, DTYPES[dtype], max_shard_size, parts)
    publish_folder(partial, folder)
    kind = pretrained.settings_of(config.model)["_class_name"]
    return (
        f"{source.elements:,} parameters of step {source.meta.step:,} in {dtype} written to {folder} as {kind}, in "
        f"{len(files)} files: every tensor read again and compared"
    )


def open_source(path: Path, config: Config) -> Source:
    """The checkpoint to export, verified by its checksums; ValueError if it is damaged or not of the run's model."""
    if problems := checkpoint_directory.verify(path):
        raise ValueError(f"{'; '.join(problems)}: export another one with --checkpoint, `msc checkpoints` lists them")
    meta = CheckpointMeta.read(path)
    check_sizes(config.model, meta.parameters, path.parents[1] / "config.yaml")
    with torch.device("meta"):
        shapes = MSCTransformer(config.model).shapes()
    if unmatched := sorted(shapes.keys() ^ meta.parameters.keys()):  # such as frozen ones: they are not checkpointed
        raise ValueError(f"{path} and the run's model do not hold the same tensors: {abbreviated(unmatched)}")
    if other := [name for name in shapes if shapes[name] != meta.parameters[name]]:
        raise ValueError(f"{path} holds {abbreviated(other)} in another shape than the run's model")
    return Source(path, meta, shapes)


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
    folder: Path, stem: str, source: Source, weights: str, dtype: torch.dtype, limit: int,
    read_parts: Callable[..., Iterator[Tensor]] | None = None,
) -> list[str]:  # fmt: skip
    """Write and compare all tensors; returns the names of the files. Several get an index. read_parts: instead of
    `converted_parts`."""
    groups = split({name: math.prod(shape) * dtype.itemsize for name, shape in source.shapes.items()}, limit)
    files = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = files if len(groups) > 1 else [f"{stem}.safetensors"]
    for file, names in zip(files, groups, strict=True):
        # A new reader for every file: what was read through a memory map stays in memory while it is open.
        with checkpoint_format.ParameterReader(source.path) as reader:
            parts = functools.partial(read_parts or converted_parts, reader, KEYS[weights], dtype)
            shapes = {name: source.shapes[name] for name in names}
            write_file(folder / file, shapes, parts, dtype)
            compare_file(folder / file, shapes, parts, dtype)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": source.elements * dtype.itemsize},
            "weight_map": {name: file for file, names in zip(files, groups, strict=True) for name in names},
        }
        write_atomically(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1).encode())
    return files


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Group tensors in order into files of at most `limit` bytes; a larger tensor is alone."""
    groups: list[list[str]] = []
    held = limit + 1
    for name, size in sizes.items():
        if held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def converted_parts(
    reader: checkpoint_format.ParameterReader, key: str, dtype: torch.dtype, name: str, numel: int
) -> Iterator[Tensor]:
    """The flattened values of a tensor, a part at a time; ValueError where fp16 cannot hold them."""
    for start in range(0, numel, PART):
        part = reader.read(name, key, start, min(PART, numel - start))
        converted = part.to(dtype)
        if dtype == torch.float16 and not converted.isfinite().all() and part.isfinite().all():
            raise ValueError(f"{name} holds values up to {part.abs().max():.3g}, too large for fp16: use bf16")
        yield converted


def write_file(path: Path, shapes: Shapes, parts: Parts, dtype: torch.dtype) -> None:
    """One safetensors file, a part of a tensor in memory at a time (the library's writer takes all at once)."""
    with path.open("wb") as file:
        file.write(safetensors_header(shapes, dtype))
        for name, shape in shapes.items():
            for part in parts(name, math.prod(shape)):
                file.write(part.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def compare_file(path: Path, shapes: Shapes, parts: Parts, dtype: torch.dtype) -> None:
    """RuntimeError unless the file, read by the safetensors library, holds exactly the checkpoint's tensors."""
    with open_safetensors(path) as opened:
        for name, shape in shapes.items():
            tensor, offset = opened.get_tensor(name), 0
            same = tensor.dtype == dtype and tuple(tensor.shape) == shape
            for part in parts(name, math.prod(shape)):
                stored = tensor.flatten()[offset : offset + part.numel()]
                same = same and torch.equal(stored.view(torch.uint8), part.view(torch.uint8))
                offset += part.numel()
            if not same:
                raise RuntimeError(f"{path.name} does not hold {name} as the checkpoint does; please report this")


@torch.no_grad()
def check_outputs(source: Source, weights: str, config: Config, folder: Path) -> None:
    """RuntimeError unless the exported model gives the same outputs as the trained one on a small random clip."""
    with torch.device("meta"):
        trained = MSCTransformer(config.model)
    trained.load_state_dict(dict(checkpoint_format.weights(source.path, weights)), assign=True)
    model = config.model
    side = model.patch * math.lcm(*(scale.space for scale in model.scales))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4 * model.frames_per_unit, model.channels, side, side, generator=generator)
    t = torch.rand(1, 4, generator=generator).repeat_interleave(model.frames_per_unit, 1)
    if not torch.equal(trained.eval()(x, t), MSCTransformer.from_pretrained(folder, weights)(x, t)):
        raise RuntimeError(f"the exported {weights} weights do not reproduce the trained model; please report this")
