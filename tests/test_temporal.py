"""Sharding along causal time equals one process: outputs, input gradients and every parameter gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks
from torch.distributed import destroy_process_group, group, init_process_group

from msc.parallel.temporal import ShardedTimeline, bounds, transfers
from msc.pretrain.attention import WholeVideo
from msc.pretrain.model import ModelConfig, MSCTransformer
from msc.pretrain.scales import Scale

SCALES = {
    "windowed": (Scale(2, 1, 1, 2, 3), Scale(2, 2, 1, 1)),
    "window longer than a rank's share": (Scale(4, 2, 1, 9),),
    "pooled in time": (Scale(2, 2, 2, None), Scale(2, 2, 3, 1)),
    "dense": (Scale(4),),
    "default": (Scale(2, 1, 1, 2, 3), Scale(1, 2, 1, 8), Scale(1, 2, 4, None)),
}


@given(st.integers(1, 50), st.integers(1, 8))
def test_bounds_share_out_every_unit(units, ranks):
    if units < ranks:
        with pytest.raises(ValueError, match=f"{units} units.*{ranks} ranks"):
            bounds(units, ranks)
        return
    edges = bounds(units, ranks)
    shares = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert edges[0] == 0 and edges[-1] == units and max(shares) - min(shares) <= 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 12), st.integers(1, 5))
def test_transfers_bring_exactly_what_is_needed(units, ranks, window, every):
    if units < ranks:
        return
    edges = bounds(units, ranks)

    def before(first):
        return min(window, first // every)

    messages = transfers(edges, before, every)
    for target in range(ranks):
        items = [i for source, to, a, b in messages if to == target for i in range(a, b)]
        end = edges[target] // every
        assert items == list(range(end - before(edges[target]), end))
    for source, _, a, b in messages:
        assert edges[source] // every <= a < b <= edges[source + 1] // every
    if every == 1 and all(b - a >= window for a, b in zip(edges, edges[1:], strict=False)):
        # a windowed scale sends the same amount however long the video and however many the ranks
        assert all(b - a == window for _, _, a, b in messages)


def make(scales, units, frames_per_unit, gate="logits", dtype=torch.float64, width=32):
    torch.manual_seed(0)
    constants = tuple((0.5 * i, -0.3 * i) for i in range(len(scales)))
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


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_equals_one_process(ranks):
    """Even and uneven shares, one unit per rank, windows longer than a share; with and without recomputation."""
    sizes = {2: [(4, 1), (5, 2)], 4: [(4, 1), (11, 1)]}[ranks]
    cases = [
        (name, units, frames_per_unit, "values" if units == 5 else "logits", name == "default")
        for name in SCALES
        for units, frames_per_unit in sizes
    ]
    results = run_ranks(on_a_rank, ranks, cases)
    for case, *parts in zip(cases, *results, strict=True):
        name, units, frames_per_unit, gate, _ = case
        model, *inputs = make(SCALES[name], units, frames_per_unit, gate)
        out, x_grad, grads = backward(model, *inputs, WholeVideo())
        close(torch.cat([p[0] for p in parts], 1), out, f"{case}: output")
        close(torch.cat([p[1] for p in parts], 1), x_grad, f"{case}: input gradient")
        for parameter, expected in grads.items():
            assert expected is not None, f"{parameter} has no gradient"
            close(sum(p[2][parameter] for p in parts), expected, f"{case}: gradient of {parameter}")


def close(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


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


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_causality_is_bit_identical_on_the_whole_model_across_ranks(ranks):
    cuts = [1, 3, 4, 6]
    results = run_ranks(causal_on_a_rank, ranks, SCALES["default"], 7, cuts)
    before, *after = (torch.cat(parts, 1) for parts in zip(*results, strict=True))
    for cut, changed in zip(cuts, after, strict=True):
        assert torch.equal(before[:, :cut], changed[:, :cut])
        assert not torch.equal(before[:, cut:], changed[:, cut:])


def test_causality_is_bit_identical_on_the_whole_model():
    model, x, t, text, labels, _ = make(SCALES["default"], 9, 1, dtype=torch.float32)
    with torch.no_grad():
        whole = model(x, t, text, labels)
        for cut in range(1, 9):
            y, s = change_after(x, t, cut)
            assert torch.equal(model(y, s, text, labels)[:, :cut], whole[:, :cut])
