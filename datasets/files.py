"""Files and folders: atomic writes, JSONL logs, locks, free space, checksums, retries."""

import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

LOCK = ".lock"  # in a folder that is being written
TAIL_BYTES = 65536  # more than a line of any log
T = TypeVar("T")
log = logging.getLogger(__name__)


# --- atomic writes -----------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, never a part of it. With several
    writers at once the last wins. sync: also survive a power cut."""
    with partial_file(path, sync) as partial:
        partial.write_bytes(content)


@contextmanager
def partial_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """A file name beside `path`, of this call alone, to write to; renamed to `path` at the end, removed on any error.

    sync: flush the file and its folder to disk, so that it survives a power cut.
    """
    # Random, because process ids are not unique where containers share a host name.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if sync:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(out: Path, overwrite: bool, proof: str) -> None:
    """FileExistsError where `out` must not be written: it is a file, or a folder that is not empty. With `overwrite` a
    folder is replaced if it holds a file named `proof`, which shows that msc wrote it.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is not empty: choose another folder, or replace it with --overwrite")
    if not (out / proof).is_file():
        raise FileExistsError(f"{out} has no {proof} and is not replaced: choose another folder")


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out` to write to, then to publish; removed on any error. What a killed process
    left in it is removed first. FileExistsError where another process is writing to the same place.
    """
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "a+") as lock:
        if not try_lock(lock):
            raise FileExistsError(f"another process is writing {out}: wait for it to end")
        try:
            clear_folder(partial)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def clear_folder(folder: Path) -> None:
    """Remove everything in a folder except its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish_folder(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; an older `out` is moved aside first and removed last."""
    old = out.with_name(f".{out.name}.old")
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(partial, out)
    (out / LOCK).unlink(missing_ok=True)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


# --- locks -------------------------------------------------------------------------------------------------
# On a file, not on its folder: over NFS a lock on a folder holds on one machine only.


def try_lock(file: TextIO | BinaryIO, shared: bool = False) -> bool:
    """Lock a file, open for reading and writing, until it is closed or its process ends. False where another process
    holds the lock, or held it and removed the file."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False


@contextmanager
def locked(path: Path, required: bool = True) -> Iterator[None]:
    """Wait until no other process or thread is in this block with the lock file `path`, which stays.

    required: OSError on file systems without locks; otherwise go on without one.
    """
    with open(path, "w") as file:
        with nullcontext() if required else suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- JSONL -------------------------------------------------------------------------------------------------


def append_jsonl(path: Path, record: Mapping[str, Any], required: bool = False) -> None:
    """Append a record as a line of JSON; on a full disk all of the line or nothing. A number that is not finite, which
    JSON cannot express, is written as null.

    required: OSError where it cannot be written, and it survives a power cut. Otherwise a warning: a lost line of a log
    is no reason to end a run whose next checkpoint may find room.
    """
    line = (json.dumps(finite_or_none(record), allow_nan=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) != len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if required:
                os.fsync(file.fileno())
    except OSError as error:
        if required:
            raise
        log.warning("a line of %s is lost: %s", path, error.strerror)


def finite_or_none(value: Any) -> Any:
    """JSON's plain values, with None for each number in them that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a JSONL file, without lines that a crash left incomplete; [] if there is no file."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def last_jsonl_record(path: Path) -> dict[str, Any]:
    """The last complete record of a JSONL file, read from its end; {} if there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with suppress(ValueError):
            return dict(json.loads(line))
    return {}


# --- disk --------------------------------------------------------------------------------------------------


def free_bytes(path: Path) -> int:
    """Free space in bytes on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(
        next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    ).free


def format_bytes(size: float) -> str:
    """A size in the unit that leaves one to three digits before the point, such as `3.2 MB`."""
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)) if size >= f or f == 1)
    return f"{size:.0f} bytes" if factor == 1 else f"{size / factor:.1f} {unit}"


def sha256_of(file: Path | io.BufferedIOBase) -> str:
    """SHA-256 in hex of a file, or of what an open file holds from its position on."""
    with open(file, "rb") if isinstance(file, Path) else nullcontext(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- retries -----------------------------------------------------------------------------------------------


def retry(function: Callable[[], T], pauses: Sequence[float], retriable: Callable[[Exception], bool]) -> T:
    """Call `function` until it returns, again after each of `pauses` in seconds where its error is `retriable`;
    otherwise, and at last, its error is raised."""
    for pause in pauses:
        try:
            return function()
        except Exception as error:
            if not retriable(error):
                raise
        time.sleep(pause)
    return function()
