"""A configuration small enough to run here, and what its ranks send. Imported by processes, so in a file of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from context_parallel_ranks import counted, joined

from msc.datasets.statistics import Statistics
from msc.parallel.mesh import make_mesh
from msc.pretrain.model.scales import default_scales
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.parallelize import clip_shape, own_past_context
from msc.pretrain.presets import PRESETS
from msc.pretrain.validation import ASSUMED_INDEX, resolve


def small(**parallel):
    """A configuration that runs on a CPU, and its clips: 8 frames of 8 × 12 tokens."""
    base = PRESETS["demo"]()
    model = replace(base.model, width=32, depth=2, patch=2, scales=default_scales(4, patch_window=3))
    precision = {"precision": "fp32", **parallel}
    index = replace(ASSUMED_INDEX, channels=3, frames=8, height=16, width=24, statistics=Statistics.default(3))
    config = replace(base, model=model, parallel=replace(base.parallel, **precision))
    return resolve(config, index), index


def sent_on_a_rank(rank, ranks):
    """Bytes that a rank sends along time in a forward pass, and in a forward and backward pass, of one clip."""
    config, index = small(sp=ranks)
    with joined(rank, "gloo"):
        clip = clip_shape(config.model, config.parallel, index.frames, index.height, index.width)
        past_context, units = own_past_context(make_mesh(ranks, ranks, "cpu"), config.model, config.parallel, clip)
        torch.manual_seed(0)
        model = MSCTransformer(config.model)
        x, t = torch.randn(1, len(units), 3, 16, 24), torch.rand(1, len(units))
        with counted() as forward, torch.no_grad():
            model(x, t, past_context=past_context)
        with counted() as both:
            model(x, t, past_context=past_context).square().mean().backward()
    return sum(forward), sum(both)
