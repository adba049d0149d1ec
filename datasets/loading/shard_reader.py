"""Shard reader: random access to the samples of a split by number, reading only the frames requested."""

import bisect
import json
import math
import zlib
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import DeterministicFailure
from ..shards.index import STORES, Index, Sample, find_part, read_part, scan
from ..shards.remote import RemoteShards
from ..shards.table_of_contents import read_toc
from ..signals import rows_of_latent_frames
from ..video import decode_frames

CACHED_SHARDS = 64  # tables of contents in memory per process; a scan takes about a millisecond
FETCH_ATTEMPTS = 5  # of a shard that was evicted from the cache before it was read
CHUNK = 1 << 20
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Clip(NamedTuple):
    """What a sample holds of the frames requested.

    media: uint8 video [Tv, 3, H, W], or latents [T, C, h, w] as stored. text: [L, E]. signals: float32 [T, k W] of each
    that the index has, NaN where the sample has none.
    """

    key: str
    media: Tensor
    text: Tensor | None
    label: int | None
    signals: dict[str, Tensor] | None


class ShardReader:
    """The samples of `split`, numbered in the order of the index; `frames` are latent frames [start, stop).

    ValueError for an unknown or empty split, for frames outside of the clips, and for a part of a clip where the
    autoencoder cannot slice video along time.
    """

    def __init__(
        self, folder: Path | RemoteShards, index: Index, split: str, frames: tuple[int, int] | None = None
    ) -> None:
        self.folder, self.index = folder, index
        if not index.samples(split):
            raise ValueError(f"{folder} has no clips in split {split!r}")
        self._shards = index.splits[split]
        self._begins = [0, *accumulate(shard.samples for shard in self._shards)]
        self._contents: dict[str, list[Sample] | str] = {}  # by shard; or why it cannot be read
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
        return self._begins[-1]

    def read(self, number: int) -> Clip:
        """A sample. ValueError, naming the sample, where it is unreadable; OSError where its shard cannot be reached.

        Whether a sample is unreadable does not depend on the frames, as ranks that share a clip must agree: checksums
        are of all frames. (Latents without a checksum, in shards of others, may differ.)
        """
        for _ in range(FETCH_ATTEMPTS):
            try:
                return self._read(number)
            except FileNotFoundError as error:
                if isinstance(self.folder, Path):
                    raise
                evicted = error
        raise OSError(f"the cache of {self.folder} is too small: shards are evicted before they are read ({evicted})")

    def _read(self, number: int) -> Clip:
        path, sample = self._locate(number)
        try:
            about = json.loads(read_part(path, sample, "json"))
            label = about["label"] if self.index.classes else None
            if self.index.classes and not (isinstance(label, int) and 0 <= label < self.index.classes):
                raise ValueError(f"label is {label!r}, expected 0 to {self.index.classes - 1}")
            media = (self._video if self.index.store == "video" else self._latents)(path, sample, about)
            text = self._text(path, sample, about) if self.index.has_text is not None else None
            signals = self._signals(path, sample, about) if self.index.signals else None
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(f"sample {sample.key} of {path}: {error}") from None
        return Clip(sample.key, media, text, label, signals)

    def _locate(self, number: int) -> tuple[Path, Sample]:
        """The shard of a sample, fetched if it is remote, and where the sample's parts lie in it."""
        place = bisect.bisect_right(self._begins, number) - 1
        shard = self._shards[place]
        path = self.folder / shard.name if isinstance(self.folder, Path) else self.folder.fetch(shard)
        contents = self._contents.get(shard.name)
        if contents is None:
            try:
                contents = read_toc(path, shard) or scan(path)
                if len(contents) != shard.samples:  # no damage, which would show in the scan
                    raise DeterministicFailure(
                        f"shard {path} has {len(contents)} samples, its index says {shard.samples}: copy both again or "
                        "run `msc convert` again"
                    )
            except DeterministicFailure:
                raise
            except ValueError as error:
                contents = str(error)
            if len(self._contents) >= CACHED_SHARDS:
                del self._contents[next(iter(self._contents))]  # the oldest
            self._contents[shard.name] = contents
        if isinstance(contents, str):
            raise ValueError(contents)
        return path, contents[number - self._begins[place]]

    def _text(self, path: Path, sample: Sample, about: dict[str, Any]) -> Tensor:
        content = read_part(path, sample, "text.safetensors")
        if "text_crc32" in about and zlib.crc32(content) != about["text_crc32"]:
            raise ValueError("checksum of the text differs from the one written")
        text = load(content)["text"].float()
        if text.dim() != 2 or not len(text) or text.shape[1] != self.index.has_text:
            raise ValueError(f"text is {list(text.shape)}, expected [L, {self.index.has_text}], L at least 1")
        return text

    def _signals(self, path: Path, sample: Sample, about: dict[str, Any]) -> dict[str, Tensor]:
        index, (start, stop) = self.index, self.frames
        stored: dict[str, Tensor] = {}
        if "signals_crc32" in about:
            content = read_part(path, sample, "signals.safetensors")
            if zlib.crc32(content) != about["signals_crc32"]:
                raise ValueError("checksum of the signals differs from the one written")
            stored = load(content)
        rows = {}
        for signal in index.signals:
            values = stored.get(signal.name)
            if values is None:
                rows[signal.name] = torch.full((stop - start, index.temporal_factor * signal.width), math.nan)
                continue
            if list(values.shape) != [index.video_frames, signal.width] or not torch.isfinite(values).all():
                raise ValueError(
                    f"signal {signal.name} is {list(values.shape)}, expected finite numbers "
                    f"{[index.video_frames, signal.width]}"
                )
            whole = rows_of_latent_frames(values, index.frames, index.temporal_factor, signal.kind)
            rows[signal.name] = whole[start:stop].clone()
        return rows

    def _video(self, path: Path, sample: Sample, about: dict[str, Any]) -> Tensor:
        index, (start, stop) = self.index, self.video_frames
        expected = (index.video_frames, index.video_height, index.video_width)
        _, size = find_part(path, sample, "mp4")
        if size > (most := 2 * 3 * math.prod(expected) + CHUNK):  # twice what it has uncompressed
            raise ValueError(f"video has {size} bytes, more than {most} for {index.shape} are not read")
        content = read_part(path, sample, "mp4")
        if zlib.crc32(content) != about["crc32"]:
            raise ValueError("checksum of the video differs from the one written")
        return decode_frames(content, start=start, stop=stop, name=f"{sample.key}.mp4", threads=1, expected=expected)

    def _latents(self, path: Path, sample: Sample, about: dict[str, Any]) -> Tensor:
        """All bytes are read for the checksum, but only the frames requested are held in memory."""
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
            frame_bytes = math.prod(shape[1:]) * dtype.itemsize
            inside = 0 <= begin <= end <= size - 8 - length
            if header["shape"] != shape or end - begin != shape[0] * frame_bytes or not inside:
                raise ValueError(f"latents are {header['shape']}, the index says {shape}")
            if size > (most := 2 * (end - begin) + 2 * CHUNK):
                raise ValueError(f"latents have {size} bytes, more than {most} for {shape} are not read")
            if "crc32" in about and _crc32(file, offset, size) != about["crc32"]:
                raise ValueError("checksum of the latents differs from the one written")
            file.seek(offset + 8 + length + begin + start * frame_bytes)
            content = bytearray(file.read((stop - start) * frame_bytes))
        return torch.frombuffer(content, dtype=dtype).reshape(stop - start, *shape[1:])


def _crc32(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    checksum = 0
    for first in range(0, size, CHUNK):
        checksum = zlib.crc32(file.read(min(CHUNK, size - first)), checksum)
    return checksum
