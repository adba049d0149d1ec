"""Exported weights: reading what `msc export` wrote, with torch and safetensors only. Never runs code from a folder.

config.json                          the model, its data and training; which weights there are
model.safetensors                    the first of them, or in several files
model-00001-of-00003.safetensors ... model.safetensors.index.json     as Hugging Face lays them out
raw.safetensors                      further ones, under their own name
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Shapes = Mapping[str, tuple[int, ...]]
NAMED = 3  # tensors that an error names
FORMAT = 2  # of exports; without one or in 1 rotary embedding paired other channels: the weights would compute nonsense


@dataclass(frozen=True)
class ExportedWeights:
    """One set of weights of an exported folder, whose files' headers have been read.

    config: its config.json. files: where each tensor is.
    """

    folder: Path
    config: dict[str, Any]
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
    available = config.get("weights")
    if not isinstance(available, list) or not available:
        raise ValueError(f"{folder / 'config.json'} does not say which weights there are: export again")
    weights = weights or str(available[0])
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
    return ExportedWeights(folder, config, files, shapes)


def read_export_config(folder: Path) -> dict[str, Any]:
    """The config.json of an exported folder; ValueError if it is not an export's, or of another format."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no exported model: it has no config.json")
    config = read_json(path)
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} is not one that `msc export` wrote: it does not describe a model of ours")
    if (number := config.get("format", 1)) != FORMAT:
        raise ValueError(f"{path} has export format {number}, this version reads {FORMAT}: use the msc that wrote it")
    return config


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is truncated or damaged: it is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def open_safetensors(path: Path) -> Any:
    """`safe_open`, with errors that name what the file is instead."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        start = path.open("rb").read(2)
        if start == b"PK" or start[:1] == b"\x80":
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
