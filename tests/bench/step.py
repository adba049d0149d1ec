"""Time and memory of a training step, multi-scale against dense causal, by clip length: ratios in one run.

    python tests/bench/step.py --preset base --frames 64 256 --backends sdpa flex

Frames are of 16 × 16 tokens. Steps are forward and backward passes of the whole model with recomputation as
in the preset, weights in bf16 on a GPU and fp32 on a CPU. FLOPs are unmasked and without recomputation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from msc.pretrain import cost
from msc.pretrain.layers import Block
from msc.pretrain.meter import mfu
from msc.pretrain.model import ModelConfig, MSCTransformer
from msc.pretrain.presets import PRESETS
from msc.pretrain.scales import Scale

SIDE = 32  # latents: 16 x 16 tokens with patch 2


def training_step(
    config: ModelConfig, frames: int, backend: str, compiled: bool, recompute: bool
) -> Callable[[], None]:
    """A function that makes one forward and backward pass and returns when the device is done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = MSCTransformer(config).to(device, dtype)
    model.recompute = recompute
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.backend = backend  # type: ignore[assignment]
        if compiled:
            block.compile()
    x = torch.randn(1, frames, config.channels, SIDE, SIDE, device=device)
    t = torch.rand(1, frames, device=device)

    def step() -> None:
        model(x, t).float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(
    config: ModelConfig, frames: int, backend: str, compiled: bool, recompute: bool, runs: int, top: int = 0
) -> dict:
    """Median seconds of a step, peak memory in bytes, FLOPs; with `top`, a list of so many kernels."""
    torch._dynamo.reset()
    step, on_gpu = training_step(config, frames, backend, compiled, recompute), torch.cuda.is_available()
    for _ in range(2):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "memory": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "flops": cost.step_flops(config, frames, SIDE, SIDE),
        "kernels": kernels(step, top) if top else "",
    }


def kernels(step: Callable[[], None], top: int) -> str:
    """The GPU's kernels of one step: the longest by name, all of them, and how long the GPU did nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        step()
        wall = time.perf_counter() - start
    found = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in found) / 1e6
    lines = [f"  {e.self_device_time_total / 1e3:9.2f} ms {e.count:6} x {e.key[:110]}" for e in found[:top]]
    count = sum(e.count for e in found)
    return "\n".join(
        [*lines, f"  {busy * 1e3:9.2f} ms {count:6} x in all, {wall * 1e3:.2f} ms of a step with the profiler"]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="pilot", choices=list(PRESETS))
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--backends", nargs="+", default=["sdpa"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep all activations instead of recomputing them")
    parser.add_argument("--depth", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["multi-scale", "dense"], choices=["multi-scale", "dense"])
    parser.add_argument("--profile", type=int, metavar="N", help="also list the GPU's N longest kernels")
    args = parser.parse_args()
    preset = PRESETS[args.preset]()
    recompute = preset.parallel.recompute and not args.keep
    model = replace(preset.model, channels=16, patch=2, depth=args.depth or preset.model.depth)
    dense = replace(model, scales=(Scale(model.heads),), gate="none")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = f"{cost.parameters(model) / 1e6:.0f} M parameters, depth {model.depth}"
    print(f"{args.preset}, {size}, {name}, torch {torch.__version__}")
    columns = f"{'s/step':>9} {'tokens/s':>10} {'GB':>7} {'TFLOP':>8} {'MFU':>6}"
    print(f"{'tokens':>8} {'model':<12} {'kernel':<6} {columns}  time ratio / FLOP ratio")
    for frames in args.frames:
        best: dict[str, dict] = {}
        for label in args.models:
            config = {"multi-scale": model, "dense": dense}[label]
            for backend in args.backends:
                try:
                    found = measure(config, frames, backend, args.compile, recompute, args.runs, args.profile)
                except torch.OutOfMemoryError:
                    print(f"{frames * 256:>8} {label:<12} {backend:<6} out of memory", flush=True)
                    continue
                finally:
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                if label not in best or found["seconds"] < best[label]["seconds"]:
                    best[label] = found
                seconds, flops = found["seconds"], found["flops"]
                share = mfu(flops / seconds, name)
                print(
                    f"{frames * 256:>8} {label:<12} {backend:<6} {seconds:>9.4f} {frames * 256 / seconds:>10,.0f} "
                    f"{found['memory'] / 1e9:>7.2f} {flops / 1e12:>8.2f} {'' if share is None else f'{share:.1%}':>6}",
                    flush=True,
                )
                if args.profile:
                    print(found["kernels"], flush=True)
        if len(best) == 2:
            times, flops = (best["dense"][key] / best["multi-scale"][key] for key in ("seconds", "flops"))
            print(f"{'':>72} {times:.2f} / {flops:.2f} = {times / flops:.0%}", flush=True)


if __name__ == "__main__":
    main()
