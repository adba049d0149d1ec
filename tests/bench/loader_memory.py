"""Memory of the loader over many clips: resident set of the process and its workers, as a picture and a slope.

    python tests/bench/loader_memory.py [--clips 10000] [--out docs/loader_memory.png]

A mixture of two sets of mp4 clips of three shapes, read with two workers.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import psutil
import torch
from matplotlib.figure import Figure

from msc.datasets.loading.dataloader import loader
from msc.datasets.loading.mixture import DataConfig, ShardSetConfig, open_shards
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.synthetic import write_videos

BATCH, WORKERS, EVERY = 8, 2, 200
BUCKETS = ((8, 48, 64), (4, 48, 64), (8, 64, 48))


def make(folder: Path, seed: int) -> ShardSetConfig:
    for number, (height, width) in enumerate(((48, 64), (64, 48))):
        write_videos(folder / "videos" / str(number), seed + number, 4, 100, height, width)
    config = ConvertConfig((str(folder / "videos"),), str(folder / "out"), buckets=BUCKETS, held_out=0.0,
                           autoencoder="pixels", clips_per_shard=8)  # fmt: skip
    convert(config, lambda video: video.float(), 1)
    return ShardSetConfig(str(folder / "out"), 1.0 + seed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("docs/loader_memory.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shards = open_shards(DataConfig((make(Path(name, "a"), 0), make(Path(name, "b"), 1))))
        batches = loader(shards, "train", seed=0, clock=0, clips=BATCH, workers=WORKERS)
        clips, own, workers, began = [], [], [], time.monotonic()
        for number, batch in enumerate(batches, 1):
            assert len(batch.samples) == BATCH
            if number * BATCH % EVERY == 0:
                process = psutil.Process()
                clips.append(number * BATCH)
                own.append(process.memory_info().rss / 2**20)
                # what a worker shares with the process that it was forked from is not counted again
                workers.append(sum(child.memory_full_info().uss for child in process.children()) / 2**20)
            if number * BATCH >= options.clips:
                break
        batches.close()
    seconds = time.monotonic() - began
    later = slice(len(clips) // 5, None)  # the first fifth is for caches of allocators to fill
    total = torch.tensor(own, dtype=torch.float64) + torch.tensor(workers, dtype=torch.float64)
    x = torch.tensor(clips, dtype=torch.float64)[later]
    x = x - x.mean()
    slope = float((x * total[later]).sum() / x.square().sum()) * 1000
    figure = Figure((6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(clips, own, label="training process")
    axes.plot(clips, workers, label=f"{WORKERS} workers, without what they share")
    axes.set(xlabel="clips read", ylabel="MiB", ylim=(0, None), title=f"loader: {slope:+.2f} MiB per 1,000 clips")
    axes.legend()
    figure.savefig(options.out, dpi=100)
    first, last = round(float(total[later][0])), round(float(total[-1]))
    found = {"clips": clips[-1], "MiB per 1,000 clips": round(slope, 3), "MiB": [first, last]}
    print(json.dumps({**found, "clips/s": round(clips[-1] / seconds)}))


if __name__ == "__main__":
    main()
