"""Time and memory of a training step, multi-scale against dense causal, by clip length: ratios in one run.

    python tests/bench/step.py --preset base --frames 64 256 --backends sdpa flex

Frames are of 16 × 16 tokens. Steps are forward and backward passes of the whole model with recomputation as
in the preset, weights in bf16 on a GPU and fp32 on a CPU. FLOPs are unmasked and without recomputation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from msc.pretrain import cost
from msc.pretrain.layers import Block
from msc.pretrain.meter import mfu
from msc.pretrain.model import ModelConfig, MSCTransformer
from msc.pretrain.presets import PRESETS
from msc.pretrain.scales import Scale

SIDE = 32  # latents: 16 x 16 tokens with patch 2


def measure(config: ModelConfig, frames: int, backend: str, compiled: bool, recompute: bool, runs: int) -> dict:
    """Median seconds of a step, peak memory in bytes, FLOPs."""
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
    times = []
    for _ in range(runs + 2):  # two warm-ups
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model(x, t).float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "seconds": statistics.median(times[2:]),
        "memory": memory,
        "flops": cost.step_flops(config, frames, SIDE, SIDE),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="pilot", choices=list(PRESETS))
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--backends", nargs="+", default=["sdpa"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--depth", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    preset = PRESETS[args.preset]()
    model = replace(preset.model, channels=16, patch=2, depth=args.depth or preset.model.depth)
    dense = replace(model, scales=(Scale(model.heads),), gate="none")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = f"{cost.parameters(model) / 1e6:.0f} M parameters, depth {model.depth}"
    print(f"{args.preset}, {size}, {name}, torch {torch.__version__}")
    columns = f"{'s/step':>9} {'tokens/s':>10} {'GB':>7} {'TFLOP':>8} {'MFU':>6}"
    print(f"{'tokens':>8} {'model':<12} {'kernel':<6} {columns}  time ratio / FLOP ratio")
    for frames in args.frames:
        best: dict[str, dict] = {}
        for label, config in (("multi-scale", model), ("dense", dense)):
            for backend in args.backends:
                try:
                    found = measure(config, frames, backend, args.compile, preset.parallel.recompute, args.runs)
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
        if len(best) == 2:
            times, flops = (best["dense"][key] / best["multi-scale"][key] for key in ("seconds", "flops"))
            print(f"{'':>72} {times:.2f} / {flops:.2f} = {times / flops:.0%}", flush=True)


if __name__ == "__main__":
    main()
