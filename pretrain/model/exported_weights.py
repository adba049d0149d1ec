"""Exported weights: reading what `msc export` wrote, with torch and safetensors only. Never runs code from a folder.

config.json                          the model, its data and training; which weights there are
model.safetensors                    the first of them, or in several files
model-00001-of-00003.safetensors ... model.safetensors.index.json     as Hugging Face lays them out
raw.safetensors                      further ones, under their own name
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..noise_config import DiffusionConfig
from ..typed_values import read, read_json
from .config import ModelConfig, check_clip, check_complete
from .latent_space import LatentSpace

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Shapes = Mapping[str, tuple[int, ...]]
NAMED = 3  # tensors that an error names
FORMAT = 2  # of exports; without one or in 1 rotary embedding paired other channels: the weights would compute nonsense


# What every export of this format says of its model; later settings have defaults that mean the same model.
MODEL_KEYS = ("width", "depth", "scales", "patch", "frames_per_unit", "mlp_ratio", "gate", "rope_theta", "classes",
              "text_width", "channels", "latent_mean", "latent_std", "gate_constants")  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    """config.json of an export: the model, its latents, the noise it was trained with, and where it comes from."""

    format: int
    weights: tuple[Literal["ema", "raw"], ...]
    model: ModelConfig
    data: LatentSpace
    diffusion: DiffusionConfig
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.weights:
            raise ValueError("weights is empty: export again")


@dataclass(frozen=True)
class ExportedWeights:
    """One set of weights of an exported folder, whose files' headers have been read.

    files: where each tensor is.
    """

    folder: Path
    config: ExportConfig
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    def check(self, expected: Shapes) -> None:
        if differences := shape_differences(self.shapes, expected):
            raise ValueError(f"config.json in {self.folder} does not match its weights: {differences}")

    def tensor(self, name: str) -> Tensor:
        """One tensor in fp32."""
        with open_safetensors(self.files[name]) as opened:
            return opened.get_tensor(name).float()

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one at a time, copied: files may be replaced while a model is in use. dtype: None as stored."""
        for path in sorted(set(self.files.values())):
            with open_safetensors(path) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    yield name, opened.get_tensor(name).to(dtype=dtype, copy=True)


def open_exported(folder: Path, weights: str | None = None) -> ExportedWeights:
    """Open the "ema" or "raw" weights of an exported folder (None: the first it has) without loading them.

    FileNotFoundError where files are missing, ValueError where they are not what `msc export` wrote.
    """
    config = read_export_config(folder)
    available = config.weights
    weights = weights or available[0]
    if weights not in available:
        raise ValueError(
            f"{folder} holds {' and '.join(available)} weights, not {weights!r}: export again with --weights"
        )
    stem = "model" if weights == available[0] else weights
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    weight_map: Any = {}
    if index.is_file():
        if single.is_file():
            raise ValueError(f"{folder} holds {single.name} and {index.name}, of two exports: remove the older one")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of files beside it")
    files, shapes = {}, {}
    for file in sorted(set(weight_map.values())) or [single.name]:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} does not hold a whole exported model: {file} is missing")
        with open_safetensors(folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                files[name], shapes[name] = folder / file, tuple(opened.get_slice(name).get_shape())
    if weight_map and (odd := weight_map.items() ^ {name: path.name for name, path in files.items()}.items()):
        raise ValueError(f"{index.name} in {folder} does not match its files: {abbreviated(sorted(dict(odd)))}")
    check_sizes(config.model, shapes, folder / "config.json")
    return ExportedWeights(folder, config, files, shapes)


def read_export_config(folder: Path) -> ExportConfig:
    """The config.json of an exported folder; ValueError if it is not an export's, of another format, or edited into
    what no model can be."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no exported model: it has no config.json")
    config = read_json(path)
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} is not one that `msc export` wrote: it does not describe a model of ours")
    if (number := config.get("format", 1)) != FORMAT:
        raise ValueError(f"{path} has export format {number}, this version reads {FORMAT}: use the msc that wrote it")
    if missing := [key for key in MODEL_KEYS if key not in config["model"]]:
        raise ValueError(f"{path}: model.{missing[0]} is missing: export again")
    facts = {key.name: config[key.name] for key in fields(ExportConfig) if key.name in config}
    read_config = read(ExportConfig, facts, "", path)
    check_model(read_config.model, read_config.data, path)
    return read_config


def check_model(config: ModelConfig, space: LatentSpace, path: Path) -> None:
    """Raise ValueError, naming `path`, unless the model is complete and takes clips of these latents."""
    try:
        check_complete(config)
        check_clip(config, space.frames, space.height, space.width)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_sizes(config: ModelConfig, shapes: Shapes, path: Path) -> None:
    """Raise ValueError where `config`, of the file `path`, and stored tensors differ in what the size of the model
    depends on: a model of any other size is not built at all."""
    width = config.width
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed.weight": ("width, channels and patch", (width, config.patch_values)),
        "blocks.0.feed_forward.up.weight": ("mlp_ratio", (config.hidden, width)),
    }
    if config.classes or "label.weight" in shapes:
        expected["label.weight"] = ("classes", (config.classes + 1, width) if config.classes else ())
    text = "text.up.weight" if config.layers.text_hidden else "text.weight"
    if config.text_width or text in shapes:
        expected[text] = ("text_width", (width, config.text_width) if config.text_width else ())
    for name, (setting, shape) in expected.items():
        stored = shapes.get(name, () if setting in ("classes", "text_width") else shape)
        if stored != shape:
            raise ValueError(
                f"{path} does not match its weights: {name} is {list(stored) or 'not'} there and "
                f"{list(shape) or 'not'} by model.{setting}: take config.json and weights of one export"
            )
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if config.depth != depth:
        raise ValueError(f"{path} does not match its weights: model.depth is {config.depth}, they hold {depth} blocks")


def open_safetensors(path: Path) -> Any:
    """`safe_open`, with errors that name what the file is instead."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(9)
        # A header whose length ends in 0x80 begins like a pickle of protocol 2 to 5, but its JSON stands at byte 8.
        if start[:2] == b"PK" or (len(start) == 9 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[8:] != b"{"):
            raise ValueError(
                f"{path} is a pickle whatever its name, and was not opened, as loading one can run any code: "
                "take the weights from where they are safetensors"
            ) from None
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None


def safetensors_header(shapes: Shapes, dtype: torch.dtype = torch.float32) -> bytes:
    """The start of a safetensors file whose tensors follow one another in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shape_differences(shapes: Shapes, expected: Shapes) -> str:
    """Names the tensors that are missing, those that the model does not have, and those of another shape."""
    differences = {
        "which no file holds": sorted(expected.keys() - shapes.keys()),
        "which the model does not have": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(shapes[name])} for {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    return "; ".join(f"{abbreviated(names)}, {what}" for what, names in differences.items() if names)


def abbreviated(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
