"""Sharing a video along time: what travels by layout, and what a step loses to it.

    python tests/bench/sharding.py            both tables
    python tests/bench/sharding.py --traffic  only what travels (closed forms, tested against counted bytes)

The second table times forward and backward passes of a small model in fp32: two ranks over gloo, each pinned to
one core and holding half of the frames, against one process pinned to one core that holds all of them.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from msc.parallel import collectives
from msc.parallel.context_parallel import shard_bounds
from msc.pretrain.layout_planner import ClipShape, choose_layouts, halo_values, ring_values, ulysses_values
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.past_context import PastContext, WholeVideo
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.parallelize import ParallelConfig, sharded_past_context

HEADS, HEAD_WIDTH, GRID = 16, 64, (64, 64)  # the width of `base`, 4,096 tokens per frame
RANKS, RUNS = 2, 7
APART = "apart: two videos of half the length"  # what the machine itself allows
SCALES = {
    "multi-scale": default_scales(4, patch_window=8),
    "windowed": (Scale(2, 1, 1, 2, 8), Scale(2, 2, 1, 8)),
    "dense": (Scale(4),),
}


def traffic() -> None:
    """MB that the busiest rank sends per layer, forward, bf16, one clip."""
    print("MB sent by the busiest rank, per layer, forward, one clip in bf16; default scales of 16 heads, width 1,024,")
    print("4,096 tokens per frame. Dense: one scale of all heads, as a plain transformer.\n")
    names = ["fine", "middle", "coarse", "sum", "Ulysses", "Ulysses, dense", "ring, dense"]
    print("| frames | ranks | " + " | ".join(names) + " | less than Ulysses | than dense |")
    print("| -----: | ----: |" + " ----: |" * (len(names) + 2))
    scales = default_scales(HEADS)
    for frames in (32, 128, 512):
        for ranks in (2, 4, 8, 16):
            clip, edges = ClipShape(frames, 1, GRID, HEAD_WIDTH), shard_bounds(frames, ranks)
            megabytes = clip.value_bytes / 1e6
            halos = [halo_values(scale, edges, clip.unit_values(scale)) for scale in scales]
            ulysses = sum(max(ulysses_values(edges, clip.unit_values(scale))) for scale in scales) * megabytes
            whole = clip.unit_values(Scale(HEADS))
            dense = max(ulysses_values(edges, whole)) * megabytes
            ring = max(map(sum, zip(*ring_values(edges, whole), strict=True))) * megabytes
            total = max(map(sum, zip(*halos, strict=True))) * megabytes
            row = [*(max(own) * megabytes for own in halos), total, ulysses, dense, ring]
            cells = " | ".join(f"{value:.1f}" for value in row)
            print(f"| {frames} | {ranks} | {cells} | {ulysses / total:.1f}× | {dense / total:.1f}× |")


def step_times(rank: int, ranks: int, port: int, name: str, layout: Any, frames: int, results: Any) -> None:
    """Seconds of every step, and of the waits in it."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    scales = SCALES[name]
    config = ModelConfig(width=128, depth=4, scales=scales, patch=2, channels=4)
    torch.manual_seed(0)
    model = MSCTransformer(config)
    edges = shard_bounds(frames, ranks)
    past_context: PastContext = WholeVideo()
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo")
        if layout != APART:
            clip = ClipShape(frames, 1, (16, 16), config.head_width, 4)
            layouts = choose_layouts(scales, clip, ranks, layout, ParallelConfig().rates)
            assert dist.group.WORLD is not None
            past_context = sharded_past_context(dist.group.WORLD, edges, config, layouts)
    x, t = torch.randn(1, edges[rank + 1] - edges[rank], 4, 32, 32), torch.rand(1, edges[rank + 1] - edges[rank])
    waited = [0.0]
    wait = collectives.wait_all_to_all

    def timed(x, route):
        start = time.perf_counter()
        received = wait(x, route)
        waited[0] += time.perf_counter() - start
        return received

    collectives.wait_all_to_all = timed
    times = []
    for _ in range(RUNS + 2):  # two to warm up
        if ranks > 1:
            dist.barrier()
        waited[0], start = 0.0, time.perf_counter()
        model(x, t, past_context=past_context).square().mean().backward()
        times.append((time.perf_counter() - start, waited[0]))
    results.put((rank, times[2:]))
    if ranks > 1:
        dist.destroy_process_group()


def measure(ranks: int, *arguments: Any) -> tuple[float, float]:
    """(median seconds of a step, which ends with the slower rank; share of it that the ranks wait, at the median)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(step_times, (ranks, port, *arguments, results), nprocs=ranks)
    runs = [times for _, times in sorted(results.get() for _ in range(ranks))]
    steps = [max(seconds for seconds, _ in step) for step in zip(*runs, strict=True)]
    waits = [sum(waited for _, waited in step) / ranks for step in zip(*runs, strict=True)]
    seconds = statistics.median(steps)
    return seconds, statistics.median(waits) / seconds


def times(frames: int, names: list[str]) -> None:
    print(f"\nForward and backward of {frames} frames of 256 tokens, width 128, depth 4, fp32, medians of {RUNS};")
    print(f"ranks pinned to one core each; torch {torch.__version__}. Speed-up of 2 ranks is 2 at best.\n")
    print("| scales | layout | 1 rank, s | 2 ranks, s | speed-up | waiting |")
    print("| ------ | ------ | --------: | ---------: | -------: | ------: |")
    for name in names:
        alone, _ = measure(1, name, "halo", frames)
        for layout in ("halo", "ulysses", "ring") if name == "dense" else (APART, "halo"):
            shared, waiting = measure(RANKS, name, layout, frames)
            cells = f"{alone:.3f} | {shared:.3f} | {alone / shared:.2f} | {waiting:.1%}"
            print(f"| {name} | {layout} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traffic", action="store_true", help="only what travels")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--scales", nargs="+", choices=list(SCALES), default=list(SCALES))
    args = parser.parse_args()
    traffic()
    if not args.traffic:
        times(args.frames, args.scales)


if __name__ == "__main__":
    main()
