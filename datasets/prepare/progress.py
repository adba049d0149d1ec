"""A conversion on its way: what is done, what is left, and who may write.

The sources are divided into groups that do not depend on who converts them; a group's shards hold its clips
alone. Work on `out` lies in the hidden folder `.NAME.partial` beside it: finished shards, and in `.work` the plan,
one record per finished group and a folder per process. A record is written last and proves its group done, so
that processes may be killed, added and started again at will: whoever converts a group writes the same bytes.
"""

import dataclasses
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import LOCK, clear_folder, sync_folder, try_lock, write_atomically
from ..shards.index import ShardInfo
from ..shards.table_of_contents import toc_path
from .sources import Source

WORK = ".work"
GROUP_BYTES = 1 << 30  # of source files, after which a group ends: what a killed process does again, at most


@dataclass(frozen=True)
class Outcome:
    """What became of a source: clips per split, or why it was skipped.

    ticks: frames on its timeline. broken: the file is at fault. left_out: which of its clips are not used, and why.
    frames: of all its clips.
    """

    name: str
    ticks: int
    clips: dict[str, int]
    skipped: str = ""
    broken: bool = False
    left_out: tuple[str, ...] = ()
    frames: int = 0


@dataclass(frozen=True)
class Record:
    """What a finished group holds."""

    shards: dict[str, list[ShardInfo]]
    outcomes: list[Outcome]


def groups(sources: list[Source], clips_per_shard: int) -> list[range]:
    """Numbers of the sources of each group: about a shard's worth of sources that give a clip each, fewer where
    they are large. Sources from the same file count its size once.
    """
    made, first, size = [], 0, 0
    for number, source in enumerate(sources):
        if number == first or source.path != sources[number - 1].path:
            size += max(0, source.size)
        if size >= GROUP_BYTES or number + 1 - first >= clips_per_shard or number + 1 == len(sources):
            made.append(range(first, number + 1))
            first, size = number + 1, 0
    return made


@contextmanager
def working_folder(out: Path, alone: bool) -> Iterator[Path]:
    """The folder in which `out` is made, with what earlier processes finished; removed on an error if that is
    nothing, and nobody's work lies there. `alone`: no other process may be working in it, else only those that are
    alone are refused.

    FileExistsError where another process is in the way.
    """
    partial = out.with_name(f".{out.name}.partial")
    (partial / WORK).mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "a+") as lock:
        if not try_lock(lock, shared=not alone):
            raise FileExistsError(f"another process is writing {out}: wait for it to end")
        try:
            yield partial
        except BaseException:
            if alone and not any(list((partial / WORK).glob(kept)) for kept in ("group-*.json", "process-*")):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def own_folder(partial: Path, alone: bool) -> Iterator[Path]:
    """A folder for this process's unfinished files, removed at the end; those of killed processes go now."""
    host = socket.gethostname()
    for left in (partial / WORK).glob("process-*" if alone else f"process-{host}-*"):
        try:
            with open(left / LOCK, "r+") as file:
                if try_lock(file):  # else its process lives
                    shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:  # another process was faster; or one was killed that removed it
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    word = secrets.token_hex(4)  # numbers of processes are not unique where containers share a host's name
    new, own = (partial / WORK / f"{kind}-{host}-{word}" for kind in ("new", "process"))
    new.mkdir()
    try:
        with open(new / LOCK, "a+") as lock:
            try_lock(lock)
            new.rename(own)  # locked before it has a name that others look for
            yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)  # after its lock is closed: NFS keeps what is open


def check_plan(partial: Path, plan: dict[str, Any], alone: bool, overwrite: bool) -> None:
    """Check that `plan` is what was begun here. Other work is dropped by whoever is alone, if nothing of it was
    finished or with `overwrite`. Raises ValueError that names the difference.
    """
    path = partial / WORK / "plan.json"
    new = json.loads(json.dumps(plan))  # as it comes back from the file
    old = json.loads(path.read_text()) if path.is_file() else new
    if not (differ := _difference(old, new)):
        return
    if not alone or (not overwrite and list(path.parent.glob("group-*.json"))):
        raise ValueError(
            f"{partial} holds unfinished work with another {differ}: give the same settings and sources to go on "
            "with it, or remove that folder to begin anew"
        )
    clear_folder(partial)
    path.parent.mkdir()


def keep(own: Path, path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, whole or not at all, whoever else writes it at this moment."""
    write_atomically(own / path.name, json.dumps(value, indent=1, sort_keys=True).encode())
    os.replace(own / path.name, path)
    sync_folder(path.parent)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing in which two plans differ."""
    plans = [{**{k: v for k, v in plan.items() if k != "settings"}, **plan.get("settings", {})} for plan in (old, new)]
    names = sorted(set(plans[0]) | set(plans[1]))
    differ = [name for name in names if plans[0].get(name) != plans[1].get(name)]
    return f"{differ[0]} ({plans[0].get(differ[0])} then, {plans[1].get(differ[0])} now)" if differ else ""


def finish_group(own: Path, partial: Path, number: int, record: Record) -> None:
    """Move a group's shards from the process's folder into place, then prove them done."""
    for shards in record.shards.values():
        for shard in shards:
            for path in (own / shard.name, toc_path(own / shard.name)):
                os.replace(path, partial / path.name)
    sync_folder(partial)
    keep(own, partial / WORK / f"group-{number:06d}.json", dataclasses.asdict(record))


def count_finished_groups(out: Path, part: tuple[int, int] | None = None) -> int:
    """How many groups are finished of a conversion to `out` that is on its way; of part (i, N) its own."""
    own, parts = part or (0, 1)
    records = (out.with_name(f".{out.name}.partial") / WORK).glob("group-*.json")
    return sum(int(path.stem.removeprefix("group-")) % parts == own for path in records)


def read_record(partial: Path, number: int) -> Record | None:
    """The record of a finished group; None where it is not finished."""
    path = partial / WORK / f"group-{number:06d}.json"
    if not path.is_file():
        return None
    fields = json.loads(path.read_text())
    shards = {name: [ShardInfo(**shard) for shard in shards] for name, shards in fields["shards"].items()}
    outcomes = [Outcome(**{**fields, "left_out": tuple(fields["left_out"])}) for fields in fields["outcomes"]]
    return Record(shards, outcomes)
