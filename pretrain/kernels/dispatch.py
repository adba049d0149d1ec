"""Attention over blocks of keys: one signature, several kernels.

`attend(q, k, v, blocks)`: every query unit attends, unmasked, to the blocks of keys listed for it. That
list is all that a kernel needs to know of causality, windows and pooling, so no N×N mask is ever built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor

from . import sdpa  # the other kernels import torch's compiler, which takes seconds
from .blocks import KeyBlocks
from .compile_helpers import compile_time_constant

Attend = Callable[[Tensor, Tensor, Tensor, KeyBlocks], Tensor]
Kernel = Literal["auto", "sdpa", "flex", "flash"]
Masks = dict[int, Any]  # FlexAttention's block masks (flex.Prepared), by the tokens of a block


def attend(
    q_BUnhd: Tensor,
    k_BRnhd: Tensor,
    v_BRnhd: Tensor,
    blocks: KeyBlocks,
    kernel: Kernel = "auto",
    masks: Masks | None = None,
) -> Tensor:
    """Softmax attention of each query unit to its own list of key blocks.

    q `[B, U, n, h, d]` holds U units of n tokens; k and v `[B, R, n, h, d]` hold R blocks of n keys;
    `blocks[u]` names the blocks unit u sees, never none. Logits are scaled by `d**-0.5`. `masks` are those of
    `prepare` for the blocks (optional). Returns `[B, U, n, h, d]`.
    """
    kernel = resolve_kernel(kernel, len(blocks), q_BUnhd.device.type, q_BUnhd.shape[-1], q_BUnhd.dtype)
    if kernel == "flex":
        from . import flex

        n, d = q_BUnhd.shape[2], q_BUnhd.shape[-1]
        # With a mask the blocks are not read: a compiled model would check each of their numbers at every call.
        prepared = masks[n] if masks and n in masks else flex.prepare(blocks, n, q_BUnhd.device, d)
        return flex.attend(q_BUnhd, k_BRnhd, v_BRnhd, prepared)
    assert len(blocks) == q_BUnhd.shape[1] and all(blocks), "every query unit needs at least its own keys"
    if kernel == "flash":
        from . import flash

        return flash.attend(q_BUnhd, k_BRnhd, v_BRnhd, blocks)
    return sdpa.attend(q_BUnhd, k_BRnhd, v_BRnhd, blocks)


def prepare(blocks: KeyBlocks, sizes: Collection[int], device: torch.device, head_width: int, kernel: Kernel) -> Masks:
    """The kernel's masks for `blocks` of these numbers of tokens. Not to be compiled: a compiler would unroll it."""
    assert kernel != "auto", "see resolve_kernel"
    if kernel != "flex" or not blocks:
        return {}
    from . import flex

    return {n: flex.prepare(blocks, n, device, head_width) for n in sizes}


def resolve_kernel(
    kernel: Kernel, units: int, device_type: str, head_width: int, dtype: torch.dtype = torch.bfloat16
) -> Kernel:
    """The kernel's name where `kernel` is "auto": as `choose_kernel`, but a roll-out's single unit is one rectangle
    without a mask, and as its past grows `flex` would compile anew for every length."""
    if kernel != "auto":
        return kernel
    if units == 1 and not torch.is_grad_enabled():
        return "sdpa"
    return choose_kernel(device_type, head_width, dtype)


@compile_time_constant
def choose_kernel(device_type: str, head_width: int = 64, dtype: torch.dtype = torch.bfloat16) -> Kernel:
    """The kernel that "auto" means on a device ("cpu", "cuda").

    FlexAttention has no backward pass on a CPU and needs Triton and heads of 16 channels; on a GPU it is several
    times faster than `sdpa`, as one launch covers all units (docs/benchmarks.md), and it copies no keys. It compiles
    once per shape, minutes in all. Where it cannot run, flash-attn does, if one is installed that takes the heads.
    """
    if device_type != "cuda":
        return "sdpa"
    if head_width >= 16 and importlib.util.find_spec("triton") is not None:
        return "flex"
    from . import flash

    try:
        flash.check(head_width, dtype)
    except ValueError:
        return "sdpa"
    return "flash"


def check_kernel(kernel: Kernel, head_width: int, dtype: torch.dtype) -> None:
    """ValueError if a kernel chosen by name cannot run."""
    if kernel == "flash":
        from . import flash

        flash.check(head_width, dtype)
