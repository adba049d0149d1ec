"""Shuffling and batches: pure functions of the position, the same for any ranks, workers, restarts and frames."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from msc.datasets.loading import shard_reader
from msc.datasets.loading.dataloader import Batch, loader
from msc.datasets.loading.mixture import DataConfig, single_set
from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.loading.shuffling import epoch_permutation, positions_of_rank, sample_at
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.shards.index import Index, ShardInfo, read_index, scan, write_index, write_shard
from msc.datasets.statistics import Statistics
from msc.datasets.synthetic import moving_textures, write_videos
from msc.datasets.video import encode_mp4

KINDS = ("video", "latent")


def blocks(video: torch.Tensor) -> torch.Tensor:
    moved = (video.float() / 127.5 - 1).transpose(0, 1)[None]
    return torch.nn.functional.avg_pool3d(moved, 2)[0].transpose(0, 1)


@pytest.fixture(scope="module", params=KINDS)
def shards(request, tmp_path_factory) -> Path:
    """21 training and 6 held-out clips of 8 video frames (4 latent) in shards of at most 5."""
    folder = tmp_path_factory.mktemp(request.param)
    write_videos(folder / "videos", 0, 3, 72, 32, 32)
    config = ConvertConfig(
        (str(folder / "videos"),), str(folder / "out"), frames=8, height=16, width=24, fps=12,
        held_out=0.2, clips_per_shard=5, store=request.param,
    )  # fmt: skip
    report = convert(config, blocks, 2)
    assert report.clips == {"train": 21, "held_out": 3}
    return folder / "out"


def read(folder: Path, batches: int, split: str = "train", **options) -> list[Batch]:
    options = {"seed": 3, "clock": 0, "clips": 4, "workers": 0, **options}
    return list(itertools.islice(loader(single_set(folder, read_index(folder)), split, **options), batches))


def media(batch: Batch) -> torch.Tensor:
    assert (batch.video is None) != (batch.latents is None)
    found = batch.video if batch.video is not None else batch.latents
    assert found is not None
    return found


def same(a: Batch, b: Batch) -> bool:
    names = ("samples", "epochs", "keys")
    return all(getattr(a, x) == getattr(b, x) for x in names) and torch.equal(media(a), media(b))


def joined(parts: list[Batch]) -> Batch:
    """The rows of several ranks as one batch."""
    lists = {x: [y for part in parts for y in getattr(part, x)] for x in ("samples", "epochs", "keys")}
    return Batch(**lists, video=torch.cat([media(part) for part in parts]))


# --- order -------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_of_its_own():
    for samples in (1, 2, 3, 10, 63, 64, 65, 1000):
        seen = [epoch_permutation(samples, 7, epoch) for epoch in range(4)]
        assert all(sorted(one) == list(range(samples)) for one in seen)
        assert samples < 10 or len({tuple(one) for one in seen}) == 4
    assert epoch_permutation(1000, 7, 0) != epoch_permutation(1000, 8, 0)


def test_shuffling_does_not_change_between_versions():
    assert epoch_permutation(10, 0, 0) == epoch_permutation(10, 0, 0)
    assert epoch_permutation(10, 0, 0) == [4, 1, 5, 8, 0, 6, 3, 9, 7, 2]
    assert sample_at(123456789012, 10**9, 42) == (123, 290189562)


def test_permutations_are_uniform():
    # Each of 6 samples is first in about a sixth of the epochs, and after each other one about as often.
    first, after = torch.zeros(6), torch.zeros(6, 6)
    for epoch in range(1200):
        one = epoch_permutation(6, 1, epoch)
        first[one[0]] += 1
        for a, b in itertools.pairwise(one):
            after[a, b] += 1
    assert (first - 200).abs().max() < 5 * 200**0.5
    assert (after[~torch.eye(6, dtype=torch.bool)] - 200).abs().max() < 5 * 200**0.5
    # In a large set neighbours in the order are far apart, as at random: a third of the range.
    large = torch.tensor(epoch_permutation(5000, 1, 0)).double()
    assert (large.diff().abs().mean() / 5000 - 1 / 3).abs() < 0.02


def test_any_position_is_computed_directly():
    whole = [(epoch, sample) for epoch in range(3) for sample in epoch_permutation(17, 5, epoch)]
    assert [sample_at(k, 17, 5) for k in range(51)] == whole
    assert [sample_at(k, 4, 5, shuffle=False) for k in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]
    start = time.perf_counter()
    for k in range(1000):
        sample_at(10**15 + k, 10**9 + 7, 5)
    assert time.perf_counter() - start < 2
    with pytest.raises(ValueError, match="0 samples"):
        sample_at(0, 0, 5)
    with pytest.raises(ValueError, match="position is -1"):
        sample_at(-1, 4, 5)


def test_ranks_partition_a_batch():
    for clips, ranks in ((8, 1), (8, 2), (8, 4), (8, 8)):
        parts = [positions_of_rank(100, clips, rank, ranks) for rank in range(ranks)]
        assert [k for part in parts for k in part] == list(range(100, 108))
    with pytest.raises(ValueError, match="6 clips per batch cannot be divided evenly over 4"):
        positions_of_rank(0, 6, 0, 4)
    with pytest.raises(ValueError, match="rank is 2, there are 2"):
        positions_of_rank(0, 6, 2, 2)


# --- batches -----------------------------------------------------------------------------------------------


def test_batches_follow_the_permutation(shards):
    found = read(shards, 12)
    assert [s for batch in found for s in batch.samples] == [sample_at(k, 21, 3)[1] for k in range(48)]
    assert [e for batch in found for e in batch.epochs] == [k // 21 for k in range(48)]
    index = read_index(shards)
    keys = [sample.key for shard in index.splits["train"] for sample in scan(shards / shard.name)]
    assert all(batch.keys == [keys[s] for s in batch.samples] for batch in found)
    if index.store == "video":
        assert found[0].latents is None
        assert media(found[0]).dtype == torch.uint8
        assert media(found[0]).shape == (4, 8, 3, 16, 24)
    else:
        assert found[0].video is None
        assert media(found[0]).dtype == torch.float16
        assert media(found[0]).shape == (4, 4, 3, 8, 12)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_workers_change_nothing(shards, ranks, workers):
    whole = read(shards, 7)
    parts = [read(shards, 7, rank=rank, ranks=ranks, workers=workers) for rank in range(ranks)]
    for n, batch in enumerate(whole):
        assert same(joined([part[n] for part in parts]), batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_continues_with_the_same_batches(shards, workers):
    whole = read(shards, 12)
    for batches in (1, 5, 6, 11):  # within and across epochs
        assert all(
            same(a, b)
            for a, b in zip(
                read(shards, 12 - batches, clock=4 * batches, workers=workers), whole[batches:], strict=True
            )
        )
    # and at another batch size and number of ranks
    parts = [read(shards, 2, clock=20, clips=12, rank=rank, ranks=2, workers=workers) for rank in range(2)]
    for n in range(2):
        want = whole[5 + 3 * n : 8 + 3 * n]
        assert same(joined([part[n] for part in parts]), joined(want))


@pytest.mark.parametrize("workers", [0, 1])
def test_slices_of_frames_are_slices_of_clips(shards, workers):
    factor = 2 if read_index(shards).store == "video" else 1
    for whole, *parts in zip(
        read(shards, 3),
        read(shards, 3, frames=[(0, 1)], workers=workers),
        read(shards, 3, frames=[(1, 4)], workers=workers),
        read(shards, 3, frames=[(0, 4)], workers=workers),
        strict=True,
    ):
        assert torch.equal(media(parts[0]), media(whole)[:, :factor])
        assert torch.equal(media(parts[1]), media(whole)[:, factor:])
        assert same(parts[2], whole)
        assert parts[0].samples == whole.samples


def test_each_sp_rank_decodes_only_its_frames(shards, monkeypatch):

    asked = []
    decode = shard_reader.decode_frames
    monkeypatch.setattr(
        shard_reader, "decode_frames", lambda *a, **b: asked.append((b["start"], b["stop"])) or decode(*a, **b)
    )
    read(shards, 1, frames=[(1, 3)])
    assert asked == ([(2, 6)] * 4 if read_index(shards).store == "video" else [])


def draw(sample: int, epoch: int, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([sample / 100]), torch.tensor([100.0 * epoch + sample, bucket])


@pytest.mark.parametrize("workers", [0, 2])
def test_noise_is_drawn_for_every_clip(shards, workers):
    for batch in read(shards, 8, workers=workers, draw=draw):
        t, noise = zip(*(draw(*clip, 0) for clip in zip(batch.samples, batch.epochs, strict=True)), strict=True)
        assert torch.equal(batch.t, torch.stack(t)) and torch.equal(batch.noise, torch.stack(noise))
    assert read(shards, 1)[0].noise is None


def test_all_tensors_of_a_batch_are_pinned(shards, monkeypatch):
    (batch,) = read(shards, 1, draw=draw)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # a GPU's part, which is not here
    pinned = batch.pin_memory()
    assert torch.equal(media(pinned), media(batch) + 1)
    assert torch.equal(pinned.noise, batch.noise + 1)
    assert (pinned.samples, pinned.epochs, pinned.keys) == (batch.samples, batch.epochs, batch.keys)


def test_held_out_clips_come_once_and_in_order(shards):
    found = read(shards, 99, "held_out", clips=2, shuffle=False, stop=3)
    assert [batch.samples for batch in found] == [[0, 1], [2]]
    found = read(shards, 99, "held_out", clips=1, shuffle=False, clock=1, stop=3)
    assert [batch.samples for batch in found] == [[1], [2]]
    parts = [read(shards, 99, "held_out", clips=2, shuffle=False, stop=4, rank=r, ranks=2) for r in range(2)]
    assert [[batch.samples for batch in part] for part in parts] == [[[0], [2]], [[1], [0]]]
    with pytest.raises(ValueError, match="3 clips are not whole batches of 2, which 2 ranks need"):
        read(shards, 1, "held_out", clips=2, stop=3, ranks=2)


def test_invalid_loader_arguments_are_refused(shards):
    for options, message in (
        ({"clips": 3, "ranks": 2}, "3 clips per batch .* 2 data-parallel ranks"),
        ({"frames": [(2, 2)]}, "frames 2 to 2 asked for, clips have 4"),
        ({"frames": [(0, 5)]}, "frames 0 to 5 asked for, clips have 4"),
        ({"split": "test"}, "no split 'test'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(shards, 1, **options)
    index = read_index(shards)
    empty = dataclasses.replace(index, splits={**index.splits, "held_out": []})
    with pytest.raises(ValueError, match="has no clips in split 'held_out'"):
        loader(single_set(shards, empty), "held_out", seed=0, clock=0, clips=1)
    if index.store == "video":
        uneven = dataclasses.replace(index, temporal_factor=4, frames=3)  # the 1 + 4 k of causal autoencoders
        with pytest.raises(ValueError, match="8 video frames are not 3 x 4"):
            loader(single_set(shards, uneven), "train", seed=0, clock=0, clips=1, frames=[(0, 1)])
        whole = loader(single_set(shards, uneven), "train", seed=0, clock=0, clips=1, frames=[(0, 3)], workers=0)
        assert media(next(whole)).shape[1] == 8


def test_loading_leaves_the_global_random_state_alone(shards):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    read(shards, 2)
    read(shards, 2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_signals_to_the_job_do_not_end_workers(shards):
    seen = []
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    others = children.read_text().split()  # of other tests
    old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))  # as the training loop does
    try:
        whole = read(shards, 12)
        batches = loader(single_set(shards, read_index(shards)), "train", seed=3, clock=0, clips=4, workers=2)
        assert same(next(batches), whole[0])
        workers = {*children.read_text().split()} - {*others}
        assert len(workers) >= 2
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(int(worker), number)
        for n in range(1, 12):
            assert same(next(batches), whole[n])
        start = time.monotonic()
        batches.close()
        assert time.monotonic() - start < 5
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert not seen


PROGRAM = """
import sys
from msc.datasets.loading.dataloader import loader
from msc.datasets.loading.mixture import single_set
from msc.datasets.shards.index import read_index

held = []
def work():
    batches = loader(single_set(sys.argv[1], read_index(sys.argv[1])), "train", seed=0, clock=0, clips=2, workers=2)
    held.append(batches)
    for batch in batches:
        1 / (sys.argv[2] != "raise")
        return

work()
"""


@pytest.mark.parametrize(("how", "code"), [("raise", 1), ("end", 0)])
def test_a_program_that_ends_early_does_not_wait_for_its_workers(shards, tmp_path, how, code):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(shards), how]
    done = subprocess.run(command, timeout=30, capture_output=True, text=True, check=False)
    assert (done.returncode, "ZeroDivisionError" in done.stderr) == (code, how == "raise")
    assert done.stderr.count("Error") == done.stderr.count("Traceback") == code


def test_a_worker_has_its_socket_before_it_reads(shards, monkeypatch):
    # made later, by a worker that ends at once, it would be left behind in a folder that cannot be removed
    with tempfile.TemporaryDirectory() as folder:  # pytest's own names are too long for sockets
        monkeypatch.setattr(tempfile, "tempdir", folder)

        def sockets(*_) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(1), torch.tensor(len(list(Path(folder).glob("pymp-*/*"))))

        index = read_index(shards)
        batches = loader(single_set(shards, index), "train", seed=0, clock=0, clips=2, workers=1, draw=sockets)
        with closing(batches):
            assert next(batches).noise.tolist() == [1, 1]
        assert not os.listdir(folder)


# --- broken samples ----------------------------------------------------------------------------------------


def small_index(folder: Path, samples: list[tuple[str, dict[str, bytes]]], **changes) -> Index:
    shard = write_shard(folder / "train-000000.tar", samples)
    fields = {
        "store": "video", "autoencoder": "haar", "temporal_factor": 2, "channels": 3, "frames": 4,
        "height": 8, "width": 8, "video_frames": 8, "video_height": 16, "video_width": 16, "fps": 12.0,
        "statistics": Statistics.default(3), "settings": {},
    }  # fmt: skip
    index = Index(**{**fields, "splits": {"train": [shard], "held_out": []}, **changes})
    write_index(folder, index)
    return index


def video_samples(count: int, **about) -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for i, video in enumerate(moving_textures(0, count, 8, 16, 16)):
        content = encode_mp4(video, 12)
        fields = {"crc32": zlib.crc32(content), **{name: value(i) for name, value in about.items()}}
        found.append((f"clip-{i}", {"json": json.dumps(fields).encode(), "mp4": content}))
    return found


def damaged(sample: tuple[str, dict[str, bytes]], how: str) -> tuple[str, dict[str, bytes]]:
    key, parts = sample
    video, about = bytearray(parts["mp4"]), parts["json"]
    if how == "bit":
        video[len(video) * 9 // 10] ^= 1  # in the last frames only
    elif how == "short":
        video = video[:50]
        about = json.dumps({"crc32": zlib.crc32(video)}).encode()
    elif how == "json":
        about = b"{"
    elif how == "no checksum":
        about = b"{}"
    elif how == "other size":
        video = bytearray(encode_mp4(moving_textures(0, 1, 8, 24, 16)[0], 12))
        about = json.dumps({"crc32": zlib.crc32(video)}).encode()
    parts = {"json": about, "mp4": bytes(video)} if how != "no video" else {"json": about}
    return key, parts


@pytest.mark.parametrize("how", ["bit", "short", "json", "no checksum", "other size", "no video"])
def test_an_unreadable_clip_is_logged_and_replaced_alike_everywhere(tmp_path, caplog, how):
    samples = video_samples(40)
    index = small_index(tmp_path, [damaged(s, how) if i in (3, 4) else s for i, s in enumerate(samples)])
    options = {"seed": 1, "clock": 0, "clips": 8, "stop": 80}
    whole = list(loader(single_set(tmp_path, index), "train", workers=0, **options))
    for key in ("clip-3", "clip-4"):
        assert caplog.text.count(f"unreadable clip skipped: sample {key} of ") == 1
    wanted = [sample_at(k, 40, 1)[1] for k in range(80)]
    assert [s for b in whole for s in b.samples] == [5 if s in (3, 4) else s for s in wanted]
    assert [e for b in whole for e in b.epochs] == [0] * 40 + [1] * 40
    assert all(key == f"clip-{s}" for b in whole for s, key in zip(b.samples, b.keys, strict=True))
    for frames in ((0, 1), (3, 4)):  # ranks that share a clip agree, though only one would meet the damage
        part = list(loader(single_set(tmp_path, index), "train", workers=2, frames=[frames], **options))
        assert [b.samples for b in part] == [b.samples for b in whole]
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(media(a), media(b)[:, 2 * frames[0] : 2 * frames[1]])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [3, 40])
def test_too_many_unreadable_clips_stop_the_run(tmp_path, workers, bad):
    samples = [damaged(s, "bit") if i < bad else s for i, s in enumerate(video_samples(40))]
    index = small_index(tmp_path, samples)
    batches = loader(single_set(tmp_path, index), "train", seed=1, clock=0, clips=8, workers=workers)
    with pytest.raises(ValueError, match=r"more than 2 of the 40 samples in .* are unreadable.*sample clip-\d+"):
        list(itertools.islice(batches, 10))


def test_unreadable_latents_are_recognised_by_their_header(tmp_path):
    def latents(shape: tuple[int, ...], name: str = "latent") -> dict[str, bytes]:
        return {"json": b"{}", "latent.safetensors": save({name: torch.randn(shape)})}

    good = latents((4, 3, 8, 8))
    huge = {"json": b"{}", "latent.safetensors": (1 << 60).to_bytes(8, "little") + b"{}"}
    cut = {"json": b"{}", "latent.safetensors": good["latent.safetensors"][:-4]}
    bad = [latents((4, 3, 8, 9)), latents((4, 3, 8, 8), "other"), huge, cut, {"json": b"{}"}]
    samples = [(f"clip-{i}", parts) for i, parts in enumerate([*bad, good])]
    index = small_index(tmp_path, samples, store="latent")
    for i in range(len(bad)):
        with pytest.raises(ValueError, match=f"sample clip-{i} of "):
            ShardReader(tmp_path, index, "train", (0, 1)).read(i)
    key, found, *_ = ShardReader(tmp_path, index, "train", (1, 3)).read(5)
    assert (key, found.shape) == ("clip-5", (2, 3, 8, 8))


def test_a_flipped_bit_is_found_in_latents_and_text(tmp_path):
    """By every rank alike, whichever frames it reads; shards without checksums are read as they are."""
    latents, text = save({"latent": torch.zeros(4, 3, 8, 8)}), save({"text": torch.zeros(5, 7)})
    sums = {"crc32": zlib.crc32(latents), "text_crc32": zlib.crc32(text)}
    flipped = [latents[:-1] + b"\1", latents, latents, latents[:-1] + b"\1"], [text, text[:-1] + b"\1", text, text]
    samples = []
    for i, (one, other) in enumerate(zip(*flipped, strict=True)):
        about = json.dumps(sums if i < 3 else {}).encode()
        samples.append((f"clip-{i}", {"json": about, "latent.safetensors": one, "text.safetensors": other}))
    index = small_index(tmp_path, samples, store="latent", has_text=7)
    for frames in ((0, 4), (0, 1), (3, 4)):
        found = ShardReader(tmp_path, index, "train", frames)
        for i, what in enumerate(("latents", "text")):
            with pytest.raises(ValueError, match=f"sample clip-{i} of .*checksum of the {what} differs"):
                found.read(i)
        assert found.read(2)[1].shape == found.read(3)[1].shape == (frames[1] - frames[0], 3, 8, 8)


def test_text_and_labels_are_loaded(tmp_path):
    samples = video_samples(6, label=lambda i: i % 3)
    text = torch.randn(6, 5, 7)
    for i, (_, parts) in enumerate(samples):
        parts["text.safetensors"] = save({"text": text[i]})
    index = small_index(tmp_path, samples, has_text=7, classes=3)
    for batch in itertools.islice(loader(single_set(tmp_path, index), "train", seed=0, clock=0, clips=3, workers=1), 4):
        assert batch.text is not None
        assert batch.labels is not None
        assert torch.equal(batch.text, text[batch.samples])
        assert batch.labels.tolist() == [s % 3 for s in batch.samples]
    plain = next(loader(single_set(tmp_path, dataclasses.replace(index, has_text=None, classes=0)), "train",
                        seed=0, clock=0, clips=3, workers=0))  # fmt: skip
    assert plain.text is None
    assert plain.labels is None


def test_texts_of_different_lengths_are_padded_with_zeros(tmp_path):
    samples = video_samples(3)
    text = [torch.randn(length, 7) for length in (2, 5, 3)]
    for i, (_, parts) in enumerate(samples):
        parts["text.safetensors"] = save({"text": text[i]})
    index = small_index(tmp_path, samples, has_text=7)
    batch = next(loader(single_set(tmp_path, index), "train", seed=0, clock=0, clips=3, workers=0))
    assert batch.text is not None
    assert batch.text.shape == (3, 5, 7)
    for row, sample in zip(batch.text, batch.samples, strict=True):
        assert torch.equal(row[: len(text[sample])], text[sample])
        assert not row[len(text[sample]) :].any()


def test_a_malicious_shard_is_not_read(tmp_path):
    index = small_index(tmp_path, video_samples(2))
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for name in ("clip-0.json", "clip-0.pkl"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"more than 1 of the 2 samples in .* 'clip-0\.pkl' is refused"):
        next(loader(single_set(tmp_path, index), "train", seed=0, clock=0, clips=1, workers=0))


def test_a_wrong_sample_count_in_the_index_is_detected(tmp_path):
    index = small_index(tmp_path, video_samples(2))
    shard: ShardInfo = dataclasses.replace(index.splits["train"][0], samples=3)
    with pytest.raises(ValueError, match="has 2 samples, its index says 3"):
        ShardReader(tmp_path, dataclasses.replace(index, splits={"train": [shard]}), "train").read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": -1}, "data.workers is -1"),
        ({"prefetch": 0}, "data.prefetch is 0"),
        ({"text_dropout": 2}, "data.text_dropout is 2"),
    ],
)
def test_data_settings_are_validated(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change)


def latent_samples(count: int, content: bytes = b"") -> list[tuple[str, dict[str, bytes]]]:
    content = content or save({"latent": torch.zeros(4, 3, 8, 8)})
    return [(f"clip-{i}", {"json": b"{}", "latent.safetensors": content}) for i in range(count)]


def test_many_unreadable_clips_in_a_row_end_the_run(tmp_path, monkeypatch):
    """One read does not go through all that may be broken before it says so."""
    index = small_index(tmp_path, latent_samples(1000, b"nothing"), store="latent")
    tried, whole = [], ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, number: tried.append(number) or whole(self, number))
    batches = loader(single_set(tmp_path, index), "train", seed=1, clock=0, clips=1, workers=0, max_bad=0.9)
    with pytest.raises(ValueError, match=r"^64 clips in a row of .* cannot be read: sample clip-\d+ .*; sample .*disk"):
        next(batches)
    assert len(tried) == 64


def test_a_truncated_shard_is_skipped_and_scanned_once(tmp_path, monkeypatch, caplog):

    index = small_index(tmp_path, latent_samples(100), store="latent")
    good = write_shard(tmp_path / "train-000001.tar", latent_samples(20))
    index = dataclasses.replace(index, splits={"train": [index.splits["train"][0], good]})
    os.truncate(tmp_path / "train-000000.tar", 5000)
    scanned = []
    monkeypatch.setattr(shard_reader, "scan", lambda path: scanned.append(path.name) or scan(path))
    batches = loader(single_set(tmp_path, index), "train", seed=1, clock=0, clips=4, workers=0, stop=120, max_bad=0.9)
    unreadable = []
    for batch in batches:
        assert all(number >= 100 for number in batch.samples)
        unreadable += batch.unreadable
    assert sorted(scanned) == ["train-000000.tar", "train-000001.tar"]
    assert {number for number, _ in unreadable} == set(range(100))
    assert caplog.text.count("unreadable clip skipped: ") == 1  # of a shard, not of each of its clips
