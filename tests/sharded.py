"""A small model of every kind of scale, and what the tests run on its ranks.

In a module of its own, because processes that a test starts must be able to import it by name.
"""

from __future__ import annotations

import torch
from torch.distributed import destroy_process_group, group, init_process_group

from msc.parallel.temporal import ShardedTimeline, bounds
from msc.pretrain.gate import GateConstants
from msc.pretrain.model import ModelConfig, MSCTransformer
from msc.pretrain.scales import Scale

SCALES = {
    "windowed": (Scale(2, 1, 1, 2, 3), Scale(2, 2, 1, 1)),
    "window longer than a rank's share": (Scale(4, 2, 1, 9),),
    "pooled in time": (Scale(2, 2, 2, None), Scale(2, 2, 3, 1)),
    "dense": (Scale(4),),
    "default": (Scale(2, 1, 1, 2, 3), Scale(1, 2, 1, 8), Scale(1, 2, 4, None)),
}


def make(scales, units, frames_per_unit, gate="logits", dtype=torch.float64, width=64):
    torch.manual_seed(0)
    constants = tuple(GateConstants(0.5 * i, -0.3 * i, 0.9, 0.8) for i in range(len(scales)))
    config = ModelConfig(
        width=width, depth=2, scales=scales, patch=1, channels=2, frames_per_unit=frames_per_unit, gate=gate,
        gate_constants=constants, classes=3, text_width=5,
    )  # fmt: skip
    model = MSCTransformer(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    T = units * frames_per_unit
    x = torch.randn(2, T, 2, 4, 6, dtype=dtype)
    t = torch.rand(2, units, dtype=dtype).repeat_interleave(frames_per_unit, 1)
    text, labels = torch.randn(2, 3, 5, dtype=dtype), torch.tensor([0, 3])
    direction = torch.randn_like(x)
    return model, x, t, text, labels, direction


def backward(model, x, t, text, labels, direction, timeline):
    x = x.clone().requires_grad_()
    out = model(x, t, text, labels, timeline)
    (out * direction).sum().backward()
    return out.detach(), x.grad, {name: p.grad for name, p in model.named_parameters()}


def on_a_rank(rank, ranks, cases):
    init_process_group("gloo")
    results = []
    for name, units, frames_per_unit, gate, recompute in cases:
        model, x, t, text, labels, direction = make(SCALES[name], units, frames_per_unit, gate)
        model.recompute = recompute
        edges = bounds(units, ranks)
        own = slice(edges[rank] * frames_per_unit, edges[rank + 1] * frames_per_unit)
        timeline = ShardedTimeline(group.WORLD, edges)
        results.append(backward(model, x[:, own], t[:, own], text, labels, direction[:, own], timeline))
    destroy_process_group()
    return results


def causal_on_a_rank(rank, ranks, scales, units, cuts):
    init_process_group("gloo")
    model, x, t, text, labels, _ = make(scales, units, 1, dtype=torch.float32)
    edges = bounds(units, ranks)
    own = slice(edges[rank], edges[rank + 1])
    timeline = ShardedTimeline(group.WORLD, edges)
    outs = []
    for cut in (units, *cuts):
        y, s = change_after(x, t, cut)
        with torch.no_grad():
            outs.append(model(y[:, own], s[:, own], text, labels, timeline))
    destroy_process_group()
    return outs


def change_after(x, t, cut):
    y, s = x.clone(), t.clone()
    y[:, cut:] = torch.randn_like(y[:, cut:])
    s[:, cut:] = 1 - s[:, cut:]
    return y, s
