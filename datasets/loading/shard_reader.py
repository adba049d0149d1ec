"""Random access to the samples of a split: by number, and of each only the frames asked for."""

import bisect
import json
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..shards.index import STORES, Index, Sample, find_part, read_part, scan
from ..shards.remote import RemoteShards
from ..shards.table_of_contents import read_toc
from ..video import decode_frames

SCANNED_SHARDS = 64  # tables of contents kept per process; a scan takes about a millisecond
FETCHES = 5  # times that a shard which was removed from the cache is fetched again
CHUNK = 1 << 20
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class ShardReader:
    """The samples of `split`, numbered in the order of the index; `frames` are latent frames [start, stop).

    ValueError for an unknown or empty split, and for frames outside of the clips or, where the autoencoder
    does not cut video evenly along time, for anything but whole clips.
    """

    def __init__(
        self, folder: Path | RemoteShards, index: Index, split: str, frames: tuple[int, int] | None = None
    ) -> None:
        self.folder, self.index, self.split = folder, index, split
        self._ends = [0]
        self._scanned: dict[str, list[Sample] | str] = {}  # or why it cannot be read
        if not index.samples(split):
            raise ValueError(f"{folder} has no clips in split {split!r}")
        for shard in index.splits[split]:
            self._ends.append(self._ends[-1] + shard.samples)
        self.frames = frames or (0, index.frames)
        start, stop = self.frames
        if not 0 <= start < stop <= index.frames:
            raise ValueError(f"frames {start} to {stop} asked for, clips have {index.frames} latent frames")
        whole = self.frames == (0, index.frames)
        factor = index.temporal_factor
        if not whole and index.store == "video" and index.video_frames != index.frames * factor:
            raise ValueError(
                f"{index.video_frames} video frames are not {index.frames} x {factor} ({index.autoencoder}): "
                "clips cannot be cut along time; store latents"
            )
        self.video_frames = (0, index.video_frames) if whole else (start * factor, stop * factor)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, number: int) -> tuple[str, Tensor, Tensor | None, int | None]:
        """(key, media, text [L, E], label) of a sample; ValueError that names it where it is broken, OSError where its
        shard cannot be had.

        media: uint8 video [Tv, 3, H, W], or latents [T, C, h, w] in the type they are stored in, of the frames asked
        for. Whether a sample is broken never depends on those: ranks that share a clip must agree. So checksums are of
        all frames; where there is none, as shards of others may be without, only video is broken by that.
        """
        for _ in range(FETCHES):
            try:
                return self._read(number)
            except FileNotFoundError as error:
                if isinstance(self.folder, Path):
                    raise
                gone = error  # from the cache, since others needed the room
        raise OSError(f"the cache of {self.folder} is too small: shards go before they are read ({gone})")

    def _read(self, number: int) -> tuple[str, Tensor, Tensor | None, int | None]:
        path, sample = self._find(number)
        try:
            about = json.loads(read_part(path, sample, "json"))
            label = about["label"] if self.index.classes else None
            if self.index.classes and not (isinstance(label, int) and 0 <= label < self.index.classes):
                raise ValueError(f"label is {label!r}, expected 0 to {self.index.classes - 1}")
            if self.index.store == "video":
                media = self._video(path, sample, about)
            else:
                media = self._latents(path, sample, about)
            text = None
            if self.index.has_text is not None:
                content = read_part(path, sample, "text.safetensors")
                if "text_crc32" in about and zlib.crc32(content) != about["text_crc32"]:
                    raise ValueError("checksum of the text differs from the one written")
                text = load(content)["text"].float()
                if text.dim() != 2 or not len(text) or text.shape[1] != self.index.has_text:
                    raise ValueError(f"text is {list(text.shape)}, expected [L, {self.index.has_text}], L at least 1")
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(f"sample {sample.key} of {path}: {error}") from None
        return sample.key, media, text, label

    def _find(self, number: int) -> tuple[Path, Sample]:
        place = bisect.bisect_right(self._ends, number) - 1
        shard = self.index.splits[self.split][place]
        path = self.folder / shard.name if isinstance(self.folder, Path) else self.folder.file(shard)
        found = self._scanned.get(shard.name)
        if found is None:
            try:
                found = read_toc(path, shard) or scan(path)
                if len(found) != shard.samples:
                    raise ValueError(f"shard {path} has {len(found)} samples, its index says {shard.samples}")
            except ValueError as error:
                found = str(error)
            if len(self._scanned) >= SCANNED_SHARDS:
                del self._scanned[next(iter(self._scanned))]  # the one scanned longest ago
            self._scanned[shard.name] = found
        if isinstance(found, str):
            raise ValueError(found)
        return path, found[number - self._ends[place]]

    def _video(self, path: Path, sample: Sample, about: dict[str, Any]) -> Tensor:
        content = read_part(path, sample, "mp4")
        # All bytes, though only some frames are decoded: a damaged clip is damaged for every rank.
        if zlib.crc32(content) != about["crc32"]:
            raise ValueError("checksum of the video differs from the one written")
        index, (start, stop) = self.index, self.video_frames
        size = (index.video_frames, index.video_height, index.video_width)
        return decode_frames(content, start=start, stop=stop, name=f"{sample.key}.mp4", threads=1, expected=size)

    def _latents(self, path: Path, sample: Sample, about: dict[str, Any]) -> Tensor:
        """All bytes are read, if only for their checksum; no more is held than the frames asked for."""
        offset, size = find_part(path, sample, STORES["latent"])
        index, (start, stop) = self.index, self.frames
        shape = [index.frames, index.channels, index.height, index.width]
        with open(path, "rb") as file:
            file.seek(offset)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 1 << 20):
                raise ValueError(f"safetensors header claims {length} of {size} bytes")
            header = json.loads(file.read(length))["latent"]
            dtype = DTYPES[header["dtype"]]
            begin, end = header["data_offsets"]
            each = math.prod(shape[1:]) * dtype.itemsize
            inside = 0 <= begin <= end <= size - 8 - length
            if header["shape"] != shape or end - begin != shape[0] * each or not inside:
                raise ValueError(f"latents are {header['shape']}, the index says {shape}")
            if "crc32" in about and _crc32(file, offset, size) != about["crc32"]:
                raise ValueError("checksum of the latents differs from the one written")
            file.seek(offset + 8 + length + begin + start * each)
            content = bytearray(file.read((stop - start) * each))
        return torch.frombuffer(content, dtype=dtype).reshape(stop - start, *shape[1:])


def _crc32(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    found = 0
    for first in range(0, size, CHUNK):
        found = zlib.crc32(file.read(min(CHUNK, size - first)), found)
    return found
