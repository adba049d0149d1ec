"""Time and memory of a training step, multi-scale against dense causal, by clip length: ratios in one run.

    python tests/bench/step.py --preset base --frames 64 256 --backends sdpa flex
    python tests/bench/step.py --preset base --frames 256 --backends flex --longest 16384   # until memory is full
    python tests/bench/step.py --preset base --frames 256 --backends flex --part 1 2 --profile 20

Frames are of 16 × 16 tokens. Steps are forward and backward passes of the whole model with recomputation as
in the preset, weights in bf16 on a GPU and fp32 on a CPU. "Of the CPU" are the seconds in which it starts all of a
step; where they are much fewer, the GPU does not wait for it. FLOPs are unmasked and without recomputation. The longest
clip that fits is looked for by doubling the frames, one timed step each. With `--part R P` the frames are those of rank
R of P that share a clip along time by halos; nothing is sent, what would come is random: what a rank's own work takes.

    python tests/bench/step.py --variants base/32/131072/cheap pilot/12/16384/none/graph --limit 400 --results FILE

Compiled multi-scale steps, each variant in a process of its own: preset/layers/tokens/recompute/options. Some compile
side by side, by steps of two layers, and are measured one after the other. A row is printed and added to FILE as soon
as it ends; what FILE has is not measured again. Recomputation "cheap" is here always by operators. Options, joined by
commas: eager; graph (a CUDA graph of the whole step); overhead (torch's CUDA graphs, block by block); autotune,
coordinate (torch tunes its kernels); heads=N; budget=B (torch's activation memory budget, 0 to 1); fp8 (products by
torch._scaled_mm, a scale per tensor); tiles=M1-N1-M2-N2-WARPS-STAGES (FlexAttention, backward).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from msc.parallel import collectives, fp8
from msc.parallel.context_parallel import shard_bounds
from msc.pretrain import cost
from msc.pretrain.kernels import flex
from msc.pretrain.kernels.compile_helpers import limit_kept_activations
from msc.pretrain.kernels.dispatch import Kernel
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.layers import Block
from msc.pretrain.model.past_context import PastContext, WholeVideo
from msc.pretrain.model.recomputation import Recompute
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.parallelize import ParallelConfig, sharded_past_context
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
    config: ModelConfig, frames: int, kernel: Kernel, compiled: bool, recompute: Recompute, in_fp8: bool = False,
    part: tuple[int, int] | None = None, prepare: Callable[[Block], object] = lambda block: None,
    side: int = SIDE, kept_share: float = 1.0, **options: Any,
) -> Callable[[], None]:  # fmt: skip
    """A function that makes one forward and backward pass; on a GPU it returns when all of it is started. prepare:
    called with every block before it is compiled, with `options` of torch.compile. kept_share: of what compiled blocks
    would keep."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    limit_kept_activations(kept_share)
    model = MSCTransformer(config, kernel, recompute)
    torch.nn.init.normal_(model.final.weight, std=0.02)  # of zeros the backward pass would be zeros: faster on a GPU
    model = model.to(device, dtype)
    for block in model.blocks:
        assert isinstance(block, Block)
        if in_fp8:
            fp8.convert_linear_layers(block)
        prepare(block)
        if compiled:
            block.compile(**options)
    x = torch.randn(1, frames, config.channels, side, side, device=device)
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
    config: ModelConfig, frames: int, kernel: Kernel, compiled: bool, recompute: Recompute, runs: int, top: int = 0,
    in_fp8: bool = False, part: tuple[int, int] | None = None, trace: str | None = None,
) -> dict:  # fmt: skip
    """Median seconds of a step and of the CPU, peak memory in bytes, FLOPs; with `top`, a list of so many kernels."""
    torch._dynamo.reset()
    how, on_gpu = ParallelConfig(recompute=recompute, compile=compiled), torch.cuda.is_available()
    step = training_step(config, frames, kernel, compiled, how.block_recompute, in_fp8, part, kept_share=how.kept_share)
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
    parser.add_argument("--variants", nargs="+", type=parse_variant, help="compare these; see above")
    parser.add_argument("--limit", type=float, default=400, help="--variants: seconds in all")
    parser.add_argument("--results", type=Path, help="--variants: file of JSON lines")
    parser.add_argument("--side", type=int, default=SIDE, help="latents of a frame's side, for a quick look")
    parser.add_argument("--at-once", type=int, default=6, help="--variants: that compile side by side")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in a process of a variant
    args = parser.parse_args()
    if args.measure:
        measure_variant(args.variants[0], args.runs, args.side)
        return
    if args.variants:
        compare(args.variants, args.runs, args.limit, args.results, args.side, args.at_once)
        return
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


# Variants ------------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    name: str
    preset: str
    layers: int
    tokens: int
    recompute: Recompute
    options: dict[str, str]

    @property
    def tuned(self) -> bool:
        """Whether compiling it times kernels, for which it must be alone."""
        return bool({"autotune", "coordinate"} & set(self.options))


def parse_variant(name: str) -> Variant:
    preset, layers, tokens, recompute, *options = name.split("/")
    assert recompute in ("none", "cheap", "full") and preset in PRESETS, name
    parsed = dict(option.partition("=")[::2] for option in ",".join(options).split(",") if option)
    return Variant(name, preset, int(layers), int(tokens), cast(Recompute, recompute), parsed)


def measure_variant(variant: Variant, runs: int, side: int) -> None:
    """In a process of its own: compile by a step of two layers, say so, wait for a line, and measure. Prints JSON:
    seconds until all was compiled; then seconds of a step and of the CPU, peak and planned memory in bytes, kernels."""
    begin, options, on_gpu = time.perf_counter(), variant.options, torch.cuda.is_available()
    model = replace(PRESETS[variant.preset]().model, channels=16, patch=2, depth=variant.layers)
    if "heads" in options:
        model = replace(model, scales=default_scales(int(options["heads"])))
    if "tiles" in options:
        names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages")
        tiles = {f"bwd_{name}": int(n) for name, n in zip(names, options["tiles"].split("-"), strict=True)}
        flex.TILES[9, model.head_width] = {**flex.HOPPER, **tiles}
    how: dict[str, Any] = {}
    if "overhead" in options:
        how["mode"] = "reduce-overhead"
    if "autotune" in options:
        how["mode"] = "max-autotune-no-cudagraphs"
    if "coordinate" in options:
        how["options"] = {"coordinate_descent_tuning": True}
    frames, compiled = variant.tokens // (side // 2) ** 2, "eager" not in options

    def new_step(layers: int) -> Callable[[], None]:
        return training_step(
            replace(model, depth=layers), frames, "auto" if on_gpu else "sdpa", compiled, variant.recompute,
            prepare=use_scaled_mm if "fp8" in options else lambda block: None, side=side,
            kept_share=float(options.get("budget", 1)), **how,
        )  # fmt: skip

    timed(new_step(min(2, variant.layers)))
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    print(json.dumps({"compiled": time.perf_counter() - begin}), flush=True)
    sys.stdin.readline()
    step = new_step(variant.layers)
    for _ in range(2):
        timed(step)
    if "graph" in options:
        step = as_graph(step)
        timed(step)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, started = map(statistics.median, zip(*(timed(step) for _ in range(runs)), strict=True))
    value_bytes = 2 if on_gpu else 4
    how_kept = value_bytes, variant.recompute, float(options.get("budget", 1))
    kept = cost.activation_bytes(model, cost.Run(frames), side // 2, side // 2, 1, *how_kept)
    result = {
        "seconds": seconds,
        "started": started,
        "memory": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "planned": kept + 2 * value_bytes * cost.parameters(model),  # weights and gradients
        "flops": cost.step_flops(model, frames, side, side),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "kernels": kernels(step, 40) if on_gpu and "graph" not in options else "",
    }
    print(json.dumps(result), flush=True)


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def use_scaled_mm(block: Block) -> None:
    """Let the block's linear layers multiply in fp8."""
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.__class__ = _ScaledLinear


class _ScaledLinear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _ScaledMM.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def _to_fp8(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor in fp8, and what it was divided by."""
    most = torch.finfo(kind).max
    scale = x.abs().amax().float().clamp(min=1e-12) / most
    return (x.float() / scale).clamp(-most, most).to(kind), scale


class _ScaledMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        (a, a_scale), (b, b_scale) = _to_fp8(x, torch.float8_e4m3fn), _to_fp8(weight, torch.float8_e4m3fn)
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        a, a_scale = _to_fp8(x, torch.float8_e4m3fn)
        b, b_scale = _to_fp8(weight, torch.float8_e4m3fn)
        g, g_scale = _to_fp8(grads[0], torch.float8_e5m2)
        columns = b.t().contiguous().t()
        grad_x = torch._scaled_mm(g, columns, g_scale, b_scale, out_dtype=x.dtype)
        inputs = a.t().contiguous().t()
        grad_weight = torch._scaled_mm(g.t().contiguous(), inputs, g_scale, a_scale, out_dtype=x.dtype)
        return grad_x, grad_weight


def compare(variants: list[Variant], runs: int, limit: float, results: Path | None, side: int, at_once: int) -> None:
    """Measure the variants, a group at a time: all of it compile side by side, then they are measured in turn. No group
    begins that might end after `limit` seconds, as the longest did; the first one always does."""
    done, begin, longest = set[str](), time.monotonic(), 0.0
    if results is not None and results.exists():
        done = {json.loads(line)["variant"] for line in results.read_text().splitlines()}
    todo = [variant for variant in variants if variant.name not in done]
    print(f"torch {torch.__version__}, {len(todo)} variants, {len(variants) - len(todo)} measured before\n")
    print("| variant | s per step | of the CPU | MFU | peak GB | planned | s until compiled |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    groups = [[variant] for variant in todo if variant.tuned]
    shared = [variant for variant in todo if not variant.tuned]
    groups = [shared[i : i + at_once] for i in range(0, len(shared), at_once)] + groups
    for group in groups:
        start = time.monotonic()
        if longest and start - begin + longest > limit:
            print(f"| {', '.join(variant.name for variant in group)} | no time left |", flush=True)
            continue
        command = [sys.executable, __file__, "--runs", str(runs), "--side", str(side), "--measure", "--variants"]
        with ExitStack() as stack:
            waiting = []
            for variant in group:
                errors = stack.enter_context(tempfile.TemporaryFile("w+"))
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                process = stack.enter_context(subprocess.Popen([*command, variant.name], text=True, **pipes))
                waiting.append((variant, process, errors))
            rows = [{"variant": variant.name, "torch": torch.__version__} for variant in group]
            for (_, process, _), row in zip(waiting, rows, strict=True):
                row |= _next_line(process)
            for (variant, process, errors), row in zip(waiting, rows, strict=True):
                if "compiled" in row:
                    row |= _next_line(process, go_on=True)
                if process.wait():
                    errors.seek(0)
                    lines = [line.strip() for line in errors if line.strip()]
                    row["error"] = ([line for line in lines if "Error" in line] or lines or ["?"])[-1][:300]
                _report(variant, row)
                if results is not None and "error" not in row:
                    with results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        longest = max(longest, time.monotonic() - start)


def _next_line(process: subprocess.Popen[str], go_on: bool = False) -> dict[str, Any]:
    """JSON that a process prints next; nothing where it has ended."""
    assert process.stdin is not None and process.stdout is not None
    if go_on:
        process.stdin.write("\n")
        process.stdin.flush()
    return dict(json.loads(process.stdout.readline() or "{}"))


def _report(variant: Variant, row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"| {variant.name} | {row['error']} |", flush=True)
        return
    share = mfu(row["flops"] / row["seconds"], row["device"])
    print(
        f"| {variant.name} | {row['seconds']:.4f} | {row['started']:.4f} | "
        f"{'' if share is None else f'{share:.1%}'} | {row['memory'] / 1e9:.2f} | {row['planned'] / 1e9:.2f} "
        f"| {row['compiled']:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
