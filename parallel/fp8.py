"""fp8 linear layers by TransformerEngine, on GPUs that have them (Hopper and later).

Weights and everything else stay in bf16; a converted layer casts its inputs, weights and gradients to fp8 with delayed
scaling. Layers whose dimensions do not divide by 16 stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

# Divisors that fp8 matrix products need: of both dimensions of a weight, of the rows of an input
DIMENSIONS, ROWS = 16, 8


def check_fp8(stage: int, recompute: bool, tokens: int) -> None:
    """ValueError where fp8 cannot run; looks for TransformerEngine and a driver, and touches no GPU.

    stage: of ZeRO. recompute: activation checkpointing. tokens: the rows of a layer's input, or a divisor of them.
    """
    instead = "use parallel.precision=bf16"
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "parallel.precision fp8 needs TransformerEngine, which is not installed: pip install "
            f"--no-build-isolation 'msc-video[gpu]', or {instead}"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"parallel.precision fp8 needs an NVIDIA GPU, and there is none; {instead}")
    if stage != 2:
        raise ValueError(f"parallel.precision fp8 works with parallel.zero.stage 2, not {stage}")
    if recompute:
        raise ValueError("parallel.precision fp8 does not work with parallel.recompute: it would recompute in bf16")
    if tokens % ROWS:
        raise ValueError(f"parallel.precision fp8 needs units of a multiple of {ROWS} tokens; there are {tokens}")


def convertible_layers(block: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers of a block that fp8 can compute, by name, without those in `skip`."""
    return {
        name: layer
        for name, layer in block.named_modules()
        if type(layer) is nn.Linear and name not in skip
        if layer.in_features % DIMENSIONS == layer.out_features % DIMENSIONS == 0
    }


def convert_linear_layers(block: nn.Module, skip: Collection[str] = ()) -> list[str]:
    """Replace convertible layers by TransformerEngine's, with the same weights and names; returns the names.

    Runs on the GPU only; call `check_fp8` first.
    """
    import transformer_engine.pytorch as te

    if not hasattr(te, "autocast"):
        raise ValueError("parallel.precision fp8 needs TransformerEngine 2.20 or later: pip install --upgrade it")
    layers = convertible_layers(block, skip)
    for name, layer in layers.items():
        bias, dtype, device = layer.bias is not None, layer.weight.dtype, layer.weight.device
        new = te.Linear(layer.in_features, layer.out_features, bias=bias, params_dtype=dtype, device=device)
        with torch.no_grad():
            new.weight.copy_(layer.weight)
            if layer.bias is not None:
                new.bias.copy_(layer.bias)
        block.set_submodule(name, new)
    return list(layers)


def autocast(enabled: bool) -> AbstractContextManager[Any]:
    """Compute converted layers in fp8: e4m3 forward, e5m2 for gradients, scales from the last 16 maxima."""
    if not enabled:
        return nullcontext()
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Format

    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, amax_compute_algo="max")
    return te.autocast(enabled=True, recipe=recipe)
