"""Files and folders that appear whole or not at all, whatever interrupts their writing."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

LOCK = ".lock"  # in a folder that is being written
TAIL_BYTES = 65536  # more than a line of any log


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, never a part. Of several that write
    it at once, one is the last."""
    word = secrets.token_hex(4)  # numbers of processes are not unique where containers share a host's name
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{word}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file that tells what a run did. Where that cannot be written, as on a full disk, the line
    is lost, which is said: no reason to end a run whose next checkpoint may find room. Nor is half a line left, at
    which readers would stop."""
    line = (json.dumps(record) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) != len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        print(f"msc: a line of {path} is lost: {error.strerror}", file=sys.stderr, flush=True)


class Forgiving:
    """A stream of text that loses what cannot be written: a log on a full disk must not end what it tells of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a .jsonl file, however long the file is; {} if there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except ValueError:  # torn by a crash
            continue
    return {}


def check_replaceable(out: Path, overwrite: bool, proof: str) -> None:
    """FileExistsError where `out` must not be written: it is a file, or not empty. With `overwrite` it may
    be full if it holds a file named `proof`, which shows that it is ours to replace.
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
    """An empty hidden folder beside `out`, removed on any error; what a killed process left there goes too.

    FileExistsError where another process is writing to the same place.
    """
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "a+") as lock:
        if not lock_now(lock):
            raise FileExistsError(f"another process is writing {out}: wait for it to end")
        try:
            clear(partial)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def lock_now(file: TextIO, shared: bool = False) -> bool:
    """Lock a file, open for reading and writing, until it is closed; False where another process has, or had and
    removed it. A file and not its folder: over NFS a folder's lock holds on one machine only.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def clear(folder: Path) -> None:
    """Remove all that is in a folder but its lock."""
    for left in folder.iterdir():
        if left.name != LOCK:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process or thread is in here with `path`, a file that stays."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; an older `out` is moved aside first and removed last."""
    old = out.with_name(f".{out.name}.old")
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(partial, out)
    (out / LOCK).unlink(missing_ok=True)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
