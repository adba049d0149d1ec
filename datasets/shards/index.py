"""Shards: plain tar files (WebDataset layout) with an `index.json` beside them.

A sample is `KEY.json` with `KEY.mp4` or `KEY.latent.safetensors` and an optional `KEY.text.safetensors`. Nothing is
ever unpickled; names and sizes are checked before anything is allocated.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from ..files import describe_validation_error, partial_file, sha256_of, write_atomically
from ..statistics import Statistics
from .tar import normalise_name, tar_members

FORMAT = 2  # written only where there are several buckets; otherwise format 1
MAX_INDEX_BYTES = 256 << 20
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.tar")
MAX_COUNT = 1 << 31  # of clips in a shard, pixels of a side
MAX_CLASSES = 1 << 20  # each is a row of weights in the model
SHA256 = re.compile("[0-9a-f]{64}")
STORES = {"video": "mp4", "latent": "latent.safetensors"}
# Extensions of members, and the most bytes that one may claim.
MEMBER_BYTES = {
    "json": 1 << 20,
    "mp4": 2 << 30,
    "latent.safetensors": 16 << 30,
    "text.safetensors": 256 << 20,
}


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a split. sha256: in hex. bucket: number of the index's bucket that its clips are of."""

    name: str
    samples: int
    bytes: int
    sha256: str
    bucket: int = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of the clips of a bucket, in latents and in video."""

    frames: int
    height: int
    width: int
    video_frames: int
    video_height: int
    video_width: int

    def __str__(self) -> str:
        return f"{self.video_frames}x{self.video_height}x{self.video_width}"


@dataclass(frozen=True)
class Index:
    """Contents of `index.json` in a folder of shards. Sizes without `video_` are of latents.

    temporal_factor: video frames per latent frame. has_text: width of the text embeddings, or None. classes: number of
    labels, or 0. skipped: number of sources without a clip. buckets: shapes of the clips where there is more than one;
    the sizes are then those of the first.
    """

    store: str
    autoencoder: str
    temporal_factor: int
    channels: int
    frames: int
    height: int
    width: int
    video_frames: int
    video_height: int
    video_width: int
    fps: float
    splits: dict[str, list[ShardInfo]]
    statistics: Statistics
    settings: dict[str, Any]
    skipped: int = 0
    has_text: int | None = None
    classes: int = 0
    format: int = 1
    buckets: tuple[Shape, ...] = ()

    @property
    def shards(self) -> list[ShardInfo]:
        """Of all splits."""
        return [shard for shards in self.splits.values() for shard in shards]

    @property
    def shape(self) -> Shape:
        """Shape of the clips of the first bucket."""
        return Shape(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Shape)})

    def by_bucket(self) -> "list[Index]":
        """One index of a single shape for every bucket, in order."""
        if not self.buckets:
            return [self]
        return [
            dataclasses.replace(
                self,
                **dataclasses.asdict(shape),
                buckets=(),
                splits={name: [x for x in shards if x.bucket == number] for name, shards in self.splits.items()},
            )
            for number, shape in enumerate(self.buckets)
        ]

    def samples(self, split: str) -> int:
        """Number of samples in `split`; ValueError where the folder has no such split."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r} in these shards, only {', '.join(self.splits)}")
        return sum(shard.samples for shard in self.splits[split])


# --- index.json --------------------------------------------------------------------------------------------


def write_index(folder: Path, index: Index) -> None:
    """Write `folder/index.json` atomically, as the last file of a folder: its presence means complete. ValueError where
    it is larger than is read back.
    """
    fields = dataclasses.asdict(index)
    fields["statistics"] = index.statistics.to_json()
    fields["format"] = 2 if index.buckets else 1
    if not index.buckets:
        del fields["buckets"]
        for shard in (shard for shards in fields["splits"].values() for shard in shards):
            del shard["bucket"]
    content = json.dumps(fields, indent=1, sort_keys=True).encode()
    if len(content) > MAX_INDEX_BYTES:
        raise ValueError(
            f"{folder / 'index.json'} would have {len(content)} bytes, at most {MAX_INDEX_BYTES} are read: convert to "
            f"fewer than {len(index.shards)} shards, with more clips in each (--clips-per-shard), or to several folders"
        )
    write_atomically(folder / "index.json", content)


def read_index(folder: str | Path) -> Index:
    """Read and check `folder/index.json`, but no shard (see `check_shards`). FileNotFoundError where it is missing,
    ValueError where it is damaged or of a newer format.
    """
    return parse_index(index_content(folder), str(Path(folder, "index.json")))


def index_content(folder: str | Path) -> bytes:
    """The bytes of `folder/index.json`."""
    folder, path = Path(folder), Path(folder, "index.json")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of shards at {folder}: make one with `msc convert`")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no index.json: run `msc convert` first")
    with open(path, "rb") as file:
        content = file.read(MAX_INDEX_BYTES + 1)
    if len(content) > MAX_INDEX_BYTES:
        raise ValueError(f"{path} has more than the {MAX_INDEX_BYTES} bytes that an index of shards may have")
    return content


def parse_index(content: bytes, name: str) -> Index:
    """An index from the bytes of its file `name`, checked as far as that is possible without its shards."""
    try:
        fields = json.loads(content)
        version = int(fields["format"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} is not an index of shards ({error!r}): run `msc convert` again") from None
    if version > FORMAT:
        raise ValueError(f"{name} has format {version}, this msc reads up to {FORMAT}: install a newer msc")
    try:
        fields["splits"] = {s: [ShardInfo(**x) for x in shards] for s, shards in fields["splits"].items()}
        fields["statistics"] = Statistics.from_json(fields["statistics"])
        fields["buckets"] = tuple(Shape(**shape) for shape in fields.get("buckets", ()))
        index = Index(**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} is damaged ({error}): run `msc convert` again") from None
    if problem := _problem(index, content):
        raise ValueError(f"{name} is damaged ({problem}): run `msc convert` again")
    return index


def _problem(index: Index, content: bytes) -> str:
    """What is wrong with the values of an index, or "". Its file may come from anybody."""
    import pydantic

    try:
        pydantic.TypeAdapter(Index).validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        return describe_validation_error(error, values=False)
    if index.store not in STORES:
        return f"store is {index.store!r}, expected one of {', '.join(STORES)}"
    sizes = [size for shape in (index.shape, *index.buckets) for size in dataclasses.astuple(shape)]
    if not all(1 <= size < MAX_COUNT for size in (*sizes, index.temporal_factor, index.channels)):
        return "a size is not positive, or beyond any clip"
    if index.buckets and index.shape != index.buckets[0]:
        return f"its sizes are {index.shape}, its first bucket's {index.buckets[0]}"
    if not 0 < index.fps <= 1000:
        return f"fps is {index.fps}"
    if not (0 <= index.classes <= MAX_CLASSES and (index.has_text is None or 1 <= index.has_text < MAX_COUNT)):
        return f"there are {index.classes} classes, text of width {index.has_text}"
    for shard in index.shards:
        # Names become parts of paths, and of addresses where shards are streamed.
        if not SHARD_NAME.fullmatch(shard.name):
            return f"the shard name {shard.name!r} leaves the folder or is not one of msc"
        if not (0 <= shard.samples < MAX_COUNT and 0 <= shard.bytes < 1 << 50 and SHA256.fullmatch(shard.sha256)):
            return f"{shard.name} has {shard.samples} samples, {shard.bytes} bytes, checksum {shard.sha256[:80]!r}"
        if not 0 <= shard.bucket < max(1, len(index.buckets)):
            return f"{shard.name} is of bucket {shard.bucket}, there are {max(1, len(index.buckets))}"
    return index.statistics.problem(index.channels)


def check_shards(folder: str | Path, index: Index) -> None:
    """FileNotFoundError or ValueError for a shard that is missing or of another size than the index says. One request
    to the file system per shard: not for thousands of ranks at once.
    """
    for shard in index.shards:
        path = Path(folder, shard.name)
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} is missing: copy it again or run `msc convert` again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"shard {path} has {size} bytes, its index says {shard.bytes}: copy it again")


def corrupted_shards(folder: str | Path, index: Index) -> list[str]:
    """Names of the shards whose SHA-256 is not the one in the index. Reads every byte."""
    return [shard.name for shard in index.shards if sha256_of(Path(folder) / shard.name) != shard.sha256]


# --- writing -----------------------------------------------------------------------------------------------


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardInfo:
    """Write `(key, {extension: content})` samples to the tar `path`, atomically; equal samples give equal bytes (fixed
    times and owners). ValueError for a name that `scan` would refuse.
    """
    count = 0
    with partial_file(path) as partial:
        with (
            open(partial, "wb") as file,
            TarWriter(file, user="msc", group="msc", encoder=False, compress=False, mtime=0) as tar,
        ):
            for key, parts in samples:
                for extension, content in parts.items():
                    check_member(path, f"{key}.{extension}", len(content))
                tar.write({"__key__": key, **parts})
                count += 1
        return ShardInfo(path.name, count, partial.stat().st_size, sha256_of(partial))


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Where the parts of one sample lie in a tar: extension -> (offset in bytes, size in bytes)."""

    key: str
    parts: dict[str, tuple[int, int]]


def scan(path: str | Path) -> list[Sample]:
    """All samples of a shard in order, from its headers alone. ValueError for a member that is not a part of a sample,
    by name or size, and for all that `tar_members` refuses.
    """
    samples: dict[str, Sample] = {}
    for name, member in tar_members(Path(path), plain=True).items():
        key, extension = check_member(path, name, member.size)
        samples.setdefault(key, Sample(key, {})).parts[extension] = (member.offset, member.size)
    return list(samples.values())


def check_member(path: str | Path, name: str, size: int) -> tuple[str, str]:
    """(key, extension) of a member's name, or ValueError."""
    folder, slash, base = normalise_name(Path(path), name).rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or extension not in MEMBER_BYTES:
        raise ValueError(f"{path}: {name!r} is refused, only {', '.join('.' + x for x in MEMBER_BYTES)} are read")
    if not 0 <= size <= MEMBER_BYTES[extension]:
        raise ValueError(f"{path}: {name!r} claims {size} bytes, at most {MEMBER_BYTES[extension]} are read")
    return f"{folder}{slash}{stem}", extension


def find_part(path: str | Path, sample: Sample, extension: str) -> tuple[int, int]:
    """(offset, size) of one part of a sample; ValueError where the sample has no such part."""
    if extension not in sample.parts:
        raise ValueError(f"{path}: sample {sample.key!r} has no .{extension}")
    return sample.parts[extension]


def read_part(path: str | Path, sample: Sample, extension: str) -> bytes:
    """The bytes of one part of a sample; ValueError where the sample has no such part."""
    offset, size = find_part(path, sample, extension)
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise ValueError(f"{path} is truncated in {sample.key}.{extension}")
    return content
