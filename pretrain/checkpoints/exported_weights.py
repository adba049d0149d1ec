"""Weights in files: reading what `msc export` wrote. Nothing in a folder is ever run, and nothing is half loaded.

    config.json                          the model, its data and training; which weights there are
    model.safetensors                    the first of them, or in several files
    model-00001-of-00003.safetensors ... model.safetensors.index.json     as Hugging Face lays them out
    raw.safetensors                      further ones, under their own name

Needs torch and safetensors only.
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
    """One set of weights of an exported folder, all of whose headers have been read.

    facts: its config.json. files: where each tensor is.
    """

    folder: Path
    facts: dict[str, Any]
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    def check(self, expected: Shapes) -> None:
        """ValueError naming tensors that are not there, not wanted, or of another shape."""
        told = {
            "which no file holds": sorted(expected.keys() - self.shapes.keys()),
            "which the model does not have": sorted(self.shapes.keys() - expected.keys()),
            "of another shape": [
                f"{name} {list(self.shapes[name])} for {list(shape)}"
                for name, shape in expected.items()
                if self.shapes.get(name, shape) != shape
            ],
        }
        wrong = [f"{abbreviated(names)}, {why}" for why, names in told.items() if names]
        if wrong:
            raise ValueError(f"config.json in {self.folder} does not match its weights: {'; '.join(wrong)}")

    def read(self, name: str) -> Tensor:
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
    """Look up the "ema" or "raw" weights of an exported folder (None: the first it has) without loading them.

    FileNotFoundError where files are missing, ValueError where they are not what `msc export` wrote.
    """
    facts = read_export_config(folder)
    listed = facts.get("weights")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{folder / 'config.json'} does not say which weights there are: export again")
    weights = weights or str(listed[0])
    if weights not in listed:
        raise ValueError(f"{folder} holds {' and '.join(listed)} weights, not {weights!r}: export again with --weights")
    stem = "model" if weights == listed[0] else weights
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    placed: Any = {}
    if index.is_file():
        if single.is_file():
            raise ValueError(f"{folder} holds {single.name} and {index.name}, of two exports: remove the older one")
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or any(Path(str(file)).name != file for file in placed.values()):
            raise ValueError(f"{index} has no weight_map of files beside it")
    files, shapes = {}, {}
    for file in sorted(set(placed.values())) or [single.name]:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} does not hold a whole exported model: {file} is missing")
        with open_safetensors(folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                files[name], shapes[name] = folder / file, tuple(opened.get_slice(name).get_shape())
    if placed and {name: path.name for name, path in files.items()} != placed:
        odd = sorted(name for name in placed.keys() | files.keys()
                     if name not in files or placed.get(name) != files[name].name)  # fmt: skip
        raise ValueError(f"{index.name} in {folder} does not match its files: {abbreviated(odd)}")
    return ExportedWeights(folder, facts, files, shapes)


def read_export_config(folder: Path) -> dict[str, Any]:
    """The config.json of an exported folder. ValueError if it is none, or of another format."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no exported model: it has no config.json")
    facts = read_json(path)
    if not isinstance(facts.get("model"), dict):
        raise ValueError(f"{path} is not one that `msc export` wrote: it does not describe a model of ours")
    if (found := facts.get("format", 1)) != FORMAT:
        raise ValueError(f"{path} has export format {found}, this version reads {FORMAT}: use the msc that wrote it")
    return facts


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is truncated or damaged: it is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def open_safetensors(path: Path) -> Any:
    """`safe_open`, with errors that say what the file is instead."""
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


def abbreviated(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
