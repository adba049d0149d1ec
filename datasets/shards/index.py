"""Shards: plain tar files (WebDataset layout) with an `index.json` beside them.

A sample is `KEY.json` with `KEY.mp4` or `KEY.latent.safetensors` and optional `KEY.text.safetensors` and
`KEY.signals.safetensors`. Nothing is ever unpickled; names and sizes are checked before anything is allocated.
"""

import dataclasses
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from ..files import partial_file, sha256_of, write_atomically
from ..signals import MAX_SIGNALS, Signal
from ..statistics import Statistics
from .tar import normalise_name, tar_members

FORMAT = 3  # written only where there are signals; 2 where there are several buckets; otherwise 1
MAX_INDEX_BYTES = 256 << 20
MAX_INDEX_VALUES = 1 << 22  # numbers, texts, lists and objects of its JSON: `[]` takes 3 bytes there, 80 in memory
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.tar")
MAX_FRAMES = 1 << 16  # latent frames of a clip
MAX_SIDE = 1 << 14  # pixels of a side of video
MAX_PIXELS, MAX_BYTES = 1 << 26, 32 << 30  # of a frame and a clip of video: the limits of video.py
MAX_FACTOR = 1 << 10  # video frames of a latent frame
MAX_BUCKETS = 1 << 10
MAX_SHARD_BYTES = 1 << 50
SHOWN = 80  # characters of a value in a message
MAX_CLASSES = 1 << 20  # each is a row of weights in the model
SHA256 = re.compile("[0-9a-f]{64}")
STORES = {"video": "mp4", "latent": "latent.safetensors"}
# Extensions of members, and the most bytes that one may claim.
MEMBER_BYTES = {
    "json": 1 << 20,
    "mp4": 2 << 30,
    "latent.safetensors": 16 << 30,
    "text.safetensors": 256 << 20,
    "signals.safetensors": 256 << 20,
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

    def problem(self, channels: int, temporal_factor: int) -> str:
        """What is wrong with the sizes, each by itself or beside the others; "" if nothing is."""
        for name, size in (*vars(self).items(), ("channels", channels), ("temporal_factor", temporal_factor)):
            if size < 1:
                return f"{name} is {size}, it must be at least 1"
        f, h, w, video_f, video_h, video_w = dataclasses.astuple(self)
        if temporal_factor > MAX_FACTOR:
            return f"temporal_factor is {temporal_factor}, at most {MAX_FACTOR} are read"
        if f > MAX_FRAMES:
            return f"frames is {f}, at most {MAX_FRAMES} are read"
        if not (f - 1) * temporal_factor < video_f <= f * temporal_factor:
            return f"video_frames is {video_f}, frames is {f}, which is not one for each {temporal_factor} of video"
        # Both sides are reduced by one factor, and the last latent pixel may cover a part of that, or more.
        similar = video_h * (w - 1) < video_w * (h + 1) and video_w * (h - 1) < video_h * (w + 1)
        if h > video_h or w > video_w or not similar:
            return f"height x width is {h} x {w}, no reduction of video_height x video_width, {video_h} x {video_w}"
        if max(video_h, video_w) > MAX_SIDE:
            return f"video_height x video_width is {video_h} x {video_w}, at most {MAX_SIDE} pixels a side are read"
        if video_h * video_w > MAX_PIXELS:
            return f"video_height x video_width is {video_h} x {video_w}, at most {MAX_PIXELS} pixels are read"
        if (size := video_f * video_h * video_w * 3) > MAX_BYTES:
            return f"a clip of {self} takes {size} bytes as video, at most {MAX_BYTES} are read"
        if (size := self.latent_bytes(channels)) > MEMBER_BYTES[STORES["latent"]]:
            return (
                f"latents of {channels} channels take {size} bytes, at most {MEMBER_BYTES[STORES['latent']]} are read"
            )
        return ""

    def latent_bytes(self, channels: int) -> int:
        """Least size of a clip's latents, which are stored in two bytes each or four."""
        return 2 * self.frames * channels * self.height * self.width


@dataclass(frozen=True)
class Index:
    """Contents of `index.json` in a folder of shards. Sizes without `video_` are of latents.

    temporal_factor: video frames per latent frame. has_text: width of the text embeddings, or None. classes: number of
    labels, or 0. skipped: number of sources without a clip. buckets: shapes of the clips where there is more than one;
    the sizes are then those of the first. signals: of different names; a clip may lack any of them.
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
    signals: tuple[Signal, ...] = ()

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
        own = [{name: list[ShardInfo]() for name in self.splits} for _ in self.buckets]
        for name, shards in self.splits.items():
            for shard in shards:
                own[shard.bucket][name].append(shard)
        return [
            dataclasses.replace(self, **dataclasses.asdict(shape), buckets=(), splits=splits)
            for shape, splits in zip(self.buckets, own, strict=True)
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
    fields["format"] = 3 if index.signals else 2 if index.buckets else 1
    if not index.signals:
        del fields["signals"]
    if not index.buckets:
        del fields["buckets"]
        for shard in (shard for shards in fields["splits"].values() for shard in shards):
            del shard["bucket"]
    content = json.dumps(fields, indent=1, sort_keys=True).encode()
    for size, limit, unit in (
        (len(content), MAX_INDEX_BYTES, "bytes"), (count_values(content), MAX_INDEX_VALUES, "values")
    ):  # fmt: skip
        if size > limit:
            raise ValueError(
                f"{folder / 'index.json'} would have {size} {unit}, at most {limit} are read: convert to fewer than "
                f"{len(index.shards)} shards, with more clips in each (--clips-per-shard), or to several folders"
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


def count_values(content: bytes) -> int:
    """At least the number of values that JSON holds, without the memory that they take."""
    return 1 + sum(map(content.count, (b",", b"[", b"{")))


def parse_index(content: bytes, name: str) -> Index:
    """An index from the bytes of its file `name`, checked as far as that is possible without its shards."""
    if (values := count_values(content)) > MAX_INDEX_VALUES:
        raise ValueError(
            f"{name} holds {values} values, at most {MAX_INDEX_VALUES} are read: copy it or run `msc convert` again"
        )
    try:
        fields = json.loads(content)
        version = int(fields["format"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} is not an index of shards ({_short(error)}): run `msc convert` again") from None
    if version > FORMAT:
        raise ValueError(f"{name} has format {version}, this msc reads up to {FORMAT}: install a newer msc")
    try:
        fields["splits"] = {s: [ShardInfo(**x) for x in shards] for s, shards in fields["splits"].items()}
        fields["statistics"] = Statistics.from_json(fields["statistics"])
        fields["buckets"] = tuple(Shape(**shape) for shape in fields.get("buckets", ()))
        fields["signals"] = tuple(
            Signal(**{**signal, **{name: tuple(signal[name]) for name in ("columns", "mean", "std")}})
            for signal in fields.get("signals", ())
        )
        index = Index(**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} is damaged ({str(error)[:200]}): run `msc convert` again") from None
    if problem := _type_problem(content) or _value_problem(index) or _shards_problem(index):
        raise ValueError(f"{name} is damaged ({problem}): copy it or run `msc convert` again")
    return index


def _type_problem(content: bytes) -> str:
    """What is wrong with the types of an index's fields, or ""."""
    import pydantic

    try:
        pydantic.TypeAdapter(Index).validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:10]]
        return "; ".join(problems)[:1000]
    return ""


def _value_problem(index: Index) -> str:
    """What is wrong with the values of an index, whose types are right, or "". It may come from anybody."""
    if index.store not in STORES:
        return f"store is {_short(index.store)}, expected one of {', '.join(STORES)}"
    if len(index.buckets) > MAX_BUCKETS:
        return f"there are {len(index.buckets)} buckets, at most {MAX_BUCKETS} are read"
    for number, shape in enumerate(index.buckets or (index.shape,)):
        if problem := shape.problem(index.channels, index.temporal_factor):
            return f"buckets.{number}: {problem}" if index.buckets else problem
    if index.buckets and index.shape != index.buckets[0]:
        return f"its sizes are {index.shape}, its first bucket's {index.buckets[0]}"
    if not 0 < index.fps <= 1000:
        return f"fps is {index.fps}, it must be above 0 and at most 1000"
    if not 0 <= index.classes <= MAX_CLASSES:
        return f"there are {index.classes} classes, at most {MAX_CLASSES} are read"
    labels = index.settings.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return f"settings.labels is {_short(labels)}, expected a list of names"
    if index.classes and len(labels) not in (0, index.classes):
        return f"settings.labels has {len(labels)} names, classes is {index.classes}"
    most = MEMBER_BYTES["text.safetensors"]
    if index.has_text is not None and not 1 <= index.has_text <= most:
        return f"has_text is {index.has_text}, a width of text is from 1 to {most}"
    if index.skipped < 0:
        return f"skipped is {index.skipped}, it must not be negative"
    if len({signal.name for signal in index.signals}) != len(index.signals) or len(index.signals) > MAX_SIGNALS:
        return f"there are {len(index.signals)} signals, expected at most {MAX_SIGNALS} of different names"
    if problem := next((problem for signal in index.signals if (problem := signal.problem)), ""):
        return problem
    return index.statistics.problem(index.channels)


def _shards_problem(index: Index) -> str:
    """What is wrong with the shards of an index, or ""; their sizes on disk are left to `check_shards`."""
    shapes, names = index.buckets or (index.shape,), set[str]()
    for shard in index.shards:
        # Names become parts of paths, and of addresses where shards are streamed.
        if not SHARD_NAME.fullmatch(shard.name):
            return f"the shard name {_short(shard.name)} leaves the folder or is not one of msc"
        if shard.name in names:
            return f"{shard.name} is listed twice"
        names.add(shard.name)
        if not 0 <= shard.bytes < MAX_SHARD_BYTES:
            return f"{shard.name}: bytes is {shard.bytes}, it must be from 0 to {MAX_SHARD_BYTES}"
        if not SHA256.fullmatch(shard.sha256):
            return f"{shard.name}: sha256 is {_short(shard.sha256)}, expected 64 hexadecimal digits"
        if not 0 <= shard.bucket < len(shapes):
            return f"{shard.name}: bucket is {shard.bucket}, there are {len(shapes)}"
        # Two members, each with a header; video of at least a byte a frame; text of at least a byte a value.
        shape = shapes[shard.bucket]
        media = shape.latent_bytes(index.channels) if index.store == "latent" else shape.video_frames
        least = 2 * tarfile.BLOCKSIZE + media + (index.has_text or 0)
        if not 0 <= shard.samples * least <= shard.bytes:
            return (
                f"{shard.name}: samples is {shard.samples}, of at least {least} bytes each with the frames, sizes and "
                f"text that the index names; bytes is {shard.bytes}"
            )
    return ""


def _short(value: Any) -> str:
    """A value from a file for a message, however long it is."""
    text = repr(value[:SHOWN] if isinstance(value, str | list) else value)
    return text if len(text) <= 2 * SHOWN else text[: 2 * SHOWN] + "…"


def check_shards(folder: str | Path, index: Index) -> None:
    """FileNotFoundError or ValueError for a shard that is missing or of another size than the index says. One request
    to the file system per shard: not for thousands of ranks at once.
    """
    for shard in index.shards:
        path = Path(folder, shard.name)
        if not path.is_file():
            problem = "is not a file" if path.exists() else "is missing"
            raise FileNotFoundError(f"shard {path} {problem}: copy it again or run `msc convert` again")
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
