"""Scenes and filters: clips keep clear of cuts; dark and static ones are left out and named; crops."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_video import write_video

from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare.clip_ranges import frozen_ranges
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.scenes import brightness, content_change, frame_content, motion
from msc.datasets.shards.index import read_index, read_part, scan
from msc.datasets.synthetic import moving_textures
from msc.datasets.video import decode_frames, encode_mp4


def raw(video: torch.Tensor) -> torch.Tensor:
    return video.float()


def settings(tmp_path: Path, **changes) -> ConvertConfig:
    defaults = {"frames": 8, "height": 32, "width": 32, "fps": 12, "held_out": 0.0}
    return ConvertConfig((str(tmp_path / "a.mp4"),), str(tmp_path / "out"), **{**defaults, **changes})


def starts(folder: Path) -> list[int]:
    shards = [folder / shard.name for shard in read_index(folder).splits["train"]]
    return [json.loads(read_part(path, sample, "json"))["start"] for path in shards for sample in scan(path)]


def test_content_is_hue_saturation_and_value():
    colours = {(255, 0, 0): (0, 255, 255), (0, 255, 0): (85, 255, 255), (0, 0, 255): (170, 255, 255),
               (0, 0, 0): (0, 0, 0), (128, 128, 128): (0, 0, 128), (255, 128, 128): (0, 127, 255)}  # fmt: skip
    for rgb, hsv in colours.items():
        assert frame_content(np.full((4, 4, 3), rgb, np.uint8))[2, 2] == pytest.approx(hsv, abs=0.01)
    red, violet = (frame_content(np.full((4, 4, 3), rgb, np.uint8)) for rgb in ((255, 0, 0), (255, 0, 12)))
    assert content_change(red, violet) < 1  # hue is a circle
    assert content_change(red, red) == 0


def test_clips_keep_clear_of_cuts(tmp_path):
    scenes = moving_textures(0, 3, 60, 32, 32)
    # Cuts at 21 and 41; the second scene is inverted so that neighbours differ for certain.
    video = torch.cat([scenes[0, :21], 255 - scenes[1, :20], scenes[2, :19]])
    (tmp_path / "a.mp4").write_bytes(encode_mp4(video, 12))
    convert(settings(tmp_path), raw, 1)
    assert starts(tmp_path / "out") == [0, 8, 16, 24, 32, 40, 48]
    convert(settings(tmp_path, scenes=27, overwrite=True), raw, 1)
    assert starts(tmp_path / "out") == [0, 8, 21, 29, 41, 49]
    convert(settings(tmp_path, scenes=27, stride=6, overwrite=True), raw, 1)
    assert starts(tmp_path / "out") == [0, 6, 12, 21, 27, 33, 41, 47]
    with pytest.raises(ValueError, match="has no scene of 30 frames"):
        convert(settings(tmp_path, scenes=27, frames=30, overwrite=True), raw, 1)


def test_holds_are_what_lies_between_stretches():
    shown = [0, 1, 1, 1, 2, 3, 3, 3, 3, 4]
    assert frozen_ranges(shown, 0, 10, 3) == [(6, 9)]
    assert frozen_ranges(shown, 0, 10, 2) == [(2, 4), (6, 9)]
    assert frozen_ranges(shown, 2, 8, 2) == [(6, 8)]
    assert frozen_ranges(shown, 4, 4, 2) == frozen_ranges(shown, 0, 10, 4) == []


@pytest.mark.parametrize("scenes", [0, 27])
def test_a_jump_of_the_clock_ends_a_stretch_and_is_named(tmp_path, scenes):
    """No clip shows the frame before it again and again."""
    video = moving_textures(0, 1, 60, 32, 32)[0].permute(0, 2, 3, 1).numpy()
    times = [round(i * 1000 / 12) + 3_600_000 * (i >= 30) for i in range(60)]
    write_video(tmp_path / "a.mp4", video, times, base=Fraction(1, 1000))
    convert(settings(tmp_path, scenes=scenes), raw, 1)
    assert starts(tmp_path / "out") == [0, 8, 16, *(43_230 + i for i in (0, 8, 16))]
    told = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    # The last frame shows for an average one, which is long here.
    assert told == ["a.mp4: shows one frame from 2.58 to 3602.50 s", "a.mp4: shows one frame from 3605.08 to 3664.92 s"]
    convert(settings(tmp_path, scenes=scenes, held_out=0.5, overwrite=True), raw, 1)
    assert starts(tmp_path / "out") == [0, 8, 16]
    held_out = ShardReader(tmp_path / "out", read_index(tmp_path / "out"), "held_out")
    assert len(held_out) == 3


def test_dark_and_static_clips_are_left_out_and_named(tmp_path):
    lively = moving_textures(0, 1, 32, 32, 32)[0]
    video = torch.cat([lively[:8], lively[8:16] // 40, lively[16:17].repeat(8, 1, 1, 1), lively[24:]])
    (tmp_path / "a.mp4").write_bytes(encode_mp4(video, 12))
    picture = lively.permute(0, 2, 3, 1).numpy()
    assert 0.3 < brightness(picture) < 0.7
    assert motion(picture) > 0.006
    assert motion(picture[:1]) == 0
    report = convert(settings(tmp_path, min_brightness=0.05, min_motion=0.003), raw, 1)
    assert starts(tmp_path / "out") == [0, 24]
    told = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line[: line.index("(")] for line in told] == [
        "a.mp4: clip at 0.67 s is too dark ", "a.mp4: clip at 1.33 s is too static "
    ]  # fmt: skip
    assert "2 clips or stretches are left out" in report.text
    with pytest.raises(ValueError, match="gives no clip that passes the filters"):
        convert(settings(tmp_path, min_brightness=0.99, overwrite=True), raw, 1)
    assert starts(tmp_path / "out") == [0, 24]  # the failure left the old one


def test_random_crops_lie_inside_and_differ_from_clip_to_clip(tmp_path):
    columns = torch.arange(128).mul(2).to(torch.uint8).expand(24, 3, 32, 128)
    (tmp_path / "a.mp4").write_bytes(encode_mp4(columns, 12, crf=0))
    wanted = {"centre": 1, "random": 3}
    for crop, different in wanted.items():
        convert(settings(tmp_path, crop=crop, overwrite=True), raw, 1)
        index = read_index(tmp_path / "out")
        videos = [ShardReader(tmp_path / "out", index, "train").read(i)[1] for i in range(3)]
        edges = [round(float(video[..., 0].float().mean() / 2)) for video in videos]
        for edge, video in zip(edges, videos, strict=True):
            assert 0 <= edge <= 96
            assert (video.float() - columns[:8, :, :, edge : edge + 32].float()).abs().mean() < 3
        assert len(set(edges)) == different
        assert crop != "centre" or edges == [48] * 3
    first = (tmp_path / "out" / index.splits["train"][0].name).read_bytes()
    convert(settings(tmp_path, crop="random", overwrite=True), raw, 1)
    assert (tmp_path / "out" / index.splits["train"][0].name).read_bytes() == first
    assert decode_frames(tmp_path / "a.mp4", size=(32, 32)).shape == (24, 3, 32, 32)
