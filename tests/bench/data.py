"""Conversion against FFmpeg alone, and the loader against bare reading: ratios of medians in one run.

    python tests/bench/data.py [--videos N] [--repeats N] [--workers N] [--only convert|loader]

Conversion: frames per second of `msc convert` with one process (decode, scale, encode to mp4, write, measure)
against decoding and scaling the same frames through PyAV, and against that and encoding them alike. Loader: clips
per second from latents and from mp4, against decoding every clip and handing nothing on, and against webdataset
reading (and decoding) the same shards, all in the same number of workers.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch
import webdataset
from av.video.reformatter import Interpolation, VideoReformatter
from safetensors.torch import load

from msc.datasets.loading.dataloader import loader
from msc.datasets.loading.mixture import single_set
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.shard_writer import CRF
from msc.datasets.shards.index import read_index, read_part, scan
from msc.datasets.synthetic import moving_textures
from msc.datasets.video import encode_mp4

FRAMES, SIZE, FPS, BATCH = 16, 128, 12, 8
EPOCHS = 8  # times that the loaders read all clips, so that starting workers counts little
SOURCE = (288, 288)


def encode(video: torch.Tensor) -> torch.Tensor:
    return video.float() / 127.5 - 1


def write_sources(folder: Path, videos: int) -> None:
    folder.mkdir()
    for i in range(videos):
        video = moving_textures(i, 1, 10 * FRAMES, *SOURCE)[0]
        (folder / f"{i:03d}.mp4").write_bytes(encode_mp4(video, FPS, crf=20))


def plain(folder: Path, write: bool) -> None:
    """Decode and scale every frame of every video; `write`: encode clips of them too."""
    for path in sorted(folder.iterdir()):
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            clip = []
            for frame in container.decode(video=0):
                picture = frame.reformat(SIZE, SIZE, "rgb24", interpolation=Interpolation.AREA).to_ndarray()
                clip.append(torch.from_numpy(picture).permute(2, 0, 1))
                if len(clip) == FRAMES:
                    if write:
                        encode_mp4(torch.stack(clip), FPS, CRF)
                    clip = []


def convert_all(folder: Path, out: Path, store: str) -> None:
    config = ConvertConfig((str(folder),), str(out), FRAMES, SIZE, SIZE, FPS, held_out=0.0, autoencoder="pixels",
                           store=store, clips_per_shard=32, overwrite=True)  # fmt: skip
    convert(config, encode, 1)


def read_ours(folder: Path, clips: int, workers: int) -> None:
    index = read_index(folder)
    options: dict[str, Any] = {"seed": 0, "clock": 0, "clips": BATCH, "stop": EPOCHS * clips, "workers": workers}
    for batch in loader(single_set(folder, index), "train", **options):
        assert len(batch.samples) == BATCH


def tensor_of(sample: dict[str, bytes]) -> torch.Tensor:
    if "latent.safetensors" in sample:
        return load(sample["latent.safetensors"])["latent"].float()
    with av.open(io.BytesIO(sample["mp4"])) as container:
        container.streams.video[0].thread_type = "NONE"
        scaler = VideoReformatter()  # one for all frames; one each, as PyAV's own to_ndarray has, is slower
        frames = container.decode(video=0)  # type: ignore[union-attr]
        pictures = [scaler.reformat(frame, format="rgb24").to_ndarray() for frame in frames]
    return torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2).contiguous()


def as_stored(sample: dict[str, bytes]) -> int:
    return sum(len(value) for value in sample.values() if isinstance(value, bytes))


def read_webdataset(folder: Path, clips: int, workers: int, decode: bool) -> None:
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))] * EPOCHS
    dataset = webdataset.WebDataset(urls, shardshuffle=False, workersplitter=webdataset.split_by_worker)
    dataset = dataset.map(tensor_of if decode else as_stored)
    batches = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers)
    seen = sum(len(batch) for batch in batches)
    assert seen == EPOCHS * clips, (seen, clips)


class Bare(torch.utils.data.Dataset):
    """Every clip read from its place in a shard and made a tensor, which is handed on or dropped."""

    def __init__(self, folder: Path, handed_on: bool) -> None:
        self.handed_on = handed_on
        self.places = [(path, sample) for path in sorted(folder.glob("train-*.tar")) for sample in scan(path)]
        self.places *= EPOCHS

    def __getitem__(self, number: int) -> torch.Tensor | int:
        path, sample = self.places[number]
        clip = tensor_of({name: read_part(path, sample, name) for name in sample.parts})
        return clip if self.handed_on else len(clip)

    def __len__(self) -> int:
        return len(self.places)


def read_bare(folder: Path, clips: int, workers: int, handed_on: bool) -> None:
    batches = torch.utils.data.DataLoader(Bare(folder, handed_on), batch_size=BATCH, shuffle=True, num_workers=workers)
    assert sum(len(batch) for batch in batches) == EPOCHS * clips


def processor_seconds() -> float:
    """Of this process and of all that it has waited for."""
    return sum(os.times()[:4])


def medians(repeats: int, **runs: Callable[[], None]) -> dict[str, tuple[float, float]]:
    """Median (seconds, processor seconds) of each, taken in turns after one round to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began, used = time.perf_counter(), processor_seconds()
            run()
            if turn:
                taken[name].append((time.perf_counter() - began, processor_seconds() - used))
    return {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in taken.items()}


def show(title: str, unit: str, count: int, found: dict[str, tuple[float, float]]) -> None:
    """A row for each, the first against all: what counts where other programs run is the processor's time."""
    print(f"{title:28s} {unit + '/s':>10s} {'ratio':>7s} {'processor ms':>13s} {'ratio':>7s}")
    wall, used = next(iter(found.values()))
    for name, (seconds, processor) in found.items():
        print(
            f"{name:28s} {count / seconds:10.0f} {seconds / wall:7.2f} {1e3 * processor / count:13.2f} "
            f"{processor / used:7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", type=int, default=8, help="of ten clips each; a multiple of 8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--workers", type=int, default=2, help="with as many as there are cores, they wait for who they serve"
    )
    parser.add_argument("--only", choices=("convert", "loader"))
    options = parser.parse_args()
    workers = options.workers
    clips, frames = options.videos * 10, options.videos * 10 * FRAMES
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, mp4, latent = folder / "sources", folder / "mp4", folder / "latent"
        write_sources(sources, options.videos)
        found = (
            {}
            if options.only == "loader"
            else medians(
                options.repeats,
                convert=lambda: convert_all(sources, mp4, "video"),
                decode_and_scale=lambda: plain(sources, False),
                decode_scale_encode=lambda: plain(sources, True),
            )
        )
        if found:
            show("convert", "frames", frames, found)
        for kind, shards in (("latent", latent), ("mp4", mp4)) if options.only != "convert" else ():
            convert_all(sources, shards, "latent" if kind == "latent" else "video")
            read = medians(
                options.repeats,
                loader=partial(read_ours, shards, clips, workers),
                bare_decoding=partial(read_bare, shards, clips, workers, False),
                bare_handed_on=partial(read_bare, shards, clips, workers, True),
                webdataset=partial(read_webdataset, shards, clips, workers, True),
                webdataset_undecoded=partial(read_webdataset, shards, clips, workers, False),
            )
            show(f"loader, {kind}", "clips", EPOCHS * clips, read)
            found |= {f"{kind} {name}": both for name, both in read.items()}
    about = {"videos": options.videos, "machine": platform.processor(), "python": sys.version.split()[0]}
    print(json.dumps({"seconds": found, **about, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
