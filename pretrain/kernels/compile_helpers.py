"""Helpers for torch.compile: constants, the number of shapes, graph breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
VARIANTS = 256  # shapes that a function is compiled for


def compile_time_constant(function: Function) -> Function:
    """Compilers take the function's result for a constant; traced, it would break the graph.

    As torch.compiler.assume_constant_result, which would import the compiler: a second at the start of every command.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def allow_many_shapes() -> None:
    """Let torch compile a function for more shapes than its default of 8, after which it would run uncompiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, VARIANTS)


def limit_kept_activations(share: float) -> None:
    """Of what compiled blocks would keep for the backward pass, let torch keep this share and compute the rest again,
    what costs least first. Acts on what is compiled from now on. What is sent between ranks is never sent again."""
    import torch._functorch.config as config

    config.activation_memory_budget = share


def graph_breaks() -> str:
    """Reasons of the graph breaks so far, and how often each; not those by design (ring and flash-attn are not
    compiled)."""
    breaks = torch._dynamo.utils.counters["graph_break"].most_common()
    reasons = [((str(reason).splitlines() or ["?"])[0][:120], times) for reason, times in breaks]
    return "; ".join(f"{reason} (×{times})" for reason, times in reasons if "torch.compiler.disable()" not in reason)
