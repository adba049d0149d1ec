"""Remote shards, from a real server on this machine with every fault that servers have."""

import base64
import dataclasses
import functools
import http.server
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from msc.datasets.files import locked
from msc.datasets.loading.dataloader import Batch, loader
from msc.datasets.loading.mixture import DataConfig, ShardSetConfig, check_shard_sizes, open_shards
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.shards import remote
from msc.datasets.shards.index import read_index
from msc.datasets.shards.remote import RemoteShards, download, is_url, redact_url
from msc.datasets.synthetic import write_videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """21 training and 3 held-out clips in shards of 5."""
    folder = tmp_path_factory.mktemp("folder")
    write_videos(folder / "videos", 0, 3, 72, 32, 32)
    convert(ConvertConfig((str(folder / "videos"),), str(folder / "out"), frames=8, height=16, width=24, fps=12,
                          held_out=0.2, clips_per_shard=5), lambda video: video.float(), 1)  # fmt: skip
    return folder / "out"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `server.faults[name]` is a list of what goes wrong, request by request: a status, "break" (half
    of the content), "slow" (a pause in its middle), "ftp" (a redirection there)."""

    def do_GET(self):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        self.server.requests[self.command, name] += 1
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            self.send_error(fault)
        elif fault == "ftp":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif self.command == "HEAD" or (fault is None and "Range" not in self.headers):
            getattr(super(), f"do_{self.command}")()
        else:
            content = Path(self.translate_path(self.path)).read_bytes()
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.server.ranges else 0
            self.server.begun.append(begin)
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            half = len(content) // 2 if fault else len(content)
            self.wfile.write(content[begin:half])
            self.wfile.flush()
            if fault == "slow":
                time.sleep(1)
                self.wfile.write(content[half:])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    shutil.copytree(folder, tmp_path / "served")
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.faults, running.requests, running.begun, running.ranges = {}, Counter(), [], True
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}", folder=tmp_path / "served", it=running)
        running.shutdown()
        thread.join()


def config(server, tmp_path, **changes) -> DataConfig:
    return DataConfig(**{"shards": server.url, "cache": str(tmp_path / "cache"), **changes})


def read(data: DataConfig, batches: int, **options) -> list[Batch]:
    options = {"seed": 3, "clock": 0, "clips": 4, "workers": 0, "window": data.window, **options}
    return list(itertools.islice(loader(open_shards(data), "train", **options), batches))


def same(batches: list[Batch], expected: list[Batch]) -> bool:
    return all(a.samples == b.samples and torch.equal(a.video, b.video) for a, b in zip(batches, expected, strict=True))


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*.tar"))


# --- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_clips_equal_local_clips(server, folder, tmp_path, workers):
    data = config(server, tmp_path)
    expected = read(DataConfig(str(folder)), 12)
    assert same(read(data, 12, workers=workers), expected)
    shards = read_index(folder).splits["train"]
    assert sorted(path.stem for path in kept(tmp_path)) == sorted(shard.sha256 for shard in shards)
    assert all(server.it.requests["GET", shard.name] == 1 for shard in shards)  # also with several processes
    assert same(read(data, 5, clock=28), expected[7:])  # from the cache
    assert all(server.it.requests["GET", shard.name] == 1 for shard in shards)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_mixture_of_remote_and_local_shards(server, folder, tmp_path):
    data = config(server, tmp_path, shards=(ShardSetConfig(server.url, 3.0), ShardSetConfig(str(folder), 1.0)))
    keys = [key for batch in read(data, 10) for key in batch.keys]
    names = {key.split(":train")[0] for key in keys}
    assert names == {f"127.0.0.1:{server.it.server_port}", "out"}


def test_a_small_cache_keeps_its_limit_and_evicts_the_oldest(server, folder, tmp_path):
    index = read_index(folder)
    size = max(shard.bytes for shard in index.splits["train"])
    data = config(server, tmp_path, cache_gb=2.5 * size / 1e9)
    with pytest.raises(ValueError, match=r"to fetch, the cache holds data.cache_gb = .*data.window"):
        open_shards(data)
    with pytest.raises(ValueError, match=r"data.window = 2 shards take up to"):
        open_shards(dataclasses.replace(data, window=2))
    data = dataclasses.replace(data, window=1)
    expected = read(DataConfig(str(folder), window=1), 11)
    batches = loader(open_shards(data), "train", seed=3, clock=0, clips=4, workers=0, window=1)
    for want in expected:
        assert same([next(batches)], [want])
        assert sum(path.stat().st_size for path in kept(tmp_path)) <= 2.5 * size
    # two epochs with room for half of the shards: each fetched about once an epoch, not once a clip
    assert sum(n for (kind, name), n in server.it.requests.items() if kind == "GET" and name.endswith(".tar")) <= 12


def test_a_shard_evicted_while_it_is_read_is_downloaded_again(server, tmp_path, monkeypatch):
    from msc.datasets.loading import shard_reader

    scan, removed = shard_reader.scan, []

    def scan_and_lose(path):
        samples = scan(path)
        if len(removed) < 3:
            removed.append(path)
            path.unlink()
        return samples

    monkeypatch.setattr(shard_reader, "scan", scan_and_lose)
    assert len(read(config(server, tmp_path), 6)) == 6
    assert len(removed) == 3


def test_concurrent_fetches_download_once(server, folder, tmp_path):
    shard = read_index(folder).splits["train"][0]
    place = RemoteShards(server.url, tmp_path / "cache", 1 << 30)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: place.fetch(shard), range(8)))
    assert {path.read_bytes() for path in paths} == {(folder / shard.name).read_bytes()}
    assert server.it.requests["GET", shard.name] == 1


def test_downloads_reserve_their_final_size(server, folder, tmp_path, monkeypatch):
    """No more shards are downloaded at once than fit; what a dead process left is removed."""
    shards = read_index(folder).splits["train"]
    most = 5 * max(shard.bytes for shard in shards) // 2
    place = RemoteShards(server.url, tmp_path / "cache", most)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"left.{1 << 40}.partial").write_bytes(b"left by a process that was killed")
    promised, together = [], []

    def slow(url, file, size, timeout):
        promised.append(size)
        time.sleep(0.2)
        with locked(tmp_path / "cache" / "lock-room"):  # so that none goes while we look
            there = sum(path.stat().st_size for path in kept(tmp_path))  # first: one that comes now is promised no more
            together.append(there + sum(promised))
        download(url, file, size, timeout)
        promised.remove(size)

    monkeypatch.setattr(remote, "download", slow)
    monkeypatch.setattr(remote, "ROOM_POLL_S", 0.01)
    with ThreadPoolExecutor(len(shards)) as pool:
        list(pool.map(place.fetch, shards))
    assert len(together) == len(shards) > 3
    assert max(together) <= most
    assert max(together) > most // 2  # and yet two at once
    assert not list((tmp_path / "cache").glob("*.partial"))


# --- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [[500, 503], [404], ["break"], ["break", "break"], ["slow"], [429, "break", 500]])
@pytest.mark.parametrize("ranges", [True, False])
def test_transient_errors_are_retried(server, folder, tmp_path, faults, ranges):
    server.it.ranges = ranges
    name = "train-000000-000001.tar"
    server.it.faults[name] = list(faults)
    shard = next(shard for shard in read_index(folder).splits["train"] if shard.name == name)
    place = RemoteShards(server.url, tmp_path / "cache", 1 << 30, timeout=0.3)
    assert place.fetch(shard).read_bytes() == (folder / name).read_bytes()
    assert server.it.requests["GET", name] == len(faults) + 1
    if ranges and "break" in faults:
        assert server.it.begun[-1] >= shard.bytes // 2  # went on where it broke off


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, "the server says 404"),
        (500, "the server says 500"),
        ("break", r"broke off after \d+ of \d+ bytes"),
        ("slow", "timed out"),
        ("ftp", "403|302|redirect|not allowed"),
    ],
)
def test_persistent_errors_name_the_url(server, tmp_path, monkeypatch, fault, message):
    server.it.ranges = False
    server.it.faults["index.json"] = [fault] * 9
    place = RemoteShards(f"{server.url}/?token=secret", tmp_path, 1, timeout=0.1)
    lasting = rf"^http://127.*/index.json could not be read in 5 tries: .*({message})"
    with pytest.raises(OSError, match=lasting) as error:
        place.read_index()
    assert "secret" not in str(error.value)
    assert server.it.requests["GET", "index.json"] == 5


def test_connection_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/x/index.json could not be read in 5 tries: .*refused"):
        open_shards(DataConfig("http://127.0.0.1:9/x", cache=str(tmp_path)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreachable_shard_ends_the_run(server, tmp_path, workers):
    data = config(server, tmp_path)
    batches = loader(open_shards(data), "train", seed=3, clock=0, clips=4, workers=workers)
    for path in server.folder.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(OSError, match=r"^http://127.*/train-.*\.tar could not be read in 5 tries: the server says 404"):
        list(itertools.islice(batches, 12))


@pytest.mark.parametrize("how", ["other bytes", "longer", "shorter"])
def test_a_shard_changed_since_the_index_is_refused(server, tmp_path, how):
    data = config(server, tmp_path)
    shards = open_shards(data)
    check_shard_sizes(shards)
    path = server.folder / "train-000000-000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"other bytes": content, "longer": content + b"x", "shorter": content[:-512]}[how])
    if how != "other bytes":
        with pytest.raises(ValueError, match=r"000001.tar has \d+ bytes, its index says \d+: it has changed since"):
            check_shard_sizes(shards)
    with pytest.raises(OSError, match=r"000001.tar (has more than|is not what its index says).*changed since"):
        list(itertools.islice(loader(shards, "train", seed=3, clock=0, clips=4, workers=0), 12))
    assert not list((tmp_path / "cache").glob("*.partial")) or how == "longer"
    path.unlink()
    with pytest.raises(OSError, match=r"000001.tar could not be read in 5 tries: the server says 404"):
        check_shard_sizes(shards)


def test_a_malicious_index_causes_no_other_requests(server, tmp_path):
    path = server.folder / "index.json"
    fields = json.loads(path.read_text())
    names = ("../../secret.tar", "http://other/x.tar", "x.tar; touch exploded", "x?.tar", "/etc/passwd", "..tar")
    for name in names:
        fields["splits"]["train"][0]["name"] = name
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="index.json is damaged .*the shard name"):
            open_shards(config(server, tmp_path))
    assert not any(name.endswith("tar") for _, name in server.it.requests)
    path.write_bytes(b" " * (remote.CHUNK + 1))
    with pytest.raises(ValueError, match=r"more than the 1048576 bytes expected"):
        download(f"{server.url}/index.json", io.BytesIO(), remote.CHUNK, 1.0)


# --- commands ----------------------------------------------------------------------------------------------


def test_commands_run_only_where_they_are_allowed(server, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("pipe:touch exploded; cat x", "s3://bucket/x", "gs://bucket/x", "file:///etc", "ftp://x/y"):
        with pytest.raises(ValueError, match="is refused, only http and https are read"):
            open_shards(config(server, tmp_path, shards=url))
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError, match="data.commands has 'rm'"):
        DataConfig(commands=("rm",))
    data = config(server, tmp_path, shards=f"pipe:cat {folder}", commands=("pipe",))
    check_shard_sizes(open_shards(data))
    assert same(read(data, 6), read(DataConfig(str(folder)), 6))
    # s3 is read by the command `aws`, here one of our own
    tool = tmp_path / "bin" / "aws"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$1 $2" = "s3 cp" ] && cat "{folder}/${{3#s3://bucket/}}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    data = config(server, tmp_path, shards="s3://bucket/", commands=("s3",), cache=str(tmp_path / "other"))
    assert same(read(data, 6), read(DataConfig(str(folder)), 6))
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    with pytest.raises(OSError, match=r"pipe:false/index.json could not be read in 5 tries: .*exit 1"):
        open_shards(config(server, tmp_path, shards="pipe:false", commands=("pipe",)))
    with pytest.raises(OSError, match=r"pipe:exec sleep 9;/x could not be read in 5 tries"):
        download("pipe:exec sleep 9;/x", io.BytesIO(), 9, 0.05)


def test_urls_are_told_from_paths_and_shown_without_secrets():
    assert all(map(is_url, ("http://x", "pipe:x", "s3://x")))
    assert not any(map(is_url, ("/x/y", "x:y", "")))
    assert redact_url("https://me:word@host:8/a/b?sig=x") == "https://host:8/a/b"
    assert RemoteShards("https://h/a/?sig=x", Path(), 1).url_of("b.tar") == "https://h/a/b.tar?sig=x"
    assert RemoteShards("s3://bucket/a/", Path(), 1).url_of("b.tar") == "s3://bucket/a/b.tar"


def test_credentials_in_a_url_are_sent_as_a_header(monkeypatch):
    """urllib would take them for a host, and say so with the password."""
    requests = []
    monkeypatch.setattr(remote.request.OpenerDirector, "open", lambda self, one, timeout: requests.append(one))
    remote._open(remote.request.Request("http://me:s3%40cret@host:81/x?y"), 1.0)
    (one,) = requests
    assert (one.full_url, one.host) == ("http://host:81/x?y", "host:81")
    assert one.unredirected_hdrs["Authorization"] == "Basic " + base64.b64encode(b"me:s3@cret").decode()
