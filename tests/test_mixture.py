"""Buckets and mixtures: which clip comes when, statistics over all, errors before training starts."""

import dataclasses
import itertools
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import slow_shard_check
import torch
from gloo_ranks import run_ranks

from msc.datasets.loading import shuffling
from msc.datasets.loading.dataloader import Batch, loader
from msc.datasets.loading.held_out import held_out_batches
from msc.datasets.loading.mixture import DataConfig, ShardSetConfig, batches_per_round, open_shards, stream_slots
from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.loading.shuffling import SLOTS, BucketSchedule, WindowShuffle, apportion, epoch_permutation, stream_at
from msc.datasets.prepare.clip_ranges import best_buckets, split_into_clips
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.shards.index import read_index
from msc.datasets.statistics import Statistics, measure_statistics, mix_statistics
from msc.datasets.synthetic import write_videos
from msc.pretrain import validation
from msc.pretrain.config import load

BUCKETS = ((8, 16, 24), (4, 16, 24), (8, 24, 16))


def pixels(video: torch.Tensor) -> torch.Tensor:
    return video.float() / 127.5 - 1


def make(folder: Path, seed: int, **changes) -> Path:
    """Two landscape videos of 44 and one portrait video of 60 frames, as shards."""
    write_videos(folder / "videos" / "wide", seed, 2, 44, 32, 48)
    write_videos(folder / "videos" / "tall", seed + 1, 1, 60, 48, 32)
    options = {"fps": 12, "held_out": 0.25, "clips_per_shard": 3, "buckets": BUCKETS, "autoencoder": "pixels"}
    convert(ConvertConfig((str(folder / "videos"),), str(folder / "out"), **{**options, **changes}), pixels, 1)
    return folder / "out"


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("bucketed"), 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """One bucket, the first of the others: so that a mixture shares it."""
    options = {"buckets": (), "frames": 8, "height": 16, "width": 24}
    return make(tmp_path_factory.mktemp("plain"), 7, **options)


def read(data: DataConfig, batches: int, **options) -> list[Batch]:
    options = {"seed": 3, "clock": 0, "clips": 2, "workers": 0, **options}
    return list(itertools.islice(loader(open_shards(data), "train", **options), batches))


def same(a: Batch, b: Batch) -> bool:
    return all(getattr(a, x) == getattr(b, x) for x in ("samples", "epochs", "keys", "bucket")) and torch.equal(
        a.video, b.video
    )


# --- which bucket ------------------------------------------------------------------------------------------


def test_clip_ranges_take_the_longest_length_that_fits():
    assert split_into_clips(0, 45, [8, 32]) == [(0, 32), (32, 8)]
    assert split_into_clips(3, 10, [8]) == []
    assert split_into_clips(0, 40, [8, 16], stride=10) == [(0, 16), (10, 16), (20, 16), (30, 8)]
    assert split_into_clips(0, 50, [8], stride=20) == [(0, 8), (20, 8), (40, 8)]


@pytest.mark.parametrize(
    ("height", "width", "ticks", "chosen"),
    [
        (720, 1280, 100, {32: 0, 8: 1}),  # landscape, both lengths
        (720, 1280, 20, {32: 0, 8: 1}),  # the longer does not fit anywhere, and is not asked for
        (1280, 720, 100, {32: 2}),
        (1280, 720, 20, {16: 3, 4: 5}),  # too short for the portrait bucket: the square is nearest
        (500, 500, 100, {16: 3, 4: 5}),  # square: the largest that is not upscaled
        (200, 200, 100, {16: 4}),
        (60, 60, 100, {16: 4}),  # none without enlarging: the smallest
        (720, 1280, 3, {}),
    ],
)
def test_the_nearest_shape_and_the_largest_size_without_enlarging(height, width, ticks, chosen):
    shapes = [(32, 144, 256), (8, 144, 256), (32, 256, 144), (16, 256, 256), (16, 128, 128), (4, 256, 256)]
    assert best_buckets(shapes, height, width, ticks) == chosen


def test_every_video_goes_to_its_bucket(bucketed):
    index = read_index(bucketed)
    assert json.loads((bucketed / "index.json").read_text())["format"] == 2
    assert [str(one.shape) for one in index.by_bucket()] == ["8x16x24", "4x16x24", "8x24x16"]
    # 33 training and 11 held-out frames of the wide videos: 4 clips of 8, then 1 of 8; 45 and 15 of the tall one
    assert [(one.samples("train"), one.samples("held_out")) for one in index.by_bucket()] == [(8, 2), (0, 0), (5, 1)]
    for one in index.by_bucket():
        for split in ("train", "held_out"):
            for number in range(one.samples(split)):
                _, media, *_ = ShardReader(bucketed, one, split).read(number)
                assert media.shape == (one.video_frames, 3, one.video_height, one.video_width)


def test_the_rest_of_a_scene_makes_a_shorter_clip(tmp_path):
    folder = make(tmp_path, 0, held_out=0.0)
    # 44 = 5 x 8 + 4 frames, 60 = 7 x 8 + 4 of which the tall bucket has no use
    assert [one.samples("train") for one in read_index(folder).by_bucket()] == [10, 2, 7]
    again = make(tmp_path / "again", 0, held_out=0.0, workers=2)
    assert read_index(again).splits == read_index(folder).splits  # with their checksums


def test_one_bucket_writes_format_1(plain, tmp_path):
    fields = json.loads((plain / "index.json").read_text())
    assert fields["format"] == 1
    assert "buckets" not in fields
    assert not any("bucket" in shard for shard in fields["splits"]["train"])
    assert (
        make(tmp_path, 7, buckets=((8, 16, 24),)).joinpath("train-000000-000000.tar").read_bytes()
        == (plain / "train-000000-000000.tar").read_bytes()
    )


# --- order -------------------------------------------------------------------------------------------------


def test_a_round_holds_every_batch_of_every_bucket_once():
    clips, batch = [13, 4, 9], 4
    batches = [n // batch for n in clips]
    turns, numbers = BucketSchedule(batches, 1), [0] * len(clips)
    for step in range(5 * sum(batches)):
        bucket, number = turns(step)
        assert number == numbers[bucket]  # of each bucket one after another: none left out, none twice
        numbers[bucket] += 1
        if (step + 1) % sum(batches) == 0:
            assert numbers == [(step + 1) // sum(batches) * n for n in batches]
    assert BucketSchedule(batches, 1)(17) == turns(17)  # from anywhere
    assert len({tuple(BucketSchedule(batches, seed)(step)[0] for step in range(12)) for seed in range(6)}) > 3


def test_streams_alternate_by_weight_without_losing_clips():
    shares = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    each = apportion(shares)
    assert each == [512, 341, 171]
    places = [stream_at(position, each, 5) for position in range(3 * SLOTS)]
    for number, count in enumerate(each):
        assert sorted(p for s, p in places if s == number) == list(range(3 * count))
        assert 0.7 < sum(s == number for s, _ in places[:256]) / 256 / (count / SLOTS) < 1.3  # spread, not in a block
    assert [stream_at(p, [1], 5) for p in (0, 7)] == [(0, 0), (0, 7)]


def test_windows_hold_few_shards_and_every_clip_once():
    counts = [5, 3, 7, 5, 1, 6]
    shuffle = WindowShuffle(counts, 2, 3)
    owner = [shard for shard, count in enumerate(counts) for _ in range(count)]
    epochs = [[shuffle(e * 27 + i) for i in range(27)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        samples = [s for _, s in epoch]
        assert sorted(samples) == list(range(27))
        last = {shard: max(i for i, s in enumerate(samples) if owner[s] == shard) for shard in range(6)}
        first = {shard: min(i for i, s in enumerate(samples) if owner[s] == shard) for shard in range(6)}
        assert max(sum(first[s] <= i <= last[s] for s in range(6)) for i in range(27)) <= 2
    assert len({tuple(s for _, s in epoch) for epoch in epochs}) == 3
    assert shuffle(30) == epochs[1][3]  # back and forth
    assert any(abs(a - b) > 1 for (_, a), (_, b) in itertools.pairwise(epochs[0][:5]))


def test_window_shuffle_caches_both_epochs_at_their_border(monkeypatch):
    epochs_shuffled = []
    monkeypatch.setattr(
        shuffling, "epoch_permutation", lambda *args: epochs_shuffled.append(args[2]) or epoch_permutation(*args)
    )
    windows = WindowShuffle([5] * 300, 3, 1)
    positions = [place for p in range(4 * 1500) for one, place in [stream_at(p, [512, 512], 7)] if one == 0]
    epochs = [windows(place)[0] for place in positions]
    assert sum(a > b for a, b in itertools.pairwise(epochs)) > 10  # back and forth
    assert epochs_shuffled == sorted(set(epochs))


# --- batches -----------------------------------------------------------------------------------------------


@pytest.fixture
def data(bucketed, plain) -> DataConfig:
    """A mixture in which one bucket is of both sets and one of a single one; without the empty bucket."""
    index = json.loads((bucketed / "index.json").read_text())
    if len(index["buckets"]) == 3:
        del index["buckets"][1]
        for shard in (shard for shards in index["splits"].values() for shard in shards):
            shard["bucket"] //= 2
        (bucketed / "index.json").write_text(json.dumps(index))
    return DataConfig((ShardSetConfig(str(bucketed), 1.0), ShardSetConfig(str(plain), 3.0)))


@pytest.mark.parametrize("each", [1, 2])
def test_held_out_clips_do_not_depend_on_the_number_of_ranks(data, each):
    """And every row takes part in as many whole batches."""
    shards = open_shards(data)
    expected = sorted(sample for batch, _ in held_out_batches(shards, 5, each) for sample in batch.samples)
    for ranks in (2, 3, 8):
        of_ranks = [list(held_out_batches(shards, 5, each, ranks, rank)) for rank in range(ranks)]
        assert len({len(batches) for batches in of_ranks}) == 1
        assert {len(batch.samples) for batches in of_ranks for batch, _ in batches} == {each}
        counted = [sample for batches in of_ranks for batch, count in batches for sample in batch.samples[:count]]
        assert sorted(counted) == expected


@pytest.mark.parametrize("one_set", [True, False])
@pytest.mark.parametrize("window", [0, 1])
def test_ranks_workers_and_restarts_change_nothing(data, one_set, window):
    data = DataConfig(data.sets[0].path) if one_set else data
    data = dataclasses.replace(data, window=window)
    whole = read(data, 12, window=window)
    assert {batch.bucket for batch in whole} == {0, 1}
    for batch in whole:
        assert batch.video.shape[1:] == ((8, 3, 16, 24), (8, 3, 24, 16))[batch.bucket]
    parts = [read(data, 12, rank=rank, ranks=2, workers=rank, window=window) for rank in range(2)]
    for batch, a, b in zip(whole, *parts, strict=True):
        assert (a.bucket, b.bucket) == (batch.bucket, batch.bucket)
        joined = dataclasses.replace(a, samples=a.samples + b.samples, keys=a.keys + b.keys,
                                     epochs=a.epochs + b.epochs, video=torch.cat([a.video, b.video]))  # fmt: skip
        assert same(joined, batch)
    for done in (1, 5, 11):
        rest = read(data, 12 - done, clock=2 * done, window=window)
        assert all(map(same, rest, whole[done:]))
    slices = read(data, 6, frames=[(0, 3), (5, 8)])
    for batch, part in zip(read(data, 6), slices, strict=True):
        assert torch.equal(part.video, batch.video[:, slice(0, 3) if batch.bucket == 0 else slice(5, 8)])


def test_epoch_rounds_see_every_clip(data):
    data = DataConfig(data.sets[0].path)
    shards = open_shards(data)
    assert batches_per_round(shards, "train", 2) == [4, 2]  # 8 clips, and 5: one of those comes first in the next round
    seen: list[list[int]] = [[], []]
    for batch in read(data, 30):
        seen[batch.bucket] += batch.samples
    for samples, clips, first in zip(seen, (8, 5), (0, 8), strict=True):
        whole = [samples[i : i + clips] for i in range(0, len(samples) - clips + 1, clips)]
        assert len(whole) >= 4
        assert all(sorted(epoch) == list(range(first, first + clips)) for epoch in whole)


def test_a_mixture_is_seen_by_weight_and_names_its_sets(data, plain):
    shards = open_shards(data)
    assert [one.name for one in shards.sets] == [str(Path(one.path)) for one in data.sets]  # both end in "out"
    clips = [clip for batch in read(data, 150) for clip in zip(batch.samples, batch.keys, strict=True)]
    assert all(key.startswith(data.sets[sample >= 13].path + ":train-") for sample, key in clips)
    assert abs(sum(sample >= 13 for sample, _ in clips) / len(clips) - 0.75) < 0.05
    assert {sample for sample, _ in clips} == set(range(13 + read_index(plain).samples("train")))
    assert stream_slots(shards.streams("train")[1]) == [1]


def test_statistics_are_mixed_by_weight(data):
    shards = open_shards(data)
    parts = [(one.weight, one.index.statistics) for one in shards.sets]
    assert shards.index.statistics == mix_statistics(parts)
    # Against one pass over clips that are there as often as the weights say; all their turns in time and both signs,
    # so that every stretch of them has the same moments and nothing is left to chance.
    torch.manual_seed(0)

    def turns(clip: torch.Tensor, mean: float) -> list[torch.Tensor]:
        return [sign * clip.roll(by, 0) + mean for by in range(len(clip)) for sign in (1, -1)]

    few, many = turns(torch.randn(8, 1, 8, 8) * 2, 1.0), turns(torch.randn(8, 1, 1, 1).expand(8, 1, 8, 8), 0.0)
    mixed = mix_statistics([(1, measure_statistics(few)), (2, measure_statistics(many))])
    want = measure_statistics(few + many + many)
    for name in ("mean", "std", "ratios"):
        torch.testing.assert_close(torch.tensor(getattr(mixed, name)), torch.tensor(getattr(want, name)), msg=name)
    assert mix_statistics([(3, measure_statistics(few))]) == measure_statistics(few)
    # An image is not pooled in time: those sizes are the video's, and spaces must be measured for all of them.
    image, video = measure_statistics([torch.randn(1, 2, 16, 16)]), measure_statistics([torch.randn(8, 2, 8, 8)])
    both = mix_statistics([(1, image), (1, video)])
    assert (both.spaces, both.times) == (video.spaces, video.times)
    assert isinstance(both, Statistics) and both.clips == 2


# --- refused before training -------------------------------------------------------------------------------


def test_empty_and_small_buckets_are_refused(tmp_path, data):
    folder = make(tmp_path, 0)
    with pytest.raises(ValueError, match=r"out has no clips of 4x16x24 in train, a batch takes 2 of one shape"):
        read(DataConfig(str(folder)), 1)
    with pytest.raises(ValueError, match=r"has 5 clips of 8x24x16 in train, a batch takes 6 of one shape"):
        read(DataConfig(data.sets[0].path), 1, clips=6)
    with pytest.raises(ValueError, match=r"sample clock is 3, no whole number of batches of 2"):
        read(DataConfig(data.sets[0].path), 1, clock=3)


def test_sets_that_do_not_fit_each_other_are_refused(tmp_path, data, plain):
    index = read_index(plain)
    for change in (
        {"autoencoder": "haar"},
        {"classes": 3},
        {"store": "latent", "splits": {}},
        {"settings": {"labels": ["a"]}},
    ):
        folder = tmp_path / next(iter(change))
        folder.mkdir()
        for path in plain.glob("*.tar"):
            (folder / path.name).symlink_to(path)
        fields = json.loads((plain / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**fields, **change}))
        name = "labels" if "settings" in change else next(iter(change))
        with pytest.raises(ValueError, match=rf"{plain} and {folder} differ in {name}: "):
            open_shards(DataConfig((ShardSetConfig(str(plain)), ShardSetConfig(str(folder)))))
    assert index.classes == 0
    (tmp_path / "alike").symlink_to(plain)
    with pytest.raises(ValueError, match=r"alike has a weight of less than 1 in 1024"):
        read(DataConfig((ShardSetConfig(str(plain), 1.0), ShardSetConfig(str(tmp_path / "alike"), 1e-6))), 1)
    with pytest.raises(ValueError, match=r"weights ask for less than one batch of 2 clips of 8x24x16 in \d+: raise"):
        read(DataConfig((ShardSetConfig(str(plain), 1.0), ShardSetConfig(data.sets[0].path, 1e-6))), 1)
    for weight in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=f"the weight of x is {weight}"):
            ShardSetConfig("x", weight)


@pytest.mark.gloo
def test_only_rank_0_checks_the_shards_and_others_wait(plain, tmp_path):
    index = read_index(plain)
    assert run_ranks(slow_shard_check.slowly, 2, str(plain), 4.0) == [
        (None, sum(map(len, index.splits.values()))),
        (None, 0),
    ]
    shutil.copytree(plain, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / index.splits["train"][0].name, 512)
    (message, checked), (other, none) = run_ranks(slow_shard_check.slowly, 2, str(tmp_path / "cut"), 0.0)
    assert message == other and "has 512 bytes, its index says" in message
    assert checked and not none


def test_validation_checks_the_shards(plain, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    shutil.copytree(plain, tmp_path / "cut")
    (tmp_path / "cut" / read_index(plain).splits["train"][0].name).unlink()
    config = load(None, None, [f"data.shards={tmp_path / 'cut'}"])
    with pytest.raises(FileNotFoundError, match=r"shard .*tar is missing: copy it again"):
        validation.validate(config, tmp_path / "run", resume=False, processes=1)
