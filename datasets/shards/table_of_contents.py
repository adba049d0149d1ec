"""Tables of contents: `NAME.toc` beside the shard `NAME.tar`, so that its samples are found with one read.

Without it the headers of the shard are read one by one, which a network file system answers one by one; that is still
done where there is no table, or one that does not fit. A table says nothing that the headers could not: with what a
header is refused for, no table is believed. It is bound to its shard by the SHA-256 in the index.
"""

import json
import tarfile
from pathlib import Path

from ..files import write_atomically
from .index import Sample, ShardInfo, check_member, scan

TABLE_BYTES = 64 << 20  # more than any has: about 100 bytes a clip


def toc_path(shard: Path) -> Path:
    return shard.with_suffix(".toc")


def write_toc(shard: Path, info: ShardInfo) -> None:
    """Write the table of a shard that was just written."""
    samples = [[sample.key, sample.parts] for sample in scan(shard)]
    write_atomically(toc_path(shard), json.dumps({"sha256": info.sha256, "samples": samples}).encode())


def read_toc(shard: Path, info: ShardInfo) -> list[Sample] | None:
    """All samples of a shard, in order; None where the table is missing, of another shard, or wrong."""
    try:
        with open(toc_path(shard), "rb") as file:
            fields = json.loads(file.read(TABLE_BYTES))
        if fields["sha256"] != info.sha256 or shard.stat().st_size != info.bytes:
            return None
        samples = [Sample(key, {x: (offset, size) for x, (offset, size) in parts.items()})
                   for key, parts in fields["samples"]]  # fmt: skip
        fits = all(
            check_member(shard, f"{sample.key}.{extension}", size) == (sample.key, extension)
            and type(offset) is type(size) is int
            and tarfile.BLOCKSIZE <= offset <= info.bytes - size
            for sample in samples
            for extension, (offset, size) in sample.parts.items()
        )
        once = len({sample.key for sample in samples}) == len(samples) == info.samples
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return samples if fits and once else None
