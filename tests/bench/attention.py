"""What multi-scale attention costs on a CPU, as ratios of medians in one run: a table in markdown.

    OMP_NUM_THREADS=1 python tests/bench/attention.py --frames 128 256

Freed memory is kept as in training (`process.keep_freed_memory`); --default-malloc shows what that is worth.

1. A training step (forward and backward) of one transformer block, multi-scale against dense causal. Dense is the
   best that a CPU can do: unmasked SDPA of every frame over its prefix, never an N×N mask; that is what the module
   does with one scale of all heads, and what plain torch with autograd does is timed beside it.
2. The multi-scale module against its own matrix products and attention rectangles alone.
3. Bytes that autograd keeps for the backward pass of the block, over doublings of the clip.

Width 256, 4 heads, frames of 16 × 16 tokens, fp32, batch 1, the default scales. FLOPs are unmasked (cost.py).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from msc.parallel.process_group import keep_freed_memory
from msc.pretrain import cost
from msc.pretrain.kernels import rectangle, sdpa
from msc.pretrain.model.attention import MultiScaleAttention
from msc.pretrain.model.attention_inputs import ScaleInputs
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.layers import Block
from msc.pretrain.model.past_context import WholeVideo
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.model.transformer import MSCTransformer

GRID, WIDTH, HEADS = (16, 16), 256, 4
COMMON = {"width": WIDTH, "depth": 1, "patch": 1, "channels": 4}
MULTI_SCALE = ModelConfig(scales=default_scales(HEADS), gate="logits", **COMMON)  # type: ignore[arg-type]
DENSE = ModelConfig(scales=(Scale(HEADS),), gate="none", **COMMON)  # type: ignore[arg-type]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(runs: int, *contenders: Callable[[], object]) -> list[float]:
    """Median seconds of each after a warm-up; they take turns, so that a slow spell of the machine hits all."""
    for run in contenders:
        run()
    rounds = [[seconds(run) for run in contenders] for _ in range(runs)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def make(config: ModelConfig, frames: int) -> tuple[Block, list[ScaleInputs], Tensor, Tensor]:
    """A block, the inputs of its scales, and its own: tokens and modulation."""
    torch.manual_seed(0)
    model = MSCTransformer(config)
    (block,) = model.blocks
    assert isinstance(block, Block)
    inputs = model.attention_inputs.prepare(torch.rand(1, frames), GRID, WholeVideo())
    x = torch.randn(1, frames, *GRID, WIDTH, requires_grad=True)
    return block, inputs, x, torch.randn(1, frames, 6, WIDTH, requires_grad=True)


def block_step(config: ModelConfig, frames: int) -> Callable[[], None]:
    block, inputs, x, modulation = make(config, frames)
    direction = torch.randn_like(x)

    def step() -> None:
        block(x, modulation, None, inputs, 0).backward(direction)
        for tensor in (x, modulation, *block.parameters()):
            tensor.grad = None

    return step


def dense_attention(frames: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of dense causal attention proper: by our kernel, and by plain torch frame by frame."""
    n, d = GRID[0] * GRID[1], WIDTH // HEADS
    q, k, v = (torch.randn(1, frames, n, HEADS, d, requires_grad=True) for _ in range(3))
    direction = torch.randn(1, frames, n, HEADS, d)
    blocks = Scale(HEADS).key_blocks(0, frames, separate_own=False)

    def ours() -> None:
        torch.autograd.grad(sdpa.attend(q, k, v, blocks), (q, k, v), direction)

    def plain() -> None:
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        outs = [
            F.scaled_dot_product_attention(
                query[:, :, u * n : (u + 1) * n], key[:, :, : (u + 1) * n], value[:, :, : (u + 1) * n]
            )
            for u in range(frames)
        ]
        torch.autograd.grad(torch.cat(outs, 2).transpose(1, 2).unflatten(1, (frames, n)), (q, k, v), direction)

    return ours, plain


def module_and_pure_work(frames: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of the multi-scale module, and of its matrix products and rectangles alone."""
    block, inputs, x, _ = make(MULTI_SCALE, frames)
    module = block.attention
    direction = torch.randn_like(x)

    def step() -> None:
        module(x, inputs).backward(direction)
        for tensor in (x, *module.parameters()):
            tensor.grad = None

    rectangles = rectangles_of(module, x, inputs)
    tokens, grad = x.detach().flatten(0, 3), direction.flatten(0, 3)
    qkv, out = module.qkv.weight.detach(), module.out.weight.detach()

    def pure() -> None:
        projected = tokens @ qkv.T
        outs = [rectangle.forward(*operands) for operands in rectangles]
        _ = tokens @ out.T
        _, _ = grad @ out, grad.T @ tokens
        for (q, k, v), (o, log_sum) in zip(rectangles, outs, strict=True):
            rectangle.backward(o, q, k, v, o, log_sum)
        _, _ = projected @ qkv, projected.T @ tokens

    return step, pure


def rectangles_of(module: MultiScaleAttention, x: Tensor, inputs: list[ScaleInputs]) -> list[tuple[Tensor, ...]]:
    """Queries, keys and values of all calls that the module makes, each gathered and in one piece."""
    rectangles = []
    forward = rectangle.forward

    def recording(*operands: Tensor) -> tuple[Tensor, Tensor]:
        rectangles.append(tuple(tensor.detach().contiguous() for tensor in operands))
        return forward(*operands)

    rectangle.forward = recording  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module(x, inputs)
    finally:
        rectangle.forward = forward
    return rectangles


def kept_bytes(config: ModelConfig, frames: int) -> int:
    """Bytes of what autograd keeps for the block's backward pass, each storage once, parameters left out."""
    block, inputs, x, modulation = make(config, frames)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x, modulation, None, inputs, 0)
    del out
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="of what is quick")
    parser.add_argument("--dense-runs", type=int, default=1, help="of the dense block, after a warm-up of 16 frames")
    parser.add_argument("--default-malloc", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.default_malloc:
        keep_freed_memory()
    kept = "returns" if args.default_malloc else "keeps"
    print(f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}, medians of {args.runs}", end="")
    print(f" (dense of {args.dense_runs}); malloc {kept} large blocks\n")

    ours, plain = medians(args.runs, *dense_attention(32))
    print(f"Dense attention, 32 frames: ours {ours:.2f} s, plain torch {plain:.2f} s ({plain / ours:.2f})\n")

    print("| tokens | multi-scale s | dense s | time ratio | FLOP ratio | quotient | growth | module / pure work |")
    print("| -----: | ------------: | ------: | ---------: | ---------: | -------: | -----: | -----------------: |")
    before: tuple[int, float] | None = None
    # All lengths take turns, as growth is a ratio too.
    steps = medians(args.runs, *(block_step(MULTI_SCALE, frames) for frames in args.frames))
    for frames, fast in zip(args.frames, steps, strict=True):
        block_step(DENSE, 16)()
        dense_step = block_step(DENSE, frames)
        dense = statistics.median(seconds(dense_step) for _ in range(args.dense_runs))
        del dense_step
        module, pure = medians(args.runs, *module_and_pure_work(frames))
        flops = cost.block_flops(DENSE, frames, *GRID) / cost.block_flops(MULTI_SCALE, frames, *GRID)
        growth = f"{fast / before[1]:.2f}" if before and frames == 2 * before[0] else ""
        print(
            f"| {frames * GRID[0] * GRID[1]:,} | {fast:.2f} | {dense:.1f} | {dense / fast:.2f} | {flops:.2f} "
            f"| {dense / fast / flops:.0%} | {growth} | {module:.2f} / {pure:.2f} = {module / pure:.2f} |",
            flush=True,
        )
        before = frames, fast

    print("\n| frames | kept for backward MB | growth |\n| -----: | -------------------: | -----: |")
    shorter = 0.0
    for frames in (16, 32, 64, 128):
        size = kept_bytes(MULTI_SCALE, frames)
        print(f"| {frames} | {size / 1e6:.1f} | {f'{size / shorter:.3f}' if shorter else ''} |", flush=True)
        shorter = size


if __name__ == "__main__":
    main()
