"""Files that lie in a plain tar, found by its headers and read where they lie: nothing is unpacked.

A tar may come from anybody. Links and devices, names that leave the folder, a name twice and extended headers that say
more than a name, times and owners are refused, by the member, before anything of a claimed size is allocated.
"""

import errno
import io
import re
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

EXTENDED_BYTES = 1 << 16  # the most that a header with a long name, or with times, may have
RECORD = re.compile(rb"(\d{1,5}) ([^=\n]+)=")  # of such a header: its length, what it says, =, value


@dataclass(frozen=True)
class Member:
    """A file inside of another: `size` bytes from `offset` on."""

    path: Path
    offset: int
    size: int


Location = Path | Member
FILE_ERRORS = {errno.EIO, errno.EACCES, errno.EPERM}  # a bad sector, no permission; others speak of disk or server
PATIENCE = (2, 20)  # seconds between tries to read such a file
T = TypeVar("T")


def size_of(place: Location) -> int:
    """In bytes; -1 for what is no file."""
    if isinstance(place, Member):
        return place.size
    return place.stat().st_size if place.is_file() else -1


def retry_read(read: Callable[[], T]) -> T:
    """What `read` returns, tried again where one file cannot be read; its last OSError."""
    pauses = iter(PATIENCE)
    while True:
        try:
            return read()
        except OSError as error:
            if error.errno not in FILE_ERRORS or (pause := next(pauses, None)) is None:
                raise
            time.sleep(pause)


def open_bytes(place: Location) -> io.BufferedReader:
    """To be read from, with a beginning and an end of its own."""
    return io.BufferedReader(_Part(place)) if isinstance(place, Member) else open(place, "rb")


class _Part(io.RawIOBase):
    def __init__(self, member: Member) -> None:
        self.file, self.member, self.at = open(member.path, "rb", buffering=0), member, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.member.size}[whence]
        if at < 0:
            raise ValueError(f"seek to {at}")
        self.at = at
        return at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.at >= self.member.size:  # perhaps where no file can be
            return 0
        self.file.seek(self.member.offset + self.at)
        read = self.file.readinto(memoryview(buffer)[: self.member.size - self.at])
        self.at += read
        return read

    def close(self) -> None:
        self.file.close()
        super().close()


def tar_members(tar: Path) -> dict[str, Member]:
    """The plain files in a tar by their names, in its order.

    ValueError, naming the tar and the member, for all else but folders, and for a tar that is damaged, cut off or
    compressed.
    """
    end = tar.stat().st_size
    found: dict[str, Member] = {}
    offset, longer = 0, ""  # a name that stands in a header of its own before the member's
    with open(tar, "rb") as file:
        while True:
            file.seek(offset)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) == tarfile.BLOCKSIZE and not any(block):
                return found  # the archive's end mark
            if len(block) < tarfile.BLOCKSIZE:
                raise ValueError(f"{tar} is cut off at byte {end}: copy it again, or leave it out")
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                why = "is damaged" if offset else "is no plain tar (compressed ones are not read)"
                raise ValueError(f"{tar} {why} at byte {offset} ({error})") from None
            name, size, begin = longer or header.name, header.size, offset + tarfile.BLOCKSIZE
            if not 0 <= size <= end - begin:
                raise ValueError(f"{tar} is cut off: {name!r} claims {size} bytes, past its end; copy it again")
            offset, longer = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, ""
            if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                if size > EXTENDED_BYTES:
                    raise ValueError(f"{tar}: an extended header at byte {begin} claims {size} bytes; refused")
                content = file.read(size)
                longer = _pax_name(tar, content) if header.type == tarfile.XHDTYPE else _text(content.rstrip(b"\0"))
            elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                name = _inside(tar, name)
                if name in found:
                    raise ValueError(f"{tar}: {name!r} is there twice")
                found[name] = Member(tar, begin, size)
            elif header.type != tarfile.DIRTYPE:
                kind = "a link" if header.issym() or header.islnk() else f"of type {header.type!r}"
                raise ValueError(f"{tar}: {name!r} is {kind}; only plain files are read")


def _inside(tar: Path, name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or "\0" in name:
        raise ValueError(f"{tar}: {name!r} leaves the archive's folder; refused")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _pax_name(tar: Path, content: bytes) -> str:
    """The name that an extended header gives its member, or nothing: mostly there are times in it."""
    name = ""
    while content:
        found = RECORD.match(content)
        if not found or not found.end() < int(found[1]) <= len(content):
            raise ValueError(f"{tar} is damaged in an extended header, at {content[:40]!r}")
        value, content = content[found.end() : int(found[1]) - 1], content[int(found[1]) :]
        if found[2] == b"path":
            name = _text(value)
        elif found[2] in (b"size", b"linkpath") or found[2].startswith(b"GNU.sparse"):
            raise ValueError(f"{tar}: an extended header says {found[2].decode()}; only names and times are read")
    return name


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
