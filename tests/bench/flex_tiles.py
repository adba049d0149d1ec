"""Attention alone on a GPU, scale by scale: FlexAttention by tile sizes, and the other kernels.

    python tests/bench/flex_tiles.py --frames 256 --heads 16
    python tests/bench/flex_tiles.py --frames 64 --cases fine --tries default "fwd 128 64 4 3" "bwd 64 64 64 64 3 4"

The cases are the scales of the default configuration and dense attention, frames of 16 × 16
tokens, bf16. "default" is what torch chooses; "fwd M N WARPS STAGES" and "bwd M1 N1 M2 N2 STAGES WARPS" set one pass;
"flash" is flash-attn by flash.py, "flex-flash" FlexAttention by flash-attn 4. Medians of CUDA events; all variants are
compiled before, side by side. TFLOP/s are of visible pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from msc.pretrain.kernels import flash, flex
from msc.pretrain.kernels.blocks import KeyBlocks
from msc.pretrain.model.scales import Scale, default_scales

SIDE = 16  # tokens of a frame's side
TRIES = [
    "default", "safe", "tma", "fwd 128 64 4 3", "fwd 128 64 8 3", "fwd 128 128 8 3", "fwd 64 64 4 3", "fwd 128 64 4 2",
    "bwd 64 64 64 64 3 4", "bwd 64 128 128 64 2 8", "bwd 64 128 128 64 3 4", "bwd 32 128 128 32 3 4",
    "bwd 64 64 64 64 2 4", "bwd 128 64 64 128 3 8", "flash", "flex-flash",
]  # fmt: skip


def cases(heads: int) -> dict[str, Scale]:
    """Scales by name, of a model of so many heads."""
    fine, middle, coarse = default_scales(heads)
    return {"fine": fine, "middle": middle, "coarse": coarse, "dense": Scale(heads)}


def options(word: str) -> dict[str, Any]:
    """FlexAttention's kernel options of one try."""
    name, *numbers = word.split()
    values = [int(number) for number in numbers]
    if name == "fwd":
        keys = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
    else:
        keys = "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps"  # type: ignore[assignment]
    if name in ("fwd", "bwd"):
        return {f"{name}_{key}": value for key, value in zip(keys, values, strict=True)}
    others: dict[str, dict[str, Any]] = {
        "default": {},
        "safe": {"ROWS_GUARANTEED_SAFE": True},
        "tma": {"USE_TMA": True},
        "flex-flash": {"BACKEND": "FLASH"},
    }
    return others[name]


def inputs(scale: Scale, frames: int, width: int) -> tuple[list[Tensor], KeyBlocks, Tensor]:
    """q, k, v as the module hands them over, which blocks units see, and the output's gradient."""
    torch.manual_seed(0)
    blocks = scale.key_blocks(0, frames, separate_own=True)
    n, rows = (SIDE // scale.space) ** 2, max(map(max, blocks)) + 1
    q, k, v = (
        torch.randn(1, many, n, scale.heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for many in (frames, rows, rows)
    )
    return [q, k, v], blocks, torch.randn_like(q)


def kernel(word: str, blocks: KeyBlocks, n: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if word == "flash":
        return lambda q, k, v: flash.attend(q, k, v, blocks)
    mask, chosen = flex.block_mask(blocks, n, "cuda"), options(word)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat_q, flat_k, flat_v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out: Any = flex_attention(flat_q, flat_k, flat_v, block_mask=mask, kernel_options=chosen)  # type: ignore[call-overload]
        return out.transpose(1, 2).unflatten(1, q.shape[1:3])

    return torch.compile(attend, dynamic=False)


def measure(scale: Scale, frames: int, width: int, word: str, runs: int) -> tuple[float, float] | str:
    """Milliseconds of the forward and the backward pass, or what went wrong."""
    torch._dynamo.reset()
    tensors, blocks, direction = inputs(scale, frames, width)
    try:
        attend = kernel(word, blocks, tensors[0].shape[2])
        times = []
        for _ in range(runs + 2):
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            torch.cuda.synchronize()
            start.record()
            out = attend(*tensors)
            middle.record()
            torch.autograd.grad(out, tensors, direction)
            end.record()
            torch.cuda.synchronize()
            times.append((start.elapsed_time(middle), middle.elapsed_time(end)))
        forward, backward = zip(*times[2:], strict=True)
        return statistics.median(forward), statistics.median(backward)
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1][:90]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="channels of a head")
    parser.add_argument("--cases", nargs="+", default=["fine", "middle", "coarse"], choices=list(cases(4)))
    parser.add_argument("--tries", nargs="+", default=TRIES)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=8, help="that compile side by side")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    chosen = {
        name: replace(scale, patch_window=None) for name, scale in cases(args.heads).items() if name in args.cases
    }
    jobs = [(name, scale, word) for name, scale in chosen.items() for word in args.tries]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for _, scale, word in jobs:
            if word != "flash":
                pool.submit(measure, scale, args.frames, args.width, word, 0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.frames} frames, "
        f"{args.heads} heads of {args.width}\n"
    )
    print("| case | try | forward, ms | backward, ms | TFLOP/s |\n| --- | --- | ---: | ---: | ---: |", flush=True)
    for name, scale, word in jobs:
        found = measure(scale, args.frames, args.width, word, args.runs)
        if isinstance(found, str):
            print(f"| {name} | {word} | {found} | | |", flush=True)
            continue
        n = (SIDE // scale.space) ** 2
        pairs = n * n * sum(map(len, scale.key_blocks(0, args.frames, separate_own=True)))
        flops = 3.5 * 4 * pairs * args.width * scale.heads
        print(f"| {name} | {word} | {found[0]:.3f} | {found[1]:.3f} | {flops / sum(found) / 1e9:.0f} |", flush=True)


if __name__ == "__main__":
    main()
