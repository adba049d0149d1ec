"""Time and memory of a training step, multi-scale against dense causal, by clip length: ratios in one run.

    python tests/bench/step.py --preset base --frames 64 256 --backends sdpa flex
    python tests/bench/step.py --preset base --frames 256 --backends flex --longest 16384   # until memory is full
    python tests/bench/step.py --preset base --frames 256 --backends flex --part 1 2 --profile 20

Frames are of 16 × 16 tokens. Steps are forward and backward passes of the whole model with recomputation as
in the preset, weights in bf16 on a GPU and fp32 on a CPU. "Of the CPU" are the seconds in which it starts all of a
step; where they are much fewer, the GPU does not wait for it. FLOPs are unmasked and without recomputation. The longest
clip that fits is looked for by doubling the frames, one timed step each. With `--part R P` the frames are those of rank
R of P that share a clip along time by halos; nothing is sent, what would come is random: what a rank's own work takes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from msc.parallel import collectives, fp8
from msc.parallel.context_parallel import shard_bounds
from msc.pretrain import cost
from msc.pretrain.kernels.compile_helpers import limit_kept_activations
from msc.pretrain.kernels.dispatch import Kernel
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.layers import Block
from msc.pretrain.model.past_context import PastContext, WholeVideo
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.parallelize import sharded_past_context
from msc.pretrain.presets import PRESETS
from msc.pretrain.tracking.throughput import mfu

SIDE = 32  # latents: 16 x 16 tokens with patch 2


def past_context_of(config: ModelConfig, frames: int, part: tuple[int, int] | None) -> PastContext:
    """Of a whole clip, or of a rank's part, in a group that talks to nobody."""
    if part is None:
        return WholeVideo()
    rank, ranks = part
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        collectives.start_all_to_all = lambda x, plan: x.new_empty(sum(plan.receive_counts)).uniform_(0.1, 0.9)
        collectives.wait_all_to_all = lambda x, plan: x
    edges = shard_bounds(frames // config.frames_per_unit * ranks, ranks)
    assert dist.group.WORLD is not None
    return sharded_past_context(dist.group.WORLD, edges, config, ["halo"] * len(config.scales))


def training_step(
    config: ModelConfig, frames: int, kernel: Kernel, compiled: bool, recompute: cost.Recompute,
    in_fp8: bool = False, part: tuple[int, int] | None = None,
) -> Callable[[], None]:  # fmt: skip
    """A function that makes one forward and backward pass; on a GPU it returns when all of it is started."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    limit_kept_activations(cost.KEPT_SHARE if recompute == "cheap" else 1.0)
    model = MSCTransformer(config, kernel, recompute == "full" or (recompute == "cheap" and not compiled))
    torch.nn.init.normal_(model.final.weight, std=0.02)  # of zeros the backward pass would be zeros: faster on a GPU
    model = model.to(device, dtype)
    for block in model.blocks:
        assert isinstance(block, Block)
        if in_fp8:
            fp8.convert_linear_layers(block)
        if compiled:
            block.compile()
    x = torch.randn(1, frames, config.channels, SIDE, SIDE, device=device)
    t = torch.rand(1, frames, device=device)
    past_context = past_context_of(config, frames, part)

    def step() -> None:
        with fp8.autocast(in_fp8):
            y = model(x, t, past_context=past_context)
        y.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a step until the device is done, and until the CPU has started all of it."""
    start = time.perf_counter()
    step()
    started = time.perf_counter() - start
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, started


def measure(
    config: ModelConfig, frames: int, kernel: Kernel, compiled: bool, recompute: cost.Recompute, runs: int,
    top: int = 0, in_fp8: bool = False, part: tuple[int, int] | None = None, trace: str | None = None,
) -> dict:  # fmt: skip
    """Median seconds of a step and of the CPU, peak memory in bytes, FLOPs; with `top`, a list of so many kernels."""
    torch._dynamo.reset()
    step, on_gpu = training_step(config, frames, kernel, compiled, recompute, in_fp8, part), torch.cuda.is_available()
    for _ in range(2):
        timed(step)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    ranks = part[1] if part else 1
    seconds, started = map(statistics.median, zip(*(timed(step) for _ in range(runs)), strict=True))
    return {
        "seconds": seconds,
        "started": started,
        "memory": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "flops": cost.step_flops(config, frames * ranks, SIDE, SIDE) / ranks,
        "kernels": kernels(step, top, trace) if top else "",
    }


def kernels(step: Callable[[], object], top: int, trace: str | None = None) -> str:
    """The GPU's kernels of one step: the longest by name, and all of them. trace: a file for chrome://tracing, which
    also shows what the CPU did."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        wall, _ = timed(step)
    if trace:  # of another step: looking at the CPU slows it down
        with torch.profiler.profile(activities=[*activities, torch.profiler.ProfilerActivity.CPU]) as both:
            timed(step)
        both.export_chrome_trace(trace)
    found = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in found) / 1e6
    lines = [f"  {e.self_device_time_total / 1e3:9.2f} ms {e.count:6} x {e.key[:110]}" for e in found[:top]]
    count = sum(e.count for e in found)
    return "\n".join(
        [*lines, f"  {busy * 1e3:9.2f} ms {count:6} x in all, {wall * 1e3:.2f} ms of a step with the profiler"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pilot", choices=list(PRESETS))
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--backends", nargs="+", default=["sdpa"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", choices=["none", "cheap", "full"], help="default: as the preset")
    parser.add_argument("--fp8", action="store_true", help="linear layers by TransformerEngine; needs --recompute none")
    parser.add_argument("--part", type=int, nargs=2, metavar=("RANK", "RANKS"), help="as a rank along time")
    parser.add_argument("--depth", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["multi-scale", "dense"], choices=["multi-scale", "dense"])
    parser.add_argument("--profile", type=int, metavar="N", help="also list the GPU's N longest kernels")
    parser.add_argument("--trace", metavar="FOLDER", help="also profile a step of every row, for chrome://tracing")
    parser.add_argument(
        "--longest", type=int, metavar="MOST", help="double the frames until they do not fit, up to MOST"
    )
    parser.add_argument("--patience", type=float, default=30, help="--longest: seconds of a step after which it ends")
    args = parser.parse_args()
    if args.trace:
        args.profile = args.profile or 10
        Path(args.trace).mkdir(parents=True, exist_ok=True)
    preset = PRESETS[args.preset]()
    args.recompute = args.recompute or preset.parallel.recompute
    if args.fp8:
        fp8.check_fp8(2, args.recompute != "none", 256)
    model = replace(preset.model, channels=16, patch=2, depth=args.depth or preset.model.depth)
    dense = replace(model, scales=(Scale(model.heads),), gate="none")
    models = {"multi-scale": model, "dense": dense}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = f"{cost.parameters(model) / 1e6:.0f} M parameters, depth {model.depth}"
    how = [f"recompute {args.recompute}", *(["compiled"] if args.compile else [])]
    how += ["rank {} of {}".format(*args.part)] if args.part else []
    print(f"{args.preset}, {size}, {name}, torch {torch.__version__}, {', '.join(how)}{', fp8' if args.fp8 else ''}\n")
    print("| tokens | model | kernel | s per step | of the CPU | tokens/s | GB | TFLOP | MFU |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    if args.longest:
        for label in args.models:
            for backend in args.backends:
                longest(args, models[label], label, backend, name)
        return
    ratios = []
    for frames in args.frames:
        best: dict[str, dict] = {}
        for label in args.models:
            for backend in args.backends:
                found = row(args, models[label], frames, label, backend, name)
                if found and (label not in best or found["seconds"] < best[label]["seconds"]):
                    best[label] = found
        if len(best) == 2:
            times, flops = (best["dense"][key] / best["multi-scale"][key] for key in ("seconds", "flops"))
            ratios.append(f"{frames * 256:,} tokens: {times:.2f} / {flops:.2f} = {times / flops:.0%}")
    if ratios:
        print("\nDense / multi-scale, time ratio / FLOP ratio. " + "; ".join(ratios), flush=True)


def row(
    args: argparse.Namespace, config: ModelConfig, frames: int, label: str, backend: Kernel, name: str
) -> dict | None:
    """Measure one configuration and print it; None where it does not fit."""
    start = f"| {frames * 256:,} | {label} | {backend}"
    try:
        trace = f"{args.trace}/{label}-{backend}-{frames}-frames.json.gz" if args.trace else None
        how = args.compile, args.recompute, args.runs, args.profile, args.fp8, args.part, trace
        found = measure(config, frames, backend, *how)
    except torch.OutOfMemoryError:
        print(f"{start} | out of memory | | | | | |", flush=True)
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    seconds, flops = found["seconds"], found["flops"]
    share = mfu(flops / seconds, name)
    print(
        f"{start} | {seconds:.4f} | {found['started']:.4f} | {frames * 256 / seconds:,.0f} "
        f"| {found['memory'] / 1e9:.2f} "
        f"| {flops / 1e12:.2f} | {'' if share is None else f'{share:.1%}'} |",
        flush=True,
    )
    if args.profile:
        print(found["kernels"], flush=True)
    return found


def longest(args: argparse.Namespace, config: ModelConfig, label: str, backend: Kernel, name: str) -> None:
    """Double the frames until they do not fit, and say what did."""
    args.runs, frames, fitted, ended = 1, args.frames[0], 0, "--longest"
    while frames <= args.longest:
        found = row(args, config, frames, label, backend, name)
        if found is None:
            ended = "memory"
            break
        fitted, frames = frames, 2 * frames
        if found["seconds"] > args.patience:
            ended = "--patience"
            break
    print(f"| longest: {fitted * 256:,} | {label} | {backend} | ended by {ended} | | | | | |", flush=True)


if __name__ == "__main__":
    main()
