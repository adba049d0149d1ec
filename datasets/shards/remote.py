"""Remote shards: downloaded whole into a bounded cache folder on this machine, verified, and read from there.

http and https are read here with urllib (WebDataset's own reader, a `curl` process, waits for a silent server without
end); other schemes by WebDataset's `gopen`, which runs commands (`aws`, `gsutil`, ...; `pipe:` runs what it is given),
and only where the configuration names them. Shard names from an index are validated (index.py) before they become part
of a command or URL.
"""

import base64
import errno
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

from ..files import locked, retry, sha256_of, try_lock
from .index import MAX_INDEX_BYTES, Index, ShardInfo, parse_index

T = TypeVar("T")
ATTEMPTS = 5
PAUSE_S = 0.5  # before the second attempt; twice as long before each further one
CHUNK = 1 << 20
ROOM_POLL_S = 0.2
COMMANDS = ("ais", "gs", "hf", "pipe", "s3")  # schemes that `gopen` reads, s3 as a pipe from `aws`
CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # of the cache, not of the server


def is_url(text: str) -> bool:
    """Whether `text` names remote shards, not a folder."""
    return "://" in text or text.startswith("pipe:")


def redact_url(url: str) -> str:
    """A URL without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True)
class RemoteShards:
    """A folder of shards at `url`, downloaded to `cache`, which holds at most `max_bytes` of any shards.

    timeout: seconds without a byte after which an attempt fails.
    """

    url: str
    cache: Path
    max_bytes: int
    timeout: float = 60.0

    def __str__(self) -> str:
        return redact_url(self.url)

    def url_of(self, name: str) -> str:
        """Of one file in the folder; the query, after `?`, stays at the end."""
        if self.url.startswith(("http://", "https://")):
            parts = urlsplit(self.url)
            return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
        return f"{self.url.rstrip('/')}/{name}"

    def read_index(self) -> tuple[Index, bytes]:
        """The index and its bytes. OSError where it cannot be downloaded, ValueError where it is not an index."""
        file = io.BytesIO()
        download(self.url_of("index.json"), file, MAX_INDEX_BYTES, self.timeout)
        return parse_index(file.getvalue(), redact_url(self.url_of("index.json"))), file.getvalue()

    def check(self, index: Index) -> None:
        """ValueError or OSError for a shard that is missing or has another size than in the index; downloads none. Not
        for schemes read by a command, which have no cheap way to ask."""
        if urlsplit(self.url).scheme in COMMANDS:
            return

        def check_size(shard: ShardInfo) -> None:
            url = self.url_of(shard.name)
            with _retry(url, lambda: _open(request.Request(url, method="HEAD"), self.timeout)) as response:
                size = response.headers.get("Content-Length", "")
            if size.isdecimal() and int(size) != shard.bytes:
                raise ValueError(
                    f"shard {redact_url(url)} has {size} bytes, its index says {shard.bytes}: it has changed since"
                )

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(check_size, index.shards))

    def fetch(self, shard: ShardInfo) -> Path:
        """The shard in the cache, downloaded if it is not there; safe from several processes at once.

        OSError, naming the URL, where it cannot be downloaded or is not what was written: no other clip can replace a
        shard. It may be evicted as soon as others need the room: then fetch it again.
        """
        path = self.cache / f"{shard.sha256}.tar"
        if not path.is_file():
            self.cache.mkdir(parents=True, exist_ok=True)
            with locked(self.cache / f"lock-{shard.sha256[:2]}"):
                if not path.is_file():
                    self._download(shard, path)
        os.utime(path)  # the least recently used are evicted first
        return path

    def _download(self, shard: ShardInfo, path: Path) -> None:
        partial = path.with_suffix(f".{shard.bytes}.partial")
        url = self.url_of(shard.name)
        with self._reserve(partial, shard.bytes) as file:
            try:
                download(url, file, shard.bytes, self.timeout)
            except ValueError as error:
                raise OSError(str(error)) from None
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            file.seek(0)
            sha256 = sha256_of(file)
        if (size, sha256) != (shard.bytes, shard.sha256):
            partial.unlink()
            raise OSError(
                f"shard {redact_url(url)} is not what its index says ({size} bytes of {shard.bytes}, SHA-256 "
                f"{sha256[:12]} for {shard.sha256[:12]}): it has changed since"
            )
        os.replace(partial, path)

    def _reserve(self, partial: Path, needed: int) -> io.BufferedRandom:
        """An empty file to download into, once there is room for `needed` bytes. It stays locked while it is open: only
        then it counts as a reservation."""
        while True:
            with locked(self.cache / "lock-room"):
                if self._evict(needed):
                    file = open(partial, "wb+")  # noqa: SIM115 - closed by the caller
                    try_lock(file)
                    return file
            time.sleep(ROOM_POLL_S)

    def _evict(self, needed: int) -> bool:
        """Remove the least recently used shards until `needed` more bytes fit. False where other downloads have to end
        first."""
        shards, reserved = [], 0
        for path in self.cache.iterdir():
            try:
                if path.suffix == ".partial":
                    reserved += _reserved_bytes(path)
                elif path.suffix == ".tar":
                    status = path.stat()
                    shards.append((status.st_mtime, status.st_size, path))
            except FileNotFoundError:
                continue
        used = reserved + sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if used + needed <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used + needed <= self.max_bytes or not reserved


def _reserved_bytes(partial: Path) -> int:
    """Final size of a download in progress, from its name; the file of a dead process is removed."""
    with open(partial, "rb+") as file:
        if not try_lock(file):
            return int(partial.stem.rpartition(".")[2])
    partial.unlink(missing_ok=True)
    return 0


# --- download ----------------------------------------------------------------------------------------------


def download(url: str, file: BinaryIO, max_bytes: int, timeout: float) -> None:
    """All bytes at `url` into `file`; an interrupted download is resumed if the server can.

    OSError after ATTEMPTS, with the reason of the last; ValueError for more than `max_bytes`.
    """
    read = _read_command if urlsplit(url).scheme in COMMANDS else _read_http
    _retry(url, lambda: read(url, file, max_bytes, timeout))


def _retry(url: str, function: Callable[[], T]) -> T:
    def retriable(error: Exception) -> bool:
        return isinstance(error, OSError | HTTPException) and getattr(error, "errno", None) not in CACHE_ERRORS

    try:
        return retry(function, [PAUSE_S * 2**attempt for attempt in range(ATTEMPTS - 1)], retriable)
    except (OSError, HTTPException) as error:
        if not retriable(error):
            raise
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        if isinstance(error, HTTPError):
            reason = f"the server says {error.code} {error.reason}"
        raise OSError(f"{redact_url(url)} could not be read in {ATTEMPTS} tries: {reason}") from None


def _open(req: request.Request, timeout: float) -> HTTPResponse:
    """http and https only, also after a redirect: urllib's default opener would follow one to ftp."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor, request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    req.add_header("User-Agent", "msc")
    parts = urlsplit(req.full_url)
    if parts.username is not None:  # urllib does not take user and password from a URL
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        req.add_unredirected_header("Authorization", "Basic " + base64.b64encode(credentials.encode()).decode())
        req.full_url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return opener.open(req, timeout=timeout)


def _read_http(url: str, file: BinaryIO, max_bytes: int, timeout: float) -> None:
    start = file.seek(0, io.SEEK_END)
    try:
        response = _open(request.Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout)
    except HTTPError as error:
        if error.code == 416:  # the file is shorter now, or we have all of it
            _clear(file)
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if start and not resumed:
            start = _clear(file)
        length = response.headers.get("Content-Length", "")
        _copy(lambda: response.read(CHUNK), url, file, max_bytes)
        if length.isdecimal() and file.tell() < start + int(length):
            raise ConnectionError(f"broke off after {file.tell()} of {start + int(length)} bytes")


def _read_command(url: str, file: BinaryIO, max_bytes: int, timeout: float) -> None:
    _clear(file)
    command = f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3:") else url
    with gopen(command, "rb") as stream:  # on exit raises OSError where the command failed

        def read() -> bytes:
            silence = Timer(timeout, stream.proc.kill)
            silence.start()
            try:
                return bytes(stream.read(CHUNK))
            finally:
                silence.cancel()

        try:
            _copy(read, url, file, max_bytes)
        except ValueError:
            stream.proc.kill()
            raise


def _clear(file: BinaryIO) -> int:
    file.seek(0)
    return file.truncate()


def _copy(read: Callable[[], bytes], url: str, file: BinaryIO, max_bytes: int) -> None:
    while chunk := read():
        if file.tell() + len(chunk) > max_bytes:
            raise ValueError(f"{redact_url(url)} has more than the {max_bytes} bytes expected: it has changed since")
        file.write(chunk)
