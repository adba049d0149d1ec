"""`attend` by FlexAttention: one fused kernel over all units, its block mask built from unit indices.

The table of the key blocks that every unit sees is small (units × blocks); the mask's tiles are counted from it, so
that no N×N mask is ever evaluated. Masks are cached per shape; noise and batch do not enter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .blocks import KeyBlocks
from .compile_helpers import VARIANTS, allow_many_shapes

TILE = 128
# Tiles that were fastest on an H100 (tests/bench/flex_tiles.py, docs/benchmarks.md), by compute capability and channels
# of a head; others take torch's own.
HOPPER = {
    "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 4, "bwd_num_stages": 3,
}  # fmt: skip
TILES = {(9, 64): HOPPER}


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Any) -> Any:
    return flex_attention(q, k, v, block_mask=mask, kernel_options=options)


@lru_cache(maxsize=VARIANTS)
def compiled(*shapes: object) -> Callable[..., Any]:
    """FlexAttention compiled for tensors of these shapes. Each has a code object of its own: torch keeps all that it
    compiled of one code object in a list and tries one after the other at every call, with a dozen shapes for most of a
    call's time."""
    allow_many_shapes()
    return torch.compile(FunctionType(_attend.__code__.replace(), globals()), dynamic=False)


def for_any_batch(*qkv_BhNd: Tensor) -> Callable[..., Any]:
    """`compiled` for these tensors and any batch size above 1: of clips and of windows in space, whose number differs
    from region to region. Torch always treats a batch of 1 as a case of its own."""
    q, k, _ = qkv_BhNd
    if len(q) > 1:
        for x in qkv_BhNd:
            torch._dynamo.maybe_mark_dynamic(x, 0)
    return compiled(len(q) > 1, q.shape[1:], k.shape[1:], q.dtype, torch.is_grad_enabled())


class Prepared(NamedTuple):
    """Block mask, and FlexAttention's options for 16-bit tensors."""

    mask: BlockMask
    tiles: dict[str, int]


def prepare(blocks: KeyBlocks, n: int, device: torch.device, head_width: int) -> Prepared:
    """For `attend`. Not to be compiled: a compiler would unroll the table."""
    nvidia = device.type == "cuda" and torch.version.hip is None  # AMD's GPUs number capabilities differently
    capability = torch.cuda.get_device_capability(device)[0] if nvidia else 0
    return Prepared(block_mask(blocks, n, str(device)), TILES.get((capability, head_width), {}))


def attend(q_BUnhd: Tensor, k_BRnhd: Tensor, v_BRnhd: Tensor, prepared: Prepared) -> Tensor:
    """See dispatch.attend; its blocks are in `prepared`."""
    units, n = q_BUnhd.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q_BUnhd, k_BRnhd, v_BRnhd))
    if torch.compiler.is_compiling() or not q.is_cuda:  # of a compiled model it becomes a part
        kernel = _attend
    else:
        kernel = for_any_batch(q, k, v)
    # For fewer than 128 queries torch has another kernel, which writes beyond its rows with tiles that are not its own,
    # and in a compiled model takes a slice of queries to begin where the whole does (2.11, 2.13): not that one.
    options = {"BACKEND": "TRITON", **(prepared.tiles if q.dtype.itemsize == 2 else {})}
    out = kernel(q, k, v, prepared.mask, options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).unflatten(1, (units, n))


@lru_cache(maxsize=64)
def block_mask(blocks: KeyBlocks, n: int, device: str) -> BlockMask:
    """Mask of `len(blocks)` query units over the key blocks, all of n tokens; the last unit sees the last block."""
    rows = blocks[-1][-1] + 1
    table = torch.zeros(len(blocks), rows, dtype=torch.bool)
    for unit, seen in enumerate(blocks):
        table[unit, list(seen)] = True
    seen_tokens = tile_counts(table, n)
    # only tiles whose every pair is visible may skip the mask function; a short last tile is never whole
    full = seen_tokens == TILE * TILE
    partial = (seen_tokens > 0) & ~full
    device_table = table.to(device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return device_table[q // n, k // n]

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
        """(count, indices first to last) of the key tiles of every query tile, as FlexAttention lists them."""
        rows, columns = tiles.nonzero(as_tuple=True)
        indices = torch.zeros(tiles.shape, dtype=torch.int32)
        indices[rows, tiles.cumsum(-1)[rows, columns] - 1] = columns.int()
        return tiles.sum(-1)[None, None].int().to(device), indices[None, None].to(device)

    return BlockMask.from_kv_blocks(
        *ordered(partial),
        *ordered(full),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(len(blocks) * n, rows * n),
    )


def tile_counts(table: Tensor, n: int) -> Tensor:
    """Visible pairs of tokens in every TILE × TILE tile, from a table over units of n tokens."""

    def by_tiles(x: Tensor) -> Tensor:
        """Rows of units, each as often as it has tokens, added up to rows of tiles."""
        tokens = len(x) * n
        edges = torch.cat((torch.arange(0, tokens, TILE), torch.arange(0, tokens + 1, n))).unique()
        shares = x[edges[:-1] // n] * edges.diff()[:, None].to(x.dtype)
        return x.new_zeros(-(-tokens // TILE), x.shape[1]).index_add_(0, edges[:-1] // TILE, shares)

    return by_tiles(by_tiles(table.int()).T).T
