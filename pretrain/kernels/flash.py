"""`attend` by flash-attn 2, 3 or 4: variable-length calls in which every query unit is one sequence.

Such a call needs the keys of each sequence in contiguous memory, so keys that several units see are copied. A
window needs window + 1 copies and one call. For a past that grows all copies would be quadratic, so units are packed
into calls that copy at most COPIES times the keys there are; a call keeps nothing but its inputs, and gathers keys and
computes attention once more in the backward pass. (Page tables would share keys without copies; flash-attn has no
backward pass for them.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .blocks import KeyBlocks

# (q, k, v [tokens, h, d], cu_seqlens_q=, cu_seqlens_k=, max_seqlen_q=, max_seqlen_k=, softmax_scale=) -> out or
# (out, ...); by name, because versions have them in different orders
Varlen = Callable[..., Any]

MODULES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
COPIES = 4


@lru_cache(maxsize=8)
def load(capability: int) -> tuple[str, Varlen]:
    """The fastest version that loads on GPUs of a major compute capability, and its varlen function; ValueError says
    why none loads."""
    newer = {9: ["flash-attn 3", "flash-attn 4"]}.get(capability, ["flash-attn 4"] if capability >= 10 else [])
    versions = [*newer, "flash-attn 2"]
    reasons = []
    for version in versions:
        try:
            return version, importlib.import_module(MODULES[version]).flash_attn_varlen_func
        except Exception as error:  # a binary made for another torch raises anything
            reasons.append(f"{version}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
    raise ValueError(
        f"parallel.attention flash needs a flash-attn that loads ({'; '.join(reasons)}); "
        "install one (`msc doctor` lists them), or use auto"
    )


def capability() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def check(head_width: int, dtype: torch.dtype) -> None:
    """ValueError where no flash-attn loads, or none takes such heads."""
    load(capability())
    if dtype not in (torch.bfloat16, torch.float16) or head_width % 8 or head_width > 256:
        raise ValueError(
            f"parallel.attention flash takes bf16 or fp16 heads of at most 256 channels, a multiple of 8; "
            f"here they are {str(dtype).removeprefix('torch.')} of {head_width}. Use auto"
        )


@torch.compiler.disable
def attend(
    q_BUnhd: Tensor, k_BRnhd: Tensor, v_BRnhd: Tensor, blocks: KeyBlocks, kernel: Varlen | None = None
) -> Tensor:
    """See dispatch.attend. `kernel`: a function of flash-attn's signature to use instead."""
    if kernel is None:
        check(q_BUnhd.shape[-1], q_BUnhd.dtype)
        _, kernel = load(capability())
    packs = pack(blocks, k_BRnhd.shape[1])
    if len(packs) == 1:
        return _call(q_BUnhd, k_BRnhd, v_BRnhd, blocks, kernel)
    parts = q_BUnhd.split([len(seen) for seen in packs], 1)
    outs = [
        checkpoint(_call, q, k_BRnhd, v_BRnhd, seen, kernel, use_reentrant=False, preserve_rng_state=False)
        for q, seen in zip(parts, packs, strict=True)
    ]
    return torch.cat(outs, 1)


def pack(blocks: KeyBlocks, rows: int) -> list[KeyBlocks]:
    """Split the units into runs that see at most COPIES · rows blocks in all. One unit alone sees at most `rows`."""
    packs: list[list[tuple[int, ...]]] = [[]]
    for seen in blocks:
        if sum(map(len, packs[-1])) + len(seen) > COPIES * rows:
            packs.append([])
        packs[-1].append(seen)
    return [tuple(run) for run in packs]


def _call(q: Tensor, k: Tensor, v: Tensor, blocks: KeyBlocks, kernel: Varlen) -> Tensor:
    batch, _, tokens, _, width = q.shape
    index, ends_q, ends_k = _plan(blocks, batch, tokens, q.device)
    longest = max(map(len, blocks)) * tokens
    k, v = (_Gather.apply(x, index).flatten(0, 2) for x in (k, v))
    out = kernel(
        q.flatten(0, 2), k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, max_seqlen_q=tokens, max_seqlen_k=longest,
        softmax_scale=width**-0.5,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too
    return out.view(q.shape)


@lru_cache(maxsize=256)
def _plan(blocks: KeyBlocks, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """KeyBlocks to gather, and the cumulative lengths of query and key sequences, clip after clip."""
    index = torch.tensor([block for seen in blocks for block in seen], device=device)
    sizes = torch.tensor([0] + [len(seen) for seen in blocks] * batch)
    ends_k = (sizes.cumsum(0) * tokens).to(device, torch.int32)
    ends_q = (torch.arange(len(blocks) * batch + 1) * tokens).to(device, torch.int32)
    return index, ends_q, ends_k


class _Gather(torch.autograd.Function):
    """`x[:, index]` whose gradients add up in at least fp32, as a block may be seen by many units."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (index,) = grads, ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.shape, dtype=wide).index_add_(1, index, grad.to(wide))
        return total.to(grad.dtype), None
