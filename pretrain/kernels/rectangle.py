"""Attention of one rectangle of queries and keys by torch's own kernels, forward and backward; masked only for text.

Shapes: q `[B, h, n, d]`, k and v `[B, h, m, d]`, the logits' log-sum-exp `[B, h, n]`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .compile_helpers import compile_time_constant

# Left to itself torch 2.11 takes cuDNN's kernels on Hopper. Others found their gradients wrong, without a word or as
# NaN (pytorch issues 150700, 196678), and here gradients of that choice were 17 % off (docs/benchmarks.md); that cuDNN
# is to blame was not shown.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def scaled_dot_product(q_Bhnd: Tensor, k_Bhmd: Tensor, v_Bhmd: Tensor, mask: Tensor | None = None) -> Tensor:
    """Torch's attention by any kernel but cuDNN's."""
    if q_Bhnd.device.type == "cpu":
        return F.scaled_dot_product_attention(q_Bhnd, k_Bhmd, v_Bhmd, attn_mask=mask)
    with sdpa_kernel(KERNELS):
        return F.scaled_dot_product_attention(q_Bhnd, k_Bhmd, v_Bhmd, attn_mask=mask)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of the logits, empty where torch's operator does not return it."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if _flash(q):
        out, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, log_sum
    return scaled_dot_product(q, k, v), q.new_empty(0)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(grad, q, k, v, out, log_sum, 0.0, False)
    if _flash(q):
        op = torch.ops.aten._scaled_dot_product_flash_attention_backward
        seed = q.new_empty(2, dtype=torch.int64)  # of dropout, which is 0: not read
        lengths = q.shape[2], k.shape[2]
        with _in_fixed_order():
            return op(grad, q, k, v, out, log_sum.contiguous(), None, None, *lengths, 0.0, False, seed, seed)
    with torch.enable_grad():  # the kernel's statistics are private: run it again
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(scaled_dot_product(*inputs), inputs, grad)


_DETERMINISM_LOCK = threading.Lock()  # the setting is the whole process's


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """Deterministic flash attention: it else adds up the queries' gradients of several blocks of keys in any order, and
    no run would repeat another. Compiled models keep torch's order. torch.use_deterministic_algorithms would also
    change the compiler's settings, whatever the user chose there."""
    if torch.compiler.is_compiling():
        yield
        return
    with _DETERMINISM_LOCK:
        mode = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        fills = torch._C._get_deterministic_fill_uninitialized_memory()
        torch._C._set_deterministic_algorithms(True, warn_only=False)  # where it only warns flash attention ignores it
        torch._C._set_deterministic_fill_uninitialized_memory(False)  # all of the gradients are written
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(mode, warn_only=warns)
            torch._C._set_deterministic_fill_uninitialized_memory(fills)


def head_slices(q: Tensor, k: Tensor) -> list[slice | None]:
    """Heads that are best differentiated together; None: all."""
    if q.device.type == "cpu" or torch.compiler.is_compiling() or not _flash(q):
        return [None]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    ends = list(accumulate(groups_of_heads(*q.shape[:3], k.shape[2], processors)))
    return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)] if len(ends) > 1 else [None]


# Keys that flash attention's backward pass takes at a time (flash_bwd_launch_template.h: heads up to 128 wide on A100
# and H100; wider ones, and 128 on smaller GPUs, 64).
KEYS = 128
# What setting up a call and adding up its shares takes, in turns of one block of keys: two, and launches, which are the
# more turns the fewer queries a turn has (measured on an H100).
SETUP, LAUNCHES = 2, 8000


@cache
def groups_of_heads(batch: int, heads: int, queries: int, keys: int, multiprocessors: int) -> tuple[int, ...]:
    """How many heads to differentiate at a time: all, or fewer where they would leave much of a GPU idle.

    In a fixed order flash attention deals the keys of each of `batch · heads` out in as many shares as give every
    multiprocessor one, and a multiprocessor computes one at a time. On the 132 of an H100, 16 heads in 9 shares take
    two turns, of which the second has work for 12; 12 heads in 11 shares and 4 in 33 take one turn each. The batch is
    never split.
    """
    blocks = -(-keys // KEYS)

    def cost(group: int) -> float:
        """In blocks of keys one after the other."""
        shares = -(-multiprocessors // (batch * group))
        turns = -(-batch * group * shares // multiprocessors)
        return turns * -(-blocks // shares) + SETUP + LAUNCHES / queries

    best: list[tuple[float, tuple[int, ...]]] = [(0, ())]  # cost and groups of the first heads
    for count in range(1, heads + 1):
        ways = ((cost(group) + best[count - group][0], group) for group in range(count, 0, -1))
        least, group = min(ways, key=lambda way: way[0])
        best.append((least, (group, *best[count - group][1])))
    return best[heads][1]


def forward_with_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`forward` with the log-sum-exp always, which parts need to be merged."""
    if q.device.type == "cpu" or _flash(q):
        return forward(q, k, v)
    logits = _wide(q) @ _wide(k).mT * q.shape[-1] ** -0.5
    log_sum = logits.logsumexp(-1)
    return ((logits - log_sum[..., None]).exp() @ _wide(v)).to(q.dtype), log_sum


def backward_with_sum(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, ...]:
    if q.device.type == "cpu" or _flash(q):
        return backward(grad, q, k, v, out, log_sum)
    scale = q.shape[-1] ** -0.5
    weights = (_wide(q) @ _wide(k).mT * scale - log_sum[..., None]).exp()
    grad_weights = _wide(grad) @ _wide(v).mT
    grad_logits = weights * (grad_weights - (_wide(grad) * out).sum(-1, keepdim=True)) * scale
    grads = grad_logits @ _wide(k), grad_logits.mT @ _wide(q), weights.mT @ _wide(grad)
    return tuple(part.to(q.dtype) for part in grads)


def _flash(q: Tensor) -> bool:
    """Whether torch's flash attention takes these heads, in training on every GPU that it knows."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8 or q.shape[-1] > 192:
        return False
    return _has_flash()


@compile_time_constant
def _has_flash() -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
