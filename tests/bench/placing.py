"""The kernels that place queries and keys (rope_triton.py), by rows that a program takes at once and in turn.

    python tests/bench/placing.py --frames 256 --heads 8

Frames of 16 × 16 tokens, bf16, a view of a projection as in the model; medians of CUDA events,
beside the time that reading and writing every value once would take at the speed of a plain copy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from msc.pretrain.model import rope_triton as placing
from msc.pretrain.model.rope import EPS, rope_angles

SIDE = 16


def median_ms(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="channels of a head")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    T, h, d = args.frames, args.heads, args.width
    device, dtype = "cuda", torch.bfloat16
    x = torch.randn(1, T, SIDE, SIDE, 3, 2 * h, d, device=device, dtype=dtype)[..., 1, :h, :]
    grad, gain = torch.randn(x.shape, device=device, dtype=dtype), torch.ones(d, device=device, dtype=dtype)
    side = torch.arange(SIDE, device=device)
    angles = rope_angles((torch.arange(T, device=device), side, side), d, 10_000.0)
    bias = torch.randn(1, T, 1, 1, h, 2, device=device)
    shared = (x, gain, angles.cos, angles.sin, bias)
    copy = median_ms(lambda: grad.clone(), args.runs)
    name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{name}, {T} frames, {h} heads of {d}; a copy: {copy:.3f} ms\n")
    print("| rows | times | forward, ms (least) | backward, ms (least) |\n| ---: | ---: | ---: | ---: |", flush=True)
    for rows, times in product(args.rows, args.times):
        forward = median_ms(partial(placing._run_forward, placing._forward, *shared, EPS, rows), args.runs)
        tables = angles.cos, angles.sin
        given = placing._backward, grad, x, gain, tables, bias, True, EPS, rows, times
        backward = median_ms(partial(placing._run_backward, *given), args.runs)
        print(
            f"| {rows} | {times} | {forward:.3f} ({copy:.3f}) | {backward:.3f} ({1.5 * copy:.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
