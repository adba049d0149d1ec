"""Tables of contents: `NAME.toc` beside the shard `NAME.tar`, which gives the place of its samples in one read.

Scanning a shard reads its headers one by one, slowly on a network file system; that is the fallback where the table is
missing or invalid. A table is bound to its shard by the SHA-256 in the index, and held to the same rules as headers.
"""

import json
import tarfile
from pathlib import Path

from ..files import write_atomically
from .index import Sample, ShardInfo, check_member, count_values, scan

MAX_TOC_BYTES = 64 << 20  # about 100 bytes a clip
MAX_VALUES = 32  # of a clip in JSON: with three parts it has 14


def toc_path(shard: Path) -> Path:
    return shard.with_suffix(".toc")


def write_toc(shard: Path, info: ShardInfo) -> None:
    """Write the table of a shard that was just written."""
    samples = [[sample.key, sample.parts] for sample in scan(shard)]
    write_atomically(toc_path(shard), json.dumps({"sha256": info.sha256, "samples": samples}).encode())


def read_toc(shard: Path, info: ShardInfo) -> list[Sample] | None:
    """All samples of a shard, in order; None where the table is missing, of another shard, or invalid."""
    path = toc_path(shard)
    try:
        if not path.is_file():  # whoever opened a named pipe would wait for ever
            return None
        with open(path, "rb") as file:
            content = file.read(MAX_TOC_BYTES)
        if count_values(content) > MAX_VALUES * (info.samples + 1):
            return None
        fields = json.loads(content)
        if fields["sha256"] != info.sha256 or shard.stat().st_size != info.bytes:
            return None
        samples = [
            Sample(key, {extension: (offset, size) for extension, (offset, size) in parts.items()})
            for key, parts in fields["samples"]
        ]
        valid = all(
            check_member(shard, f"{sample.key}.{extension}", size) == (sample.key, extension)
            and type(offset) is type(size) is int
            and tarfile.BLOCKSIZE <= offset <= info.bytes - size
            for sample in samples
            for extension, (offset, size) in sample.parts.items()
        )
        unique = len({sample.key for sample in samples}) == len(samples) == info.samples
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return samples if valid and unique else None
