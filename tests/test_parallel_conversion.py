"""Conversion by many processes that may be killed: the same bytes, nothing half-written, nothing done twice."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.shards.index import scan
from msc.datasets.synthetic import write_videos


def settings(tmp_path: Path, source: Path, **changes) -> ConvertConfig:
    defaults = {"frames": 8, "height": 16, "width": 24, "fps": 12, "held_out": 0.2, "clips_per_shard": 2}
    return ConvertConfig((str(source),), str(tmp_path / "out"), **{**defaults, **changes})


def raw(video: torch.Tensor) -> torch.Tensor:
    return video.float()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


PROGRAM = """
import os, signal, sys, time
from msc.datasets.prepare.convert import ConvertConfig, convert

def encode(video):
    time.sleep(float(sys.argv[4]))
    while os.path.exists(os.environ.get("HOLD", "")):
        time.sleep(0.05)
    return video.float()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    config = ConvertConfig((sys.argv[1],), sys.argv[2], frames=8, height=16, width=24, fps=12, held_out=0.2,
                           clips_per_shard=2, workers=int(sys.argv[3]), store="latent")
    convert(config, encode, 1, part=(0, int(sys.argv[5])) if sys.argv[5:] else None)
"""


def children(process: int) -> set[int]:
    return set(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def same_as_program(tmp_path: Path, videos: Path, **changes) -> ConvertConfig:
    """What PROGRAM converts."""
    return settings(tmp_path, videos, store="latent", **changes)


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_work_nothing_is_half_written_and_what_is_done_is_kept(tmp_path, death):
    videos = tmp_path / "videos"
    write_videos(videos, 0, 3, 60, 48, 64)
    (tmp_path / "program.py").write_text(PROGRAM)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, str(tmp_path / "program.py"), str(videos), str(out)]
    done = partial / ".work" / "group-000000.json"  # once it is there, no clip comes any more
    environment = os.environ | {"HOLD": str(done)}
    running = subprocess.Popen([*command, "2", "0"], stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 60
    while not (done.exists() and list(partial.glob(".work/process-*/*train-000001-*"))):  # another group is begun
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children(running.pid)
    if death == signal.SIGKILL:
        with pytest.raises(FileExistsError, match="another process is writing"):
            convert(same_as_program(tmp_path, videos), raw, 1)
    running.send_signal(death)
    assert running.wait(timeout=20) != 0
    assert not out.exists()
    while any(map(alive, workers)):  # no orphans
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(list(partial.glob(".work/process-*"))) == (death == signal.SIGKILL)
    for path in partial.glob("*.tar"):
        assert scan(path)
    with pytest.raises(ValueError, match=r"unfinished work with another frames \(8 then, 4 now\)"):
        convert(same_as_program(tmp_path, videos, frames=4), raw, 1)
    written = {path: path.stat().st_mtime_ns for path in partial.glob("train-000000-*.tar")}
    calls = []
    convert(same_as_program(tmp_path, videos), lambda video: calls.append(1) or raw(video), 1)
    for path, when in written.items():
        assert (out / path.name).stat().st_mtime_ns == when
    convert(same_as_program(tmp_path / "whole", videos), lambda video: calls.append(0) or raw(video), 1)
    assert contents(out) == contents(tmp_path / "whole" / "out")
    assert sum(calls) < len(calls) - sum(calls)  # what was done was not done again
    assert not partial.exists()


@pytest.mark.parametrize("locks", ["of files", "none"])
def test_to_merge_too_early_leaves_a_part_at_work_elsewhere_alone(tmp_path, monkeypatch, locks):
    """Over NFS a folder's lock is not seen by other machines, as one of a file is; some servers have none at all."""
    videos = tmp_path / "videos"
    write_videos(videos, 0, 4, 60, 48, 64)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(videos), str(tmp_path / "out"), "1", "0", "2"]
    work = tmp_path / ".out.partial" / ".work"
    environment = os.environ | {"HOLD": str(work / "plan.json")}
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 60
    while not list(work.glob("process-*/spool/*")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)

    def flock(file, how):
        if locks == "of files" and not stat.S_ISDIR(os.fstat(getattr(file, "fileno", lambda: file)()).st_mode):
            real(file, how)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    try:
        error = FileExistsError if locks == "of files" else ValueError
        with pytest.raises(error, match="another process is writing|2 of 2 groups of videos are not converted"):
            convert(same_as_program(tmp_path, videos), raw, 1, merge=True)
        assert list(work.glob("process-*/spool/*"))
    finally:
        running.kill()
        running.wait()


def test_parts_in_any_order_and_number_give_what_one_process_gives(tmp_path):
    write_videos(tmp_path / "videos", 0, 7, 40, 32, 32)
    (tmp_path / "videos" / "synthetic-007.mp4").write_bytes(b"nonsense")

    def config(name: str, **changes) -> ConvertConfig:
        return settings(tmp_path / name, tmp_path / "videos", **changes)

    whole = convert(config("whole"), raw, 1)
    for count, order in ((2, (1, 0)), (6, (5, 4, 0, 1, 3, 2))):
        name = str(count)
        for i in order:
            if i == order[-1]:
                with pytest.raises(ValueError, match=r"of 4 groups of videos are not converted.*run their parts"):
                    convert(config(name), raw, 1, merge=True)
            convert(config(name, workers=1 + (count == 2)), raw, 1, part=(i, count))
        assert not (tmp_path / name / "out").exists()
        merged = convert(config(name), raw, 1, merge=True)
        assert contents(tmp_path / name / "out") == contents(tmp_path / "whole" / "out")
        assert (merged.clips, merged.skipped) == (whole.clips, whole.skipped)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["out"]
    convert(config("rest"), raw, 1, part=(1, 2))
    with pytest.raises(ValueError, match=r"another stride \(0 then, 3 now\)"):
        convert(config("rest", stride=3), raw, 1, part=(0, 2))
    write_videos(tmp_path / "more", 9, 1, 40, 32, 32)
    (tmp_path / "more" / "synthetic-000.mp4").rename(tmp_path / "videos" / "synthetic-008.mp4")
    with pytest.raises(ValueError, match=r"another (digest|videos)"):
        convert(config("rest"), raw, 1, part=(0, 2))
    (tmp_path / "videos" / "synthetic-008.mp4").unlink()
    convert(config("rest"), raw, 1)  # without merge the rest is converted here
    assert contents(tmp_path / "rest" / "out") == contents(tmp_path / "whole" / "out")


def test_a_part_in_which_too_many_videos_are_broken_ends(tmp_path):
    """As on a bad machine, though of all videos few are."""
    write_videos(tmp_path / "videos", 0, 30, 20, 32, 32)
    for i in range(0, 30, 5):
        (tmp_path / "videos" / f"synthetic-{i:03d}.mp4").write_bytes(b"nonsense" * (i + 1))
    config = settings(tmp_path, tmp_path / "videos", clips_per_shard=1, max_bad=0.5)
    convert(config, raw, 1, part=(1, 5))
    with pytest.raises(ValueError, match="5 of 6 sources are unreadable, at most 50%"):
        convert(config, raw, 1, part=(0, 5))


def test_work_begun_under_another_rule_is_not_gone_on_with(tmp_path):
    write_videos(tmp_path / "videos", 0, 4, 40, 32, 32)
    config = settings(tmp_path, tmp_path / "videos")
    convert(config, raw, 1, part=(0, 2))
    plan = tmp_path / ".out.partial" / ".work" / "plan.json"
    written = json.loads(plan.read_text())
    plan.write_text(json.dumps({name: written[name] for name in ("settings", "videos", "digest")}))  # of an older msc
    for how in ({"part": (1, 2)}, {"merge": True}, {}):
        with pytest.raises(ValueError, match=r"unfinished work with another held-out rule \(None then, \d now"):
            convert(config, raw, 1, **how)
    plan.write_text(json.dumps(written))
    convert(config, raw, 1)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again_two_parts_still_come_to_the_same_end(tmp_path, kills):
    videos = tmp_path / "videos"
    write_videos(videos, 0, 8, 60, 32, 32)
    (tmp_path / "program.py").write_text(PROGRAM)
    convert(same_as_program(tmp_path / "whole", videos), raw, 1)
    program = [sys.executable, str(tmp_path / "program.py"), str(videos), str(tmp_path / "out"), "1", "0.1", "2"]
    records = tmp_path / ".out.partial" / ".work"
    for kill in range(kills):
        running = [subprocess.Popen(program, stderr=subprocess.DEVNULL) for _ in range(2)]  # and both the same part
        deadline = time.monotonic() + 60
        while not list(records.glob("process-*/spool/*")) and any(x.poll() is None for x in running):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.13 * kill)
        for one in running:
            one.kill()
            one.wait()
        assert not (tmp_path / "out").exists()
    convert(same_as_program(tmp_path, videos), raw, 1, part=(1, 2))
    convert(same_as_program(tmp_path, videos), raw, 1, part=(0, 2))
    convert(same_as_program(tmp_path, videos), raw, 1, merge=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")
    assert not records.parent.exists()
