"""Shards at an address: fetched whole into a bounded folder on this machine, checked, and read from there.

http and https are read here (WebDataset's own reader of them, a `curl` that it starts, waits without end for a silent
server and cannot say what one answered); other kinds through WebDataset's `gopen`, which runs the commands that know
them (`aws`, `gsutil`, ...; `pipe:` runs what it is given), and only where the configuration names them. What an index
calls its shards is no part of a command or an address before it was checked (index.py).
"""

import base64
import errno
import fcntl
import hashlib
import io
import os
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import Timer
from typing import BinaryIO, TypeVar
from urllib import request
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit

from webdataset.gopen import gopen

from ..files import locked
from .index import MAX_INDEX_BYTES, Index, ShardInfo, parse_index

T = TypeVar("T")
TRIES = 5
PAUSE_S = 0.5  # before the second try; twice as long before each further one
CHUNK = 1 << 20
ROOM_S = 0.2  # between looks for room that others have left
COMMANDS = ("ais", "gs", "hf", "pipe", "s3")  # what `gopen` can read, s3 with a pipe from `aws`
OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # errors of the cache, not of the address


def is_url(text: str) -> bool:
    """Whether `text` names shards somewhere else, and is no folder."""
    return "://" in text or text.startswith("pipe:")


def redact_url(url: str) -> str:
    """An address without what may be secret in it: password and query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True)
class RemoteShards:
    """A folder of shards at `url`, its shards kept in `cache`, which holds at most `most` bytes of any shards.

    timeout: seconds without a byte after which a try is given up.
    """

    url: str
    cache: Path
    most: int
    timeout: float = 60.0

    def __str__(self) -> str:
        return redact_url(self.url)

    def address(self, name: str) -> str:
        """Of one file in the folder; what follows a `?` stays at the end."""
        if self.url.startswith(("http://", "https://")):
            parts = urlsplit(self.url)
            return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
        return f"{self.url.rstrip('/')}/{name}"

    def read_index(self) -> tuple[Index, bytes]:
        """The index, and the bytes it was read from. OSError where they cannot be had, ValueError where they are no
        index."""
        file = io.BytesIO()
        download(self.address("index.json"), file, MAX_INDEX_BYTES, self.timeout)
        content = file.getvalue()
        return parse_index(content, redact_url(self.address("index.json"))), content

    def check(self, index: Index) -> None:
        """ValueError or OSError for a shard that has another size than in the index or is missing; reads no shard.
        Where only a command gets at the shards there is no cheap way to know.
        """
        if urlsplit(self.url).scheme in COMMANDS:
            return
        shards = [shard for shards in index.splits.values() for shard in shards]
        with ThreadPoolExecutor(16) as pool:
            for shard, size in zip(shards, pool.map(lambda x: self._size(x), shards), strict=True):
                if size is not None and size != shard.bytes:
                    raise ValueError(
                        f"shard {redact_url(self.address(shard.name))} has {size} bytes, its index says {shard.bytes}: "
                        "it has changed since"
                    )

    def _size(self, shard: ShardInfo) -> int | None:
        """What the server says, or None."""
        url = self.address(shard.name)

        def ask() -> int | None:
            with _open(request.Request(url, method="HEAD"), self.timeout) as answer:
                length = answer.headers.get("Content-Length", "")
                return int(length) if length.isdecimal() else None

        return persistently(url, ask)

    def file(self, shard: ShardInfo) -> Path:
        """The shard in the cache, fetched if it is not there; several processes may ask at once.

        OSError, naming the address, where it cannot be had or is not what was written: no other clip can stand in
        for a shard. The file may be gone as soon as others ask for more than fits: then ask again.
        """
        path = self.cache / f"{shard.sha256}.tar"
        if not path.is_file():
            self.cache.mkdir(parents=True, exist_ok=True)
            with locked(self.cache / f"lock-{shard.sha256[:2]}"):
                if not path.is_file():
                    self._fetch(shard, path)
        os.utime(path)  # used now: the oldest go first
        return path

    def _fetch(self, shard: ShardInfo, path: Path) -> None:
        partial = path.with_suffix(f".{shard.bytes}.partial")
        url = self.address(shard.name)
        with self._begun(partial, shard.bytes) as file:
            try:
                download(url, file, shard.bytes, self.timeout)
            except ValueError as error:
                raise OSError(str(error)) from None
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        if (size, found) != (shard.bytes, shard.sha256):
            partial.unlink()
            raise OSError(
                f"shard {redact_url(url)} is not what its index says ({size} bytes of {shard.bytes}, SHA-256 "
                f"{found[:12]} for {shard.sha256[:12]}): it has changed since"
            )
        os.replace(partial, path)

    def _begun(self, partial: Path, needed: int) -> io.BufferedRandom:
        """An empty file to fetch into, once there is room for all that will be in it."""
        while True:
            with locked(self.cache / "lock-room"):
                if self._make_room(needed):
                    file = open(partial, "wb+")  # noqa: SIM115 - closed by who asked
                    fcntl.flock(file, fcntl.LOCK_EX)  # for as long as we live: see _coming
                    return file
            time.sleep(ROOM_S)

    def _make_room(self, needed: int) -> bool:
        """Remove the shards used longest ago until `needed` more bytes fit; whether they do, or nothing that others are
        fetching is left to wait for.
        """
        files, coming = [], 0
        for path in self.cache.iterdir():
            try:
                if path.suffix == ".partial":
                    coming += _coming(path)
                elif path.suffix == ".tar":
                    about = path.stat()
                    files.append((about.st_mtime, about.st_size, path))
            except FileNotFoundError:
                continue
        taken = coming + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if taken + needed <= self.most:
                break
            path.unlink(missing_ok=True)
            taken -= size
        return taken + needed <= self.most or not coming


def _coming(partial: Path) -> int:
    """How large a file that is being fetched will be, by its name; one that nobody is fetching any more is removed."""
    with open(partial, "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(partial.stem.rpartition(".")[2])
    partial.unlink(missing_ok=True)
    return 0


# --- reading an address ------------------------------------------------------------------------------------


def download(url: str, file: BinaryIO, most: int, timeout: float) -> None:
    """All bytes at `url` into `file`, going on where a try broke off if the server can.

    OSError after TRIES tries, with the reason of the last; ValueError for more than `most` bytes.
    """
    read = _read_command if urlsplit(url).scheme in COMMANDS else _read_http
    persistently(url, lambda: read(url, file, most, timeout))


def persistently(url: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried TRIES times with longer and longer pauses; then OSError with the reason."""
    why: Exception | None = None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            return action()
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) in OURS:
                raise
            why = error
    raise OSError(f"{redact_url(url)} could not be read in {TRIES} tries: {_reason(why)}")


def _reason(error: Exception | None) -> str:
    if isinstance(error, HTTPError):
        return f"the server says {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _open(asked: request.Request, timeout: float) -> HTTPResponse:
    """http and https only, also after a redirection: urllib's own opener would follow to ftp and files."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor, request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    asked.add_header("User-Agent", "msc")
    parts = urlsplit(asked.full_url)
    if parts.username is not None:  # urllib knows nothing of names and passwords in an address
        word = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        asked.add_unredirected_header("Authorization", "Basic " + base64.b64encode(word.encode()).decode())
        asked.full_url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return opener.open(asked, timeout=timeout)


def _read_http(url: str, file: BinaryIO, most: int, timeout: float) -> None:
    have = file.seek(0, io.SEEK_END)
    asked = request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = _open(asked, timeout)
    except HTTPError as error:
        if error.code == 416:  # it has become shorter, or we had all
            file.seek(0)
            file.truncate()
        raise
    with answer:
        if have and not (answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
            have = file.seek(0)
            file.truncate()
        promised = answer.headers.get("Content-Length", "")
        end = have + int(promised) if promised.isdecimal() else None
        while chunk := answer.read(CHUNK):
            have += len(chunk)
            if have > most:
                raise ValueError(f"{redact_url(url)} has more than the {most} bytes expected: it has changed since")
            file.write(chunk)
        if end is not None and have < end:
            raise ConnectionError(f"broke off after {have} of {end} bytes")


def _read_command(url: str, file: BinaryIO, most: int, timeout: float) -> None:
    file.seek(0)
    file.truncate()
    have = 0
    command = f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3:") else url
    with gopen(command, "rb") as stream:  # its end raises OSError where the command failed
        while True:
            silence = Timer(timeout, stream.proc.kill)
            silence.start()
            try:
                chunk = stream.read(CHUNK)
            finally:
                silence.cancel()
            if not chunk:
                break
            have += len(chunk)
            if have > most:
                stream.proc.kill()
                raise ValueError(f"{url} has more than the {most} bytes expected: it has changed since")
            file.write(chunk)
