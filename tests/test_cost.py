"""Closed forms against what really happens."""

from __future__ import annotations

import pytest
import torch
from sharded import SCALES
from torch.utils.flop_counter import FlopCounterMode

from msc.pretrain import backends, cost
from msc.pretrain.model import ModelConfig, MSCTransformer
from msc.pretrain.presets import PRESETS
from msc.pretrain.scales import Scale


def config(scales, frames_per_unit=1):
    return ModelConfig(
        width=32, depth=2, scales=scales, patch=2, channels=3, frames_per_unit=frames_per_unit, gate="none"
    )


@pytest.mark.parametrize("frames_per_unit", [1, 2])
@pytest.mark.parametrize("name", SCALES)
def test_attention_flops_equal_those_of_the_calls_made(name, frames_per_unit, monkeypatch):
    counted = []

    def counting(q, k, v):
        counted.append(2 * 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3])
        return forward(q, k, v)

    forward = backends._forward
    monkeypatch.setattr(backends, "_forward", counting)
    c = config(SCALES[name], frames_per_unit)
    with torch.no_grad():
        MSCTransformer(c)(torch.randn(1, 10, 3, 8, 12), torch.rand(1, 10))
    assert sum(counted) == cost.attention_flops(c, 10, 8, 12)


def test_linear_flops_equal_the_counted_ones():
    c = config(SCALES["default"])
    model = MSCTransformer(c)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 5, 3, 8, 12), torch.rand(1, 5))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    per_frame = sum(  # what acts once per frame and is left out of the closed form
        2 * 5 * layer.weight.numel()
        for layer in (model.noise.inner, model.noise.outer, model.modulate, model.final_modulate)
    )
    assert products - per_frame == cost.linear_flops(c, 5, 8, 12)


@pytest.mark.parametrize("scales", [SCALES["windowed"], (Scale(4, 2, 1, 3),)])
def test_windowed_attention_grows_linearly_with_the_video(scales):
    c = config(scales)
    first, second, third = (cost.attention_flops(c, frames, 8, 12) for frames in (20, 40, 60))
    assert third - second == second - first


@pytest.mark.parametrize("name, millions", [("demo", 1.4), ("pilot", 100), ("base", 400), ("2b", 2000), ("14b", 14000)])
def test_presets_have_the_size_they_are_named_for(name, millions):
    from dataclasses import replace

    model = replace(PRESETS[name]().model, channels=16)
    assert cost.parameters(model) == pytest.approx(millions * 1e6, rel=0.1)


def test_zero_shards_state():
    assert cost.state_bytes(1000, 0, 4, bf16=False) == 1000 * 20
    assert cost.state_bytes(1000, 1, 4, bf16=True) == 1000 * (2 + 4 + 16 // 4)
    assert cost.state_bytes(1000, 3, 4, bf16=True) == 1000 * 22 // 4
