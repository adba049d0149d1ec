"""Files and folders that appear whole or not at all, whatever interrupts their writing."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

LOCK = ".lock"  # in a folder that is being written
TAIL_BYTES = 65536  # more than a line of any log


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Lock a file, open for reading and writing, until it is closed; False where another process has. A file and not
    its folder: over NFS a folder's lock holds on one machine only.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
