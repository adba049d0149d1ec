"""Per-frame signals: files are read by the rules of docs/signals.md, cut with the frames, and loaded frame by frame.

The table of bad files there is written by this file: python tests/test_signals.py
"""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from msc.datasets.loading.dataloader import Batch, loader
from msc.datasets.loading.mixture import DataConfig, ShardSetConfig, open_shards, single_set
from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare import shard_writer
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.signal_tracks import SLACK, SignalPlan, align, parse_request
from msc.datasets.prepare.summary import describe, signal_bars
from msc.datasets.shards.index import read_index, read_part, scan, write_index
from msc.datasets.signal_files import POSITION, QUATERNION, Table, pose_matrices, read_signal, relative_motion
from msc.datasets.signals import Signal, rows_of_latent_frames
from msc.datasets.synthetic import MOVES, steered_dots, write_mazes, write_steered_dots, write_videos
from msc.datasets.video import Video, decode_frames, encode_mp4, frame_indices
from msc.launch import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "signals.md"
MARKS = ("<!-- files: written by tests/test_signals.py -->", "<!-- end of files -->")
SIDE, SPEED = 32, 2


def pixels(video: torch.Tensor) -> torch.Tensor:
    return video.float() / 127.5 - 1


def pairs(video: torch.Tensor) -> torch.Tensor:
    """Two video frames for each latent frame, which stand side by side in its channels."""
    return torch.cat((pixels(video[::2]), pixels(video[1::2])), 1)


def first_alone(video: torch.Tensor) -> torch.Tensor:
    """As causal autoencoders: the first latent frame is the first video frame, each other one is of three."""
    return torch.cat((pixels(video[:1]), pixels(video[1::3])))


def made(folder: Path, *sources: str | Path, encode=pixels, factor: int = 1, part=None, **changes):
    defaults = {"frames": 8, "height": SIDE, "width": SIDE, "fps": 12, "held_out": 0.2, "clips_per_shard": 4}
    config = ConvertConfig(tuple(map(str, sources)), str(folder), **{**defaults, **changes})
    return convert(config, encode, factor, part=part)


def stored(folder: Path) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """(source, start) of every clip -> its signals."""
    found = {}
    for path in (folder / shard.name for shard in read_index(folder).shards):
        for sample in scan(path):
            about = json.loads(read_part(path, sample, "json"))
            content = read_part(path, sample, "signals.safetensors") if "signals_crc32" in about else b""
            found[about["source"], about["start"]] = load(content) if content else {}
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def batches(folder: Path, **options) -> list[Batch]:
    shards = single_set(folder, read_index(folder))
    return list(loader(shards, "train", seed=0, clock=0, clips=4, stop=8, workers=0, **options))


@pytest.fixture(scope="module")
def dots(tmp_path_factory) -> Path:
    """Four videos of 60 frames at 12 per second with their actions."""
    folder = tmp_path_factory.mktemp("dots") / "dots"
    write_steered_dots(folder, 0, 4, 60, SIDE, SIDE, speed=SPEED)
    return folder


# --- files -------------------------------------------------------------------------------------------------


def written(path: Path, columns: dict[str, list]) -> Path:
    """The columns as a file of the path's format."""
    if path.suffix == ".csv":
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(lines))
    elif path.suffix == ".jsonl":
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    elif path.suffix == ".npy":
        arrays = {name: np.array(values) for name, values in columns.items()}
        array = np.zeros(len(next(iter(arrays.values()))), [(name, x.dtype) for name, x in arrays.items()])
        for name, values in arrays.items():
            array[name] = values
        np.save(path, array)
    else:
        from pyarrow import Table as ArrowTable
        from pyarrow import parquet

        parquet.write_table(ArrowTable.from_pydict(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".npy", ".parquet"])
def test_all_formats_hold_the_same(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    table = read_signal(written(path, {"time": [0.0, 0.5, 0.5], "gas": [0.25, 1.0, -2.0], "gear": [1, 2, 3]}))
    assert table.columns == ("gas", "gear") and not table.is_discrete
    assert table.times is not None and table.times.tolist() == [0, 0.5, 0.5]
    assert table.values.tolist() == [[0.25, 1], [1, 2], [-2, 3]]
    for cells, expected in ((["left", "stay", "left"], ["left", "stay", "left"]), ([3, 10, -1], ["3", "10", "-1"])):
        table = read_signal(written(path, {"action": cells}))
        assert table.times is None and table.is_discrete and table.values.tolist() == expected
    assert not read_signal(written(path, {"action": [0.5, 1.0, 2.0]})).is_discrete
    with pytest.raises(ValueError, match=r"x\.\w+: .*column b holds 'left', expected numbers"):
        read_signal(written(path, {"a": [1, 2], "b": ["left", "right"]}))


def test_arrays_have_a_row_a_frame(tmp_path):
    for shape, columns in (((5,), ("0",)), ((5, 3), ("0", "1", "2")), ((5, 4, 4), tuple(map(str, range(16))))):
        values = np.random.default_rng(0).normal(size=shape)
        np.save(tmp_path / "x.npy", values)
        table = read_signal(tmp_path / "x.npy")
        assert table.columns == columns and np.array_equal(table.values, values.reshape(5, -1))
    np.save(tmp_path / "x.npy", np.array([[1], [2]]))
    assert read_signal(tmp_path / "x.npy").values.tolist() == ["1", "2"]


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x\.parquet: "):
        read_signal(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="reading Parquet needs pyarrow"):
        read_signal(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", "no name of letters"), ("../x", "no name of letters"), ("x,tak=last", "'tak' is unknown"),
        ("x,kind=word", "kind is 'word'"), ("x,kind=discrete,take=mean", "a discrete signal takes last or count"),
        ("x,kind=pose,take=mean", "a pose signal takes last"), ("x,shift=-1", "shift is '-1'"),
        ("x,shift=5000", "from 0 to 1000"), ("caption", "none of path, caption"),
    ],
)  # fmt: skip
def test_requests_are_checked(text, message):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(("x",), "out", signals=(text,))


def test_a_take_implies_a_kind():
    assert parse_request("x,take=count").kind == "discrete" and parse_request("x,take=mean").kind == "continuous"


# --- rows and frames ---------------------------------------------------------------------------------------


def reference(times, values, shown, moments, fps, take, shift, columns) -> list[list[float]]:
    """Tick by tick what docs/signals.md says. values: of all rows, numbers or words; moments: seconds of the frames."""
    discrete, rows = isinstance(values[0], str), []
    shifted = [None] * shift + list(values)
    begins = range(len(shifted)) if times is None else times
    for tick, frame in enumerate(shown):
        now = frame if times is None else moments[frame] + SLACK
        before = now - (1 if times is None else 1 / fps)
        if tick:
            before = shown[tick - 1] if times is None else moments[shown[tick - 1]] + SLACK
        begun = [value for value, begin in zip(shifted, begins, strict=False) if begin <= now]
        new = begun[sum(begin <= before for begin in begins) :]
        if discrete:
            rows.append([sum(x == column for x in (begun[-1:] if take == "last" else new)) for column in columns])
            continue
        begun, new = ([values[0] if x is None else x for x in own] for own in (begun, new))
        rows.append([sum(new) / len(new) if take == "mean" and new else [values[0], *begun][-1]])
    return rows


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_are_laid_beside_frames_by_the_rules(data):
    steps = data.draw(st.lists(st.integers(10, 200), min_size=3, max_size=30), "ms between frames")
    pts = np.cumsum([data.draw(st.integers(0, 500), "first"), *steps]).tolist()
    rate = Fraction(1000 * len(steps), sum(steps))
    origin = data.draw(st.sampled_from([0.0, 0.75]), "origin")
    video = Video("x", 8, 8, rate, Fraction(1, 1000), tuple(pts), 1.0, origin)
    fps = data.draw(st.sampled_from([3, 12, 30]), "fps")
    shown = frame_indices(video, fps)
    moments = [origin + (x - pts[0]) / 1000 for x in pts]
    shift = data.draw(st.integers(0, 3), "shift")
    discrete = data.draw(st.booleans(), "discrete")
    take = data.draw(st.sampled_from(["last", "count" if discrete else "mean"]), "take")
    times = None
    count = data.draw(st.integers(max(1, len(pts) - shift), len(pts) + 1), "rows")
    if data.draw(st.booleans(), "has times"):
        gaps = data.draw(st.lists(st.integers(0, 150), min_size=5, max_size=80), "ms between rows")
        # half a millisecond away from frames, so that no rounding decides; and to the video's end
        times = (np.cumsum(gaps) / 1000 + origin + 0.0005).tolist()
        times.append(max(times[-1], moments[-1]) + 0.0005)
        count = len(times)
    cell = st.sampled_from("abc") if discrete else st.integers(-4, 4)
    values = data.draw(st.lists(cell, min_size=count, max_size=count), "values")
    columns = ("a", "b", "c") if discrete else ("v",)
    signal = Signal("x", "discrete" if discrete else "continuous", columns, take)
    array = np.array(values) if discrete else np.array(values, float)[:, None]
    table = Table(("v",), None if times is None else np.array(times), array)
    track = align(SignalPlan(signal, ("v",), shift, False), table, video, shown, fps, (0, len(shown)))
    expected = np.array(reference(times, values, shown, moments, fps, take, shift, columns))
    start = data.draw(st.integers(0, len(shown) - 1), "start")
    frames = data.draw(st.integers(1, len(shown) - start), "frames")
    clip = track.clip(start, frames)
    assert clip.shape == (frames, signal.width) and clip.dtype == (np.uint8 if discrete else np.float32)
    np.testing.assert_allclose(clip, expected[start : start + frames], rtol=0, atol=1e-6)


def test_counts_saturate():
    video = Video("x", 8, 8, Fraction(1), Fraction(1, 1000), (0, 1000), 1.0)
    table = Table(("v",), np.linspace(0.1, 0.9, 400), np.array(["a"] * 400))
    plan = SignalPlan(Signal("x", "discrete", ("a",), "count"), ("v",), 0, False)
    assert align(plan, table, video, [0, 1], 1, (0, 2)).clip(0, 2).tolist() == [[0], [255]]


def test_a_latent_frame_has_the_rows_of_its_video_frames():
    values = torch.arange(1, 13).view(6, 2)
    whole = rows_of_latent_frames(values, 3, 2, "discrete")
    assert whole.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]] and whole.dtype == torch.float32
    causal = rows_of_latent_frames(values[:5], 2, 4, "discrete")
    assert causal.tolist() == [[0] * 6 + [1, 2], [3, 4, 5, 6, 7, 8, 9, 10]]
    assert rows_of_latent_frames(values[:5], 2, 4, "continuous")[0].tolist() == [1, 2] * 4
    with pytest.raises(ValueError, match="6 video frames, expected 2 x 2"):
        rows_of_latent_frames(values, 2, 2, "discrete")


# --- poses -------------------------------------------------------------------------------------------------


def rotation(vector: np.ndarray) -> np.ndarray:
    """By Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def test_motion_leads_from_each_pose_to_the_next():
    """Motions that are known, small, large and of nearly half a turn, put one after another."""
    source = np.random.default_rng(0)
    motions = np.concatenate((source.normal(size=(40, 3)), source.normal(size=(40, 3))), 1)
    lengths = np.array([1e-6, 0.01, 1.0, 2.0, math.pi - 1e-4] * 8)
    motions[:, 3:] *= (lengths / np.linalg.norm(motions[:, 3:], axis=1))[:, None]
    pose = np.eye(4)
    pose[:3] = np.concatenate((rotation(np.array([0.3, -2, 1])), [[5], [-7], [1]]), 1)
    poses = [pose]
    for motion in motions:
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = rotation(motion[3:]), motion[:3]
        poses.append(poses[-1] @ step)
    found = relative_motion(np.stack(poses))
    assert found[0].tolist() == [0] * 6
    np.testing.assert_allclose(found[1:], motions, rtol=0, atol=2e-6)


def test_matrices_and_quaternions_are_the_same_pose(tmp_path):
    source = np.random.default_rng(0)
    vectors, positions = source.normal(size=(2, 9, 3))
    angle = np.linalg.norm(vectors, axis=1, keepdims=True)
    quaternions = np.concatenate((vectors / angle * np.sin(angle / 2), np.cos(angle / 2)), 1)
    matrices = np.tile(np.eye(4), (9, 1, 1))
    matrices[:, :3, :3], matrices[:, :3, 3] = [rotation(vector) for vector in vectors], positions
    np.save(tmp_path / "m.npy", matrices)
    np.save(tmp_path / "q.npy", np.concatenate((positions, -quaternions), 1))  # -q turns as q does
    rows = dict(zip((*QUATERNION, *POSITION), np.concatenate((quaternions, positions), 1).T.tolist(), strict=True))
    for path in (tmp_path / "m.npy", tmp_path / "q.npy", written(tmp_path / "q.csv", rows)):
        table = read_signal(path)
        np.testing.assert_allclose(pose_matrices(table.columns, table.numbers()), matrices, rtol=0, atol=1e-12)
    for bad, message in (
        (matrices * 2, "row 1 is no pose"),
        (matrices[:, :3, :3].reshape(9, 9), "the columns x y z qx qy qz qw, or 16, not 0 1 2"),
    ):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match=message):
            pose_matrices((table := read_signal(tmp_path / "bad.npy")).columns, table.numbers())


def test_poses_of_a_maze_become_steps_and_turns(tmp_path):
    """Motion of the walker is what the actions say, also at half the frame rate, where two steps are one motion."""
    write_mazes(tmp_path / "mazes", 1, 3, 40, SIDE, SIDE)
    made(tmp_path / "out", tmp_path / "mazes", signals=("actions", "pose,kind=pose"))
    actions = read_index(tmp_path / "out").signals[0].columns
    steps = {"stay": (0, 0), "forward": (0.25, 0), "back": (-0.25, 0), "left": (0, -math.pi / 12)}
    steps |= {"right": (0, math.pi / 12)}
    clips = stored(tmp_path / "out")
    for clip in clips.values():
        expected = clip["actions"].float() @ torch.tensor([steps[action] for action in actions])
        torch.testing.assert_close(clip["pose"][:, [0, 5]], expected, rtol=0, atol=1e-5)
        assert clip["pose"][:, 1:5].abs().max() < 1e-6
    made(tmp_path / "slow", tmp_path / "mazes", fps=6, signals=("pose,kind=pose",))
    turns = {key: clip["pose"][:, 5] for key, clip in clips.items()}
    slow = stored(tmp_path / "slow")
    for (source, start), clip in slow.items():
        two = [turns[source, start * 2 // 8 * 8].view(-1, 2), turns.get((source, start * 2 // 8 * 8 + 8))]
        for tick in range(1, 4):  # frame u of a clip from u - 1 there: video frames 2u - 1 and 2u
            frames = two[0].flatten()[2 * tick - 1 : 2 * tick + 1]
            torch.testing.assert_close(clip["pose"][tick, 5], frames.sum(), rtol=0, atol=1e-5)


# --- conversion --------------------------------------------------------------------------------------------


def dot_of(frame: torch.Tensor) -> torch.Tensor:
    """Centre of the dot in a frame [3, H, W] of a torus, row and column."""
    light = frame.float().sum(0)
    light = light - light.min()
    angle = torch.arange(SIDE) * (2 * math.pi / SIDE)
    sums = [light.sum(1), light.sum(0)]
    return (
        torch.stack([torch.atan2((x * angle.sin()).sum(), (x * angle.cos()).sum()) for x in sums]) * SIDE / 2 / math.pi
    )


def assert_dots_follow(folder: Path, least: int) -> None:
    """In the pictures of every clip the dot goes from frame to frame where the signal says."""
    index, moves = read_index(folder), 0
    (signal,) = index.signals
    steps = SPEED * torch.tensor([MOVES[action] for action in signal.columns]).float()
    for split in (split for split in index.splits if index.samples(split)):
        reader = ShardReader(folder, index, split)
        for number in range(len(reader)):
            clip = reader.read(number)
            assert clip.signals is not None
            centres = torch.stack([dot_of(frame) for frame in clip.media])
            expected = clip.signals["actions"] @ steps
            off = (centres.diff(dim=0) - expected[1:] + SIDE / 2) % SIDE - SIDE / 2
            assert off.abs().max() < 0.7  # of two pixels a step
            moves += len(off)
    assert moves >= least


@pytest.mark.parametrize("rate", [12, 6])
def test_the_signal_is_of_the_frames_that_are_seen(dots, tmp_path, rate):
    """Also at half the rate with counts, where nothing is lost."""
    report = made(tmp_path / "out", dots, fps=rate, workers=2, stride=5, signals=("actions,take=count",))
    assert "lie between frames" not in report.text
    assert_dots_follow(tmp_path / "out", 100)


def test_scene_cuts_cut_signals_too(dots, tmp_path):
    """Clips begin anew at frames 13 and 30, where the light changes."""
    video = decode_frames(dots / "dot-000.mp4").int()
    video[13:30] += 90
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.mp4").write_bytes(encode_mp4(video.clamp(0, 255).to(torch.uint8), 12))
    os.link(dots / "dot-000.actions.csv", tmp_path / "in" / "x.actions.csv")
    made(tmp_path / "out", tmp_path / "in", scenes=10, held_out=0, signals=("actions",))
    assert [start for _, start in stored(tmp_path / "out")] == [0, 13, 21, 30, 38, 46]
    assert_dots_follow(tmp_path / "out", 40)


def test_rows_between_frames_are_not_lost_silently(dots, tmp_path):
    report = made(tmp_path / "out", dots, fps=6, signals=("actions",))
    assert "116 rows of actions lie between frames and are left out: take=count uses them" in report.text
    counts = torch.cat([clip["actions"].sum(1) for clip in stored(tmp_path / "out").values()])
    assert set(counts.tolist()) == {1}


def test_parts_of_videos_and_variable_frame_rates(dots, tmp_path):
    """Parts that a manifest names, of a video whose frames come at uneven times; by rows and by time stamps alike."""
    import av

    video = decode_frames(dots / "dot-000.mp4")
    steps = np.random.default_rng(0).integers(40, 130, len(video))
    pts = np.cumsum(steps) - steps[0]
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in" / "x.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height = stream.width = SIDE
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "4"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for at, image in zip(pts.tolist(), video.permute(0, 2, 3, 1).contiguous().numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    actions = read_signal(dots / "dot-000.actions.csv").values.tolist()
    written(tmp_path / "in" / "rows.csv", {"action": actions})
    written(tmp_path / "in" / "times.jsonl", {"time": (pts / 1000).round(3).tolist(), "action": actions})
    rows = "".join(f"x.mkv,{start},{start + 2.1},{{}}\n" for start in (0, 1.5, 2.5))
    found = []
    for file in ("rows.csv", "times.jsonl"):
        (tmp_path / "in" / "list.csv").write_text("path,start,end,actions\n" + rows.replace("{}", file))
        out = tmp_path / file[:4]
        made(out, tmp_path / "in" / "list.csv", held_out=0, fps=24, signals=("actions,take=count",))
        assert_dots_follow(out, 50)
        found.append(stored(out))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(clip["actions"], found[1][key]["actions"]) for key, clip in found[0].items())


def test_workers_parts_and_restarts_give_the_same_bytes(dots, tmp_path, monkeypatch):
    options = {"signals": ("actions",), "buckets": ((8, SIDE, SIDE), (4, SIDE, SIDE)), "clips_per_shard": 2}
    made(tmp_path / "one", dots, **options)
    expected = contents(tmp_path / "one")
    assert {clip["actions"].shape for clip in stored(tmp_path / "one").values()} == {(8, 4), (4, 4)}
    for number in (1, 0):
        made(tmp_path / "parts", dots, part=(number, 2), workers=2, **options)
    made(tmp_path / "parts", dots, **options)
    assert contents(tmp_path / "parts") == expected
    finish, groups = shard_writer.finish_group, []

    def dies(*arguments):
        if groups:
            raise KeyboardInterrupt
        groups.append(finish(*arguments))

    monkeypatch.setattr(shard_writer, "finish_group", dies)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "again", dots, **options)
    monkeypatch.setattr(shard_writer, "finish_group", finish)
    for other in (("actions,take=count",), ("actions,shift=1",), ()):
        with pytest.raises(ValueError, match="holds unfinished work with another signals"):
            made(tmp_path / "again", dots, **{**options, "signals": other})
    made(tmp_path / "again", dots, **options)
    assert contents(tmp_path / "again") == expected
    assert not list((tmp_path / "again").glob("*.json.lock"))


def test_another_file_of_a_signal_is_another_plan(dots, tmp_path, monkeypatch):
    folder = tmp_path / "dots"
    folder.mkdir()
    for path in dots.iterdir():
        os.link(path, folder / path.name)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shard_writer, "write_toc", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        made(tmp_path / "out", folder, signals=("actions",), part=(0, 1))
    (folder / "dot-001.actions.csv").unlink()
    with pytest.raises(ValueError, match="unfinished work with another digest"):
        made(tmp_path / "out", folder, signals=("actions",), part=(0, 1))


def test_tars_hold_signals_by_key(dots, tmp_path):
    """KEY.NAME.csv, where KEY ends at the first dot or at the last; the same clips as from the folder."""
    made(tmp_path / "folder", dots, signals=("actions",))
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(dots.iterdir()):
            stem, _, rest = path.name.partition(".")
            view = ".rgb" if stem == "dot-000" and rest == "mp4" else ""
            tar.add(path, f"{stem}{view}.{rest}")
    made(tmp_path / "tar", tmp_path / "x.tar", signals=("actions",))
    one, other = (
        {Path(name).name.split(".")[0]: x for (name, _), x in stored(tmp_path / y).items()} for y in ("folder", "tar")
    )
    assert one.keys() == other.keys() and len(one) == 4
    assert all(torch.equal(one[key]["actions"], other[key]["actions"]) for key in one)


def test_statistics_and_unknown_signals(dots, tmp_path):
    """Three of four videos have speeds: mean and deviation are over their training frames; the others are NaN."""
    folder = tmp_path / "dots"
    folder.mkdir()
    for path in dots.iterdir():
        os.link(path, folder / path.name)
    (folder / "dot-001.actions.csv").unlink()
    source = np.random.default_rng(0)
    for number in range(3):
        rows = {"gas": source.normal(3, 2, 60).tolist(), "brake": [0.5] * 60}
        written(folder / f"dot-{number:03d}.speed.csv", rows)
    report = made(tmp_path / "out", folder, signals=("actions", "speed,take=mean"))
    index = read_index(tmp_path / "out")
    actions, speed = index.signals
    assert actions.columns == ("down", "left", "right", "up") and (actions.kind, actions.mean) == ("discrete", ())
    assert (speed.kind, speed.columns, speed.take, speed.known) == ("continuous", ("gas", "brake"), "mean", 0.75)
    assert "signal speed: continuous, take mean, 2 columns (gas 2.99 ± 1.92, brake 0.5 ± 1), in" in report.text
    assert "in 75.0% of the training clips; 1 of 4 videos have no file of it" in report.text
    assert "signal actions: discrete" in describe(tmp_path / "out", index)
    reader = ShardReader(tmp_path / "out", index, "train")
    clips = [reader.read(number) for number in range(len(reader))]
    known = torch.cat([clip.signals["speed"] for clip in clips if not clip.signals["speed"].isnan().any()])
    assert len(known) == 18 * 8
    assert speed.mean == pytest.approx(known.double().mean(0).tolist())
    assert speed.std == pytest.approx((known[:, 0].double().std(correction=0).item(), 1.0))
    assert sum(bool(clip.signals["speed"].isnan().all()) for clip in clips) == 6
    assert sum(bool(clip.signals["actions"].isnan().all()) for clip in clips) == 6


def test_slices_of_frames_are_slices_of_clips(dots, tmp_path):
    """For autoencoders whose first latent frame is one video frame, and for others; NaN, too."""
    written(dots / "dot-002.speed.csv", {"v": [x / 60 for x in range(60)]})
    for encode, factor, frames, latents in ((pairs, 2, 8, 4), (first_alone, 3, 7, 3)):
        out = tmp_path / f"{factor}"
        made(out, dots, encode=encode, factor=factor, frames=frames, store="latent", signals=("actions", "speed"))
        whole = batches(out)
        assert whole[0].signals is not None and whole[0].signals["actions"].shape == (4, latents, factor * 4)
        parts = [batches(out, frames=[(a, b)]) for a, b in ((0, 1), (1, latents - 1), (latents - 1, latents))]
        for number, batch in enumerate(whole):
            for name in ("actions", "speed"):
                joined = torch.cat([part[number].signals[name] for part in parts], 1)
                assert torch.equal(joined.nan_to_num(7), batch.signals[name].nan_to_num(7))
    (dots / "dot-002.speed.csv").unlink()
    index = read_index(tmp_path / "3")
    clip = ShardReader(tmp_path / "3", index, "train").read(0)
    assert clip.signals["actions"][0, :8].tolist() == [0] * 8 and clip.signals["actions"][0, 8:].sum() == 1


def test_all_tensors_of_a_batch_are_pinned(dots, tmp_path, monkeypatch):
    made(tmp_path / "out", dots, signals=("actions",))
    batch = batches(tmp_path / "out")[0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    assert torch.equal(batch.pin_memory().signals["actions"], batch.signals["actions"] + 1)


def test_a_flipped_bit_is_found(dots, tmp_path):
    made(tmp_path / "out", dots, signals=("actions",))
    index = read_index(tmp_path / "out")
    path = tmp_path / "out" / index.splits["train"][0].name
    offset, size = scan(path)[1].parts["signals.safetensors"]
    content = bytearray(path.read_bytes())
    content[offset + size - 1] ^= 1
    path.write_bytes(content)
    reader = ShardReader(tmp_path / "out", index, "train")
    reader.read(0)
    with pytest.raises(ValueError, match="checksum of the signals"):
        reader.read(1)


# --- indexes and mixtures ----------------------------------------------------------------------------------

SIGNAL = Signal("speed", "continuous", ("v",), "last", (1.0,), (2.0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "'../x' is no name"), ({"columns": []}, "has 0 columns"),
        ({"columns": ["a", "a"]}, "has 2 columns, expected 1 to 1024 different"),
        ({"columns": [str(x) for x in range(1025)]}, "has 1025 columns"), ({"columns": ["x\n"]}, "has a column 'x"),
        ({"take": "count"}, "take is 'count'"), ({"kind": "other"}, "kind"), ({"mean": []}, "0 means and 1 deviations"),
        ({"mean": [math.inf]}, "must be finite|finite number"), ({"std": [0.0]}, "std above 0"),
        ({"known": 2.0}, "known is 2.0"), ({"width": 3}, "unexpected keyword"), ({"name": 3}, "valid string"),
    ],
)  # fmt: skip
def test_what_an_index_says_of_signals_is_checked(dots, tmp_path, change, message):
    made(tmp_path / "out", dots)
    index, path = read_index(tmp_path / "out"), tmp_path / "out" / "index.json"
    assert "signals" not in json.loads(path.read_text()) and index.format == 1  # as ever
    write_index(tmp_path / "out", dataclasses.replace(index, signals=(SIGNAL,)))
    assert read_index(tmp_path / "out").signals == (SIGNAL,) and read_index(tmp_path / "out").format == 3
    fields = json.loads(path.read_text())
    fields["signals"][0] |= change
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"is damaged .*({message})"):
        read_index(tmp_path / "out")
    fields["signals"] = [dataclasses.asdict(SIGNAL)] * 2
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="2 signals, expected at most 16 of different names"):
        read_index(tmp_path / "out")


def test_sets_are_matched_by_the_names_of_signals(dots, tmp_path):
    made(tmp_path / "steered", dots, signals=("actions",))
    made(tmp_path / "plain", dots)
    write_mazes(tmp_path / "mazes", 1, 3, 40, SIDE, SIDE)
    made(tmp_path / "mazes_out", tmp_path / "mazes", signals=("actions",))

    def config(*names: str) -> DataConfig:
        return DataConfig(shards=tuple(ShardSetConfig(str(tmp_path / name)) for name in names))

    shards = open_shards(config("plain", "steered"))
    assert [(signal.name, signal.known) for signal in shards.index.signals] == [("actions", 0.5)]
    for batch in loader(shards, "train", seed=0, clock=0, clips=4, stop=16, workers=0):
        unknown = batch.signals["actions"].isnan().flatten(1).all(1).tolist()
        assert unknown == [key.startswith("plain") for key in batch.keys]
    with pytest.raises(ValueError, match="steered and .*mazes_out differ in columns of signal actions"):
        open_shards(config("steered", "mazes_out"))


def test_means_and_deviations_are_mixed(dots, tmp_path):
    made(tmp_path / "one", dots)
    index = read_index(tmp_path / "one")
    for name, mean in (("one", 0.0), ("other", 3.0)):
        (tmp_path / name).mkdir(exist_ok=True)
        write_index(tmp_path / name, dataclasses.replace(index, signals=(dataclasses.replace(SIGNAL, mean=(mean,)),)))
    sets = (ShardSetConfig(str(tmp_path / "one"), 2), ShardSetConfig(str(tmp_path / "other"), 1))
    (signal,) = open_shards(DataConfig(shards=sets)).index.signals
    assert signal.mean == pytest.approx((1.0,)) and signal.std == pytest.approx((math.sqrt(4 + 2),))


def test_the_command_line_converts_and_shows_signals(dots, tmp_path, capsys):
    options = ["--frames", "8", "--size", f"{SIDE}x{SIDE}", "--autoencoder", "pixels", "--signal", "actions,take=count"]
    assert cli.main(["convert", str(dots), "--out", str(tmp_path / "out"), *options]) == 0
    assert cli.main(["inspect", str(tmp_path / "out"), "--verify", "--picture", str(tmp_path / "x.png")]) == 0
    line = "signal actions: discrete, take count, 4 values (down, left, right, up), in 100.0% of the training clips"
    assert capsys.readouterr().out.count(line) == 2
    assert (tmp_path / "x.png").stat().st_size > (tmp_path / "out" / "contact.png").stat().st_size / 2


def test_bars_rise_with_the_values():
    values = torch.tensor([[-3.0, 0.0], [1.0, math.nan]])
    bars = signal_bars(Signal("x", "continuous", ("a", "b"), "last", (0.0, 0.0), (0.5, 1.0)), values, 12, 10)
    filled = (bars != 255).any(1)
    assert filled[:, :, 0].sum(1).tolist() == [0, 12] and filled[:, :, -1].sum(1).tolist() == [6, 6]
    assert set(bars[1, :, -1, -1].tolist()) == {200}


def test_a_dot_goes_where_it_is_steered():
    video, actions, centre = steered_dots(3, 2, 20, SIDE, 48)
    assert torch.equal(video, steered_dots(3, 2, 20, SIDE, 48)[0]) and not torch.equal(video[0], video[1])
    moved = (centre[:, 1:] - centre[:, :-1] + 8) % torch.tensor([SIDE, 48]) - 8
    assert torch.equal(moved, 2 * torch.tensor(list(MOVES.values()))[actions[:, 1:]])
    light = video.sum(2)
    at = light[torch.arange(2)[:, None], torch.arange(20), centre[..., 0], centre[..., 1]]
    assert torch.equal(at, light.flatten(2).amax(2))


def test_the_recorder_of_doom_says_what_it_needs(tmp_path):
    script = PAGE.parent.parent / "examples" / "doom" / "record.py"
    run = f"import runpy, sys; sys.modules['vizdoom'] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", run, "--out", str(tmp_path / "doom")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "vizdoom is missing: pip install vizdoom av\n")
    assert not (tmp_path / "doom").exists()


# --- bad files ---------------------------------------------------------------------------------------------

GOOD = ["left", "right", "up", "left", "left"] * 10


def column(*cells: object) -> bytes:
    return "\n".join(map(str, cells)).encode()


def array(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


CLAIM = array(np.zeros(50)).replace(b"(50,), }" + b" " * 11, b"(1000000000000,), }")
TIMES = [f"{x / 12},left" for x in range(50)]
# What, name and content of the file beside a video of 50 frames, what happens, remark. Others have one row a frame.
FILES: list[tuple[str, str, bytes, str, str]] = [
    ("no file", "", b"", "unknown", "counted in the report and in `msc inspect`"),
    ("fewer rows than frames", "csv", column("action", *GOOD[:49]),
     "is too short: it has 49 rows, frame 49", "`shift=1` asks for one less"),
    ("two rows more than frames", "csv", column("action", *GOOD, "up", "up"),
     "has 52 rows, the video 50 frames", "one more is allowed: the action after the last frame"),
    ("time stamps that end more than a second early", "csv", column("time,action", *TIMES[:34]),
     "is too short: it ends at 2.75 s", "the last value is held for a second, or for the file's longest gap"),
    ("time stamps that begin two seconds late", "csv", column("time,action", *TIMES[24:]),
     "begins at 2 s", "perhaps of another clock: second 0 is the start of the video file"),
    ("time that goes back", "csv", column("time,action", "0,left", "2,left", "1,left", "5,left"),
     "time goes back in row 3, from 2 to 1 s", ""),
    ("NaN", "csv", column("action", *GOOD[:20], "nan", *GOOD[21:]),
     "row 21 of column action is nan", "infinite and beyond 32 bits alike"),
    ("an empty cell", "csv", column("action,note", *(f"{x}," for x in GOOD)), "row 1 of column note is empty", ""),
    ("another column", "csv", column("move", *GOOD),
     "has the columns move, not action", "most files of a signal decide"),
    ("fractions where others have words", "csv", column("action", *(x / 50 for x in range(50))),
     "holds fractions, expected words", ""),
    ("words beside numbers", "csv", column("action,speed", *(f"{x},1" for x in GOOD)),
     "column action holds 'left', expected numbers", "words are read as a file's only column"),
    ("no header", "csv", column(*range(50)), "has no header", ""),
    ("a row of more cells", "csv", column("action", *GOOD[:9], "left,2", *GOOD[10:]),
     "row 10 has 2 cells, the header 1", ""),
    ("nothing in it", "csv", b"", "is empty", ""),
    ("a header alone", "csv", b"action\n", "has no rows", ""),
    ("not UTF-8", "csv", column("action", *GOOD) + b"\xff", "can't decode byte 0xff", ""),
    ("lines of lists", "jsonl", column(*(json.dumps([x]) for x in GOOD)), "row 1 is no JSON object", ""),
    ("cut off JSON", "jsonl", column(*(json.dumps({"action": x}) for x in GOOD))[:-3], "Unterminated string", ""),
    ("an array of Python objects", "npy", array(np.array(GOOD, object)),
     "Object arrays cannot be loaded", "pickles are never loaded"),
    ("an array that claims more than is there", "npy", CLAIM, "claims more than it holds", ""),
    ("a cell of 100,000 letters", "csv", column("action", *GOOD[:-1], "x" * 10**5),
     "column action has a cell of more than 100 characters", "a column would take as much for every row"),
    ("text called .parquet", "parquet", column("action", *GOOD), "magic bytes", ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    return convert_bad_files(tmp_path_factory.mktemp("bad"))


def convert_bad_files(folder: Path) -> dict[str, str]:
    """What became of every file of FILES: one conversion, in which as many videos have good files."""
    (folder / "in").mkdir()
    video = steered_dots(0, 1, 50, 16, 16)[0][0]
    for number, (_, suffix, content, *_) in enumerate(FILES):
        for name, end, bytes_ in (("bad", suffix, content), ("good", "csv", column("action", *GOOD))):
            video[:, :, :2, :2] = number * 10 + 5 * (name == "bad")  # copies would count once
            path = folder / "in" / f"{name}-{chr(97 + number)}.mp4"
            path.write_bytes(encode_mp4(video, 12))
            if end:
                path.with_suffix(f".actions.{end}").write_bytes(bytes_)
    report = made(folder / "out", folder / "in", height=16, width=16, max_bad=0.9, signals=("actions",))
    skipped, clips = dict(report.skipped), stored(folder / "out")
    assert len(skipped) == len(FILES) - 1 and not any("good" in name for name in skipped)
    assert "1 of 44 videos have no file of it" in report.text
    found = {}
    for number, (what, *_) in enumerate(FILES):
        name = f"in/bad-{chr(97 + number)}.mp4"
        unknown = all(not clip for (source, _), clip in clips.items() if source == name)
        reason = skipped.get(name, "unknown" if unknown else "used")
        found[what] = reason
    return found


@pytest.mark.parametrize(("what", "suffix", "expected"), [(x[0], x[1], x[3]) for x in FILES], ids=[x[0] for x in FILES])
def test_a_bad_file_is_named(outcomes, what, suffix, expected):
    prefix = f"signal actions (bad-{chr(97 + [x[0] for x in FILES].index(what))}.actions.{suffix}) "
    assert outcomes[what].startswith(prefix if suffix else expected) and expected in outcomes[what]


def table() -> str:
    rows = [
        (what, f"skipped: {expected}" if suffix else expected, remark) for what, suffix, _, expected, remark in FILES
    ]
    return "\n".join(
        ["", "| file | its video is | |", "| --- | --- | --- |", *(f"| {' | '.join(x)} |" for x in rows), ""]
    )


def test_the_page_says_what_becomes_of_bad_files():
    _, rest = PAGE.read_text().split(MARKS[0])
    assert rest.split(MARKS[1])[0] == table()


def test_what_no_video_can_have_is_refused_before_work(dots, tmp_path):
    with pytest.raises(ValueError, match=r"signal camera: no video has it; .* dot-000\.camera\.csv"):
        made(tmp_path / "out", dots, signals=("camera",))
    write_videos(tmp_path / "in", 0, 1, 60, SIDE, SIDE)
    stem = tmp_path / "in" / "synthetic-000"
    for suffix, content, options, message in (
        ("csv", column("id", *range(1025), *range(60)), "", "1025 different values, at most 1024 .*kind=continuous"),
        (
            "csv",
            column("v", *(0.5,) * 60),
            ",kind=discrete",
            "discrete values are words or whole numbers in one column",
        ),
        ("csv", b"", "", r"none of its 1 files can be read \(synthetic-000.x.csv: is empty\)"),
        ("npy", array(np.zeros((60, 1025))), "", "signals.x has 1025 columns, expected 1 to 1024"),
    ):
        path = stem.with_suffix(f".x.{suffix}")
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            made(tmp_path / "out", tmp_path / "in", signals=(f"x{options}",))
        assert not (tmp_path / ".out.partial").exists() and not (tmp_path / "out").exists()
        path.unlink()
    for suffix in ("csv", "npy"):
        stem.with_suffix(f".x.{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"synthetic-000\.mp4: synthetic-000\.x\.csv and .*x\.npy are one signal"):
        made(tmp_path / "out", tmp_path / "in", signals=("x",))
    (tmp_path / "in" / "list.jsonl").write_text('{"path": "synthetic-000.mp4", "x": 3}')
    with pytest.raises(ValueError, match="line 1: a signal is 3, expected the name of its file"):
        made(tmp_path / "out", tmp_path / "in" / "list.jsonl", signals=("x",))


def test_a_file_that_a_list_names_must_be_there(dots, tmp_path):
    rows = [f"{path},{path.with_suffix('.actions.csv')}" for path in sorted(dots.glob("*.mp4"))]
    rows[1] = rows[1].replace("actions", "action")
    (tmp_path / "list.csv").write_text("\n".join(["path,actions", *rows]))
    report = made(tmp_path / "out", tmp_path / "list.csv", signals=("actions",))
    assert [reason for _, reason in report.skipped] == ["signal actions (dot-001.action.csv) is not there"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        convert_bad_files(Path(temporary))
    page, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(f"{page}{MARKS[0]}{table()}{MARKS[1]}{rest.split(MARKS[1])[1]}")
