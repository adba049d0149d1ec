"""A long roll-out: bytes of the caches and of the process, and seconds per frame, against the plan.

    OMP_NUM_THREADS=1 python tests/bench/rollout.py --frames 2000 --plot docs/rollout.png

Prints a table; `--reach N` looks back at most N units. Weights are random: nothing here depends on them.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
import torch

from msc.launch.planning import hardware
from msc.launch.planning.plan import plan_rollout
from msc.pretrain import cost
from msc.pretrain.diffusion.sampler import Cache, Sampling, generate, limit_context
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.scales import default_scales
from msc.pretrain.model.transformer import MSCTransformer

SHOWN = 10  # rows of the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--side", type=int, default=32, help="height and width in latents; a token is 2 x 2")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--reach", type=int)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    config = ModelConfig(width=args.width, depth=args.depth, scales=default_scales(4), patch=2, channels=3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MSCTransformer(config).eval().to(device)
    model = model if args.reach is None else limit_context(model, args.reach)
    grid, process, cache = (args.side // 2, args.side // 2), psutil.Process(), Cache()
    start = torch.zeros(1, 0, 3, args.side, args.side, device=device)
    before, last, rows = process.memory_info().rss, time.perf_counter(), []
    for frame, unit in enumerate(generate(model, start, args.frames, Sampling(args.steps), cache=cache), 1):
        float(unit.mean())  # waits for a GPU
        now = time.perf_counter()
        # what was just yielded has not joined the past yet
        planned = cost.cache_bytes(model.config, frame - 1, *grid)
        rows.append((frame, cache.bytes, planned, process.memory_info().rss - before, now - last))
        last = time.perf_counter()

    print(f"{cost.parameters(config):,} parameters, {grid[0] * grid[1]} tokens a frame, {args.steps} steps, {device}")
    print(f"{'frames':>12}{'caches MB':>12}{'planned MB':>12}{'process MB':>12}{'s per frame':>13}")
    edges = [round(i * len(rows) / SHOWN) for i in range(SHOWN + 1)]
    for a, b in pairwise(edges):
        _, held, planned, *_ = rows[b - 1]
        grown, seconds = max(row[3] for row in rows[a:b]) / 1e6, median([row[4] for row in rows[a:b]])
        print(f"{f'{a + 1} to {b}':>12}{held / 1e6:>12.3f}{planned / 1e6:>12.3f}{grown:>12.1f}{seconds:>13.4f}")
    print(f"caches other than planned: {sum(row[1] != row[2] for row in rows)} of {len(rows)} frames")
    slope = cost.cache_bytes(model.config, 2000, *grid) - cost.cache_bytes(model.config, 1000, *grid)
    flops = [cost.unit_flops(model.config, unit, *grid) for unit in (16, args.frames - 1)]
    whole = plan_rollout(model.config, grid, hardware.gpu_kind("h100"), args.frames, args.steps)
    print(f"planned: caches grow by {slope / 1000:,.0f} bytes a unit from unit 1,000 to 2,000; a pass costs "
          f"{flops[1] / flops[0]:.3f} times the FLOPs at the end; memory " + ", ".join(
              f"{name} {size / 1e6:.1f} MB" for name, size in whole.memory.items()))  # fmt: skip
    if args.plot:
        plot(rows, args.plot)


def plot(rows: list[tuple[int, int, int, int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    frames, held, planned, process, seconds = zip(*rows, strict=True)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    left.plot(frames, [size / 1e6 for size in process], color="silver", label="process, since before the first frame")
    left.plot(frames, [size / 1e6 for size in held], color="tab:blue", lw=3, label="caches")
    left.plot(frames, [size / 1e6 for size in planned], "k--", lw=1, label="caches, planned")
    left.set(xlabel="frame", ylabel="MB", ylim=0)
    left.legend(frameon=False)
    each = 50
    medians = [median(seconds[i : i + each]) for i in range(0, len(seconds) - each + 1, each)]
    right.plot(frames, seconds, ".", ms=1, color="silver", label="each frame")
    middles = [i * each + each / 2 for i in range(len(medians))]
    right.plot(middles, medians, color="tab:orange", lw=2, label=f"median of {each}")
    right.set(xlabel="frame", ylabel="seconds", ylim=(0, 3 * median(seconds)))
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
