"""Recomputation: what a block does not keep for its backward pass, and computes again there.

"none": all that autograd needs is kept. "full": of every block its input alone; the backward pass begins with another
forward pass. "cheap": the results of what takes long are kept too, which are matrix products, attention with its
log-sum-exp, routed attention's choice of blocks, and what other ranks sent; the rest (norms, modulation, activation,
pooling, rotation and gate of queries and keys) is recomputed. Gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "cheap", "full"]

# By name, as some exist in some versions of torch only. Not aten::bmm: of attention written out it is all the logits.
KEPT = {
    "aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::topk", "flex_attention",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "_c10d_functional::all_to_all_single", "_c10d_functional::wait_tensor",
}  # fmt: skip


def recompute_all(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, run again in the backward pass."""
    # nothing in a block is random, and to set generators back takes the CPU time
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def recompute_cheap(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, of which the backward pass recomputes what is cheap."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name() if callable(getattr(operator, "name", None)) else str(operator)
    kept = name.partition(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
