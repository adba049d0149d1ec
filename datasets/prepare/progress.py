"""Conversion progress: which groups of sources are done, and who may write.

The sources are divided into groups that do not depend on who converts them; a group's shards hold its clips alone. An
unfinished conversion to `out` lies in the hidden folder `.NAME.partial` beside it: finished shards, and in `.work` the
plan, one record per finished group and a folder per process. A record is written last and proves its group done, so
that processes may be killed, added and restarted at will: whoever converts a group writes the same bytes.
"""

import dataclasses
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import LOCK, clear_folder, sync_folder, try_lock, write_atomically
from ..shards.index import ShardInfo
from ..shards.table_of_contents import toc_path
from .sources import Source

WORK = ".work"
GROUP_BYTES = 1 << 30  # of source files, after which a group ends: the most a killed process has to do again


@dataclass(frozen=True)
class SourceResult:
    """What a source gave: number of clips per split, or why it was skipped.

    ticks: frames on its timeline. unreadable: the file is at fault, it is not only too short. left_out: which parts
    of it are not used, and why. frames: of all its clips. lost_rows: of its signals, between frames.
    """

    name: str
    ticks: int
    clips: dict[str, int]
    skipped: str = ""
    unreadable: bool = False
    left_out: tuple[str, ...] = ()
    frames: int = 0
    lost_rows: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupRecord:
    """Shards per split and results of a finished group."""

    shards: dict[str, list[ShardInfo]]
    results: list[SourceResult]


def group_sources(sources: list[Source], clips_per_shard: int) -> list[range]:
    """Numbers of the sources of each group: about a shard's worth of sources that give a clip each, fewer where
    they are large. Sources from the same file count its size once.
    """
    groups, first, size = [], 0, 0
    for number, source in enumerate(sources):
        if number == first or source.path != sources[number - 1].path:
            size += max(0, source.size)
        if size >= GROUP_BYTES or number + 1 - first >= clips_per_shard or number + 1 == len(sources):
            groups.append(range(first, number + 1))
            first, size = number + 1, 0
    return groups


def partial_path(out: Path) -> Path:
    """Folder of the unfinished conversion to `out`."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def conversion_folder(out: Path, exclusive: bool) -> Iterator[Path]:
    """The folder of the unfinished conversion to `out`, with what earlier processes finished; removed on an error if
    nothing in it is worth keeping. exclusive: no other process may be working in it; the others share it.

    FileExistsError where another process is in the way.
    """
    partial = partial_path(out)
    (partial / WORK).mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "a+") as lock:
        if not try_lock(lock, shared=not exclusive):
            raise FileExistsError(f"another process is writing {out}: wait for it to end")
        try:
            yield partial
        except BaseException:
            if exclusive and not any(list((partial / WORK).glob(kept)) for kept in ("group-*.json", "process-*")):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def process_folder(partial: Path, exclusive: bool) -> Iterator[Path]:
    """A folder for this process's unfinished files, removed at the end; folders of killed processes are removed now."""
    host = socket.gethostname()
    for abandoned in (partial / WORK).glob("process-*" if exclusive else f"process-{host}-*"):
        try:
            with open(abandoned / LOCK, "r+") as file:
                if try_lock(file):  # otherwise its process is alive
                    shutil.rmtree(abandoned, ignore_errors=True)
        except FileNotFoundError:  # another process was faster; or one was killed while it removed it
            if exclusive:
                shutil.rmtree(abandoned, ignore_errors=True)
    token = secrets.token_hex(4)  # process ids are not unique where containers share a host name
    new, own = (partial / WORK / f"{kind}-{host}-{token}" for kind in ("new", "process"))
    new.mkdir()
    try:
        with open(new / LOCK, "a+") as lock:
            try_lock(lock)
            new.rename(own)  # locked before it has the name that others look for
            yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)  # after its lock is closed: NFS keeps files that are open


def check_plan(partial: Path, plan: dict[str, Any], exclusive: bool, overwrite: bool) -> None:
    """ValueError, naming the difference, where a conversion with another plan was begun here. With `exclusive` that one
    is dropped if none of its groups is finished, or with `overwrite`.
    """
    path = partial / WORK / "plan.json"
    new = json.loads(json.dumps(plan))  # as it comes back from the file
    old = json.loads(path.read_text()) if path.is_file() else new
    if old == new:
        return
    if not exclusive or (not overwrite and list(path.parent.glob("group-*.json"))):
        before, now = ({**fields, **fields.get("settings", {})} for fields in (old, new))
        names = sorted({*before, *now} - {"settings"}, key=lambda x: (x == "digest", x))  # which says least
        name = next(x for x in names if before.get(x) != now.get(x))
        raise ValueError(
            f"{partial} holds unfinished work with another {name} ({before.get(name)} then, {now.get(name)} now): "
            "use the same settings and sources to continue it, or remove that folder to start again"
        )
    clear_folder(partial)
    path.parent.mkdir()


def write_shared_json(own: Path, path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` atomically, through the process's folder, whoever else writes it."""
    write_atomically(own / path.name, json.dumps(value, indent=1, sort_keys=True).encode())
    os.replace(own / path.name, path)
    sync_folder(path.parent)


def finish_group(own: Path, partial: Path, number: int, record: GroupRecord) -> None:
    """Move a group's shards from the process's folder into place, then prove them done."""
    for shard in (shard for shards in record.shards.values() for shard in shards):
        for path in (own / shard.name, toc_path(own / shard.name)):
            os.replace(path, partial / path.name)
    sync_folder(partial)
    write_shared_json(own, partial / WORK / f"group-{number:06d}.json", dataclasses.asdict(record))


def count_finished_groups(out: Path, part: tuple[int, int] | None = None) -> int:
    """Number of finished groups of an unfinished conversion to `out`; with `part` (i, N) only of that part."""
    own, parts = part or (0, 1)
    records = (partial_path(out) / WORK).glob("group-*.json")
    return sum(int(path.stem.removeprefix("group-")) % parts == own for path in records)


def read_group(partial: Path, number: int) -> GroupRecord | None:
    """The record of a group; None where it is not finished."""
    path = partial / WORK / f"group-{number:06d}.json"
    if not path.is_file():
        return None
    fields = json.loads(path.read_text())
    shards = {name: [ShardInfo(**shard) for shard in shards] for name, shards in fields["shards"].items()}
    results = [SourceResult(**{**result, "left_out": tuple(result["left_out"])}) for result in fields["results"]]
    return GroupRecord(shards, results)
