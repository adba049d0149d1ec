"""Tar archives read in place: where their members lie, from the headers alone; nothing is unpacked.

An archive may come from anybody. Links and devices, names that leave the folder, duplicate names and extended headers
that set more than a name, times and owners are refused by name before anything of a claimed size is allocated.
"""

import errno
import io
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..files import retry

EXTENDED_BYTES = 1 << 16  # the most that a header with a long name, or with times, may have
READ_BYTES = 1 << 20  # at a time, of what lies behind an end mark
PAX_RECORD = re.compile(rb"(\d{1,5}) ([^=\n]+)=")  # length, keyword, "=", value
FILE_ERRORS = {errno.EIO, errno.EACCES, errno.EPERM}  # of one file: a bad sector, no permission; not of disk or server
READ_PAUSES = (2, 20)  # seconds before such a file is read again
T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """A file inside an archive: `size` bytes from `offset` on."""

    path: Path
    offset: int
    size: int


Location = Path | Member


def size_of(location: Location) -> int:
    """In bytes; -1 for what is not a file."""
    if isinstance(location, Member):
        return location.size
    return location.stat().st_size if location.is_file() else -1


def retry_read(read: Callable[[], T]) -> T:
    """What `read` returns, tried again where one file cannot be read; its last OSError."""
    return retry(read, READ_PAUSES, lambda error: isinstance(error, OSError) and error.errno in FILE_ERRORS)


def open_bytes(location: Location) -> io.BufferedReader:
    """A file, or a member as if it were one."""
    return io.BufferedReader(_MemberFile(location)) if isinstance(location, Member) else open(location, "rb")


class _MemberFile(io.RawIOBase):
    def __init__(self, member: Member) -> None:
        self.file, self.member, self.position = open(member.path, "rb", buffering=0), member, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.member.size}[whence]
        if position < 0:
            raise ValueError(f"seek to {position}")
        self.position = position
        return position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.position >= self.member.size:  # perhaps beyond what a file can have
            return 0
        self.file.seek(self.member.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: self.member.size - self.position])
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def tar_members(tar: Path, plain: bool = False) -> dict[str, Member]:
    """The regular files in a tar by name, in its order; of tars joined by `cat`, those of all. plain: refuse folders,
    extended headers and anything behind the end mark too, as our own shards have none.

    ValueError, naming the tar and the member, for everything else, and for a tar that is damaged, truncated or
    compressed.
    """
    if not tar.is_file() and tar.exists():  # whoever opened a named pipe would wait for ever
        raise ValueError(f"{tar} is not a file: copy it again, or leave it out")
    end = tar.stat().st_size
    members: dict[str, Member] = {}
    offset, long_name = 0, ""  # a long name stands in a header of its own before the member's
    behind = ""  # for a message: how far the tar was read
    with open(tar, "rb") as file:
        while True:
            file.seek(offset)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) == tarfile.BLOCKSIZE and not any(block):
                offset = _next_data(tar, offset)  # behind the end mark
                if offset < 0:
                    return members
                if plain:
                    raise ValueError(f"{tar} has bytes behind its end mark, at byte {offset}; refused")
                behind = ", behind its end mark,"
                continue
            if len(block) < tarfile.BLOCKSIZE:
                raise ValueError(f"{tar} is truncated at byte {end}: copy it again, or leave it out")
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                problem = f"is damaged{behind}" if offset or plain else "is no plain tar (compressed ones are not read)"
                raise ValueError(f"{tar} {problem} at byte {offset} ({error})") from None
            name, size, begin = long_name or header.name, header.size, offset + tarfile.BLOCKSIZE
            if not 0 <= size <= end - begin:
                raise ValueError(f"{tar} is truncated: {name!r} claims {size} bytes, past its end; copy it again")
            offset, long_name = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, ""
            if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                name = normalise_name(tar, name)
                if name in members:
                    raise ValueError(f"{tar}: {name!r} is there twice")
                members[name] = Member(tar, begin, size)
            elif header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME) and not plain:
                if size > EXTENDED_BYTES:
                    raise ValueError(f"{tar}: an extended header at byte {begin} claims {size} bytes; refused")
                content = file.read(size)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = _text(content.rstrip(b"\0"))
                else:
                    long_name = _pax_name(tar, content)
                if long_name and header.type == tarfile.XGLTYPE:
                    raise ValueError(f"{tar}: a global extended header names all members {long_name!r}; refused")
            elif header.type != tarfile.DIRTYPE or plain:
                kind = "a link" if header.issym() or header.islnk() else f"of type {header.type!r}"
                raise ValueError(f"{tar}: {name!r} is {kind}; only plain files are read")


def _next_data(tar: Path, offset: int) -> int:
    """Where the first block that is not zero begins, at `offset` in bytes or behind it; -1 for none. Holes in the file
    are not read."""
    with open(tar, "rb", buffering=0) as file:
        while True:
            try:
                offset = file.seek(offset, os.SEEK_DATA) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            except OSError as error:
                if error.errno != errno.ENXIO:  # which means that no data follow
                    raise
                return -1
            file.seek(offset)
            content = file.read(READ_BYTES)
            if data := content.lstrip(b"\0"):
                return offset + (len(content) - len(data)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            offset += len(content)


def normalise_name(tar: Path, name: str) -> str:
    """A member's name without `.` and empty parts; ValueError where it leaves the archive's folder."""
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or "\0" in name:
        raise ValueError(f"{tar}: {name!r} leaves the archive's folder; refused")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _pax_name(tar: Path, content: bytes) -> str:
    """The name that an extended header gives its member, or "": most only set times."""
    name = ""
    while content:
        record = PAX_RECORD.match(content)
        if not record or not record.end() < int(record[1]) <= len(content):
            raise ValueError(f"{tar} is damaged in an extended header, at {content[:40]!r}")
        keyword, value, content = record[2], content[record.end() : int(record[1]) - 1], content[int(record[1]) :]
        if keyword == b"path":
            name = _text(value)
        elif keyword in (b"size", b"linkpath") or keyword.startswith(b"GNU.sparse"):
            raise ValueError(f"{tar}: an extended header sets {keyword.decode()}; only names and times are read")
    return name


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
