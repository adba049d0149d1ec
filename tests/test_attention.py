"""The invariants of multi-scale causal attention, over random configurations, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from context_parallel_ranks import SCALES, compiled_gradients, make
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_attention
from strategies import scales_and_gate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from msc.pretrain.diffusion.sampler import Sampling, generate
from msc.pretrain.kernels import routed
from msc.pretrain.model import attention_inputs
from msc.pretrain.model.attention import MultiScaleAttention
from msc.pretrain.model.attention_inputs import AttentionInputs
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.noise_gate import GateConstants
from msc.pretrain.model.past_context import WholeVideo
from msc.pretrain.model.rope import normalise_and_rotate
from msc.pretrain.model.scales import Scale, check_scales, spatial_windows

few = settings(max_examples=25, deadline=None)


@st.composite
def videos(draw):
    """(scales, gate, shifted, frames per unit, units, grid, head width)."""
    scales, gate = draw(scales_and_gate())
    grid = draw(st.sampled_from([(2, 2), (4, 2), (2, 4)]))
    return scales, gate, draw(st.booleans()), draw(st.integers(1, 2)), draw(st.integers(1, 5)), grid, 8


def build(case, seed=0):
    scales, gate, shifted, frames_per_unit, units, (H, W), d = case
    torch.manual_seed(seed)
    width = d * sum(scale.heads for scale in scales)
    constants = tuple(GateConstants(0.3 * i, -0.2 * i) for i in range(len(scales)))
    config = ModelConfig(
        width, scales=scales, frames_per_unit=frames_per_unit, gate=gate, rope_theta=100.0, gate_constants=constants
    )
    module = MultiScaleAttention(config, shifted).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    T = units * frames_per_unit
    x = torch.randn(2, T, H, W, width, dtype=torch.float64)
    t = torch.rand(2, units, dtype=torch.float64).clamp(0.05, 0.95).repeat_interleave(frames_per_unit, 1)
    return module, x, t


def inputs_of(module, x, t):
    return AttentionInputs(module.config).prepare(t, x.shape[2:4], WholeVideo())


def run(module, x, t):
    return module(x, inputs_of(module, x, t))


@few
@given(videos())
def test_equals_the_reference_forward_and_gradients(case):
    module, x, t = build(case)
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    fast = run(module, x, t)
    slow = reference_attention(module, x, t)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * direction).sum(), inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((slow * direction).sum(), inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@few
@given(videos(), st.integers(0, 4))
def test_later_units_leave_earlier_outputs_bit_identical(case, unit):
    module, x, t = build(case)
    frames_per_unit, units = case[3], case[4]
    cut = min(unit, units) * frames_per_unit
    changed, noisier = x.clone(), t.clone()
    changed[:, cut:] += torch.randn_like(changed[:, cut:])
    noisier[:, cut:] = 1 - noisier[:, cut:]
    before = run(module, x, t)
    after = run(module, changed, noisier)
    assert torch.equal(before[:, :cut], after[:, :cut])


def test_one_plain_scale_is_dense_causal_attention():
    scale = Scale(4)
    module, x, t = build(((scale,), "none", False, 1, 4, (2, 3), 16))
    q, k, v = module.qkv(x).unflatten(-1, (3, 4, 16)).unbind(-3)
    (scale_inputs,) = inputs_of(module, x, t)
    q, k = (
        normalise_and_rotate(y, gain, scale_inputs.rope_own) for gain, y in ((module.q_gain, q), (module.k_gain, k))
    )
    q, k, v = (y.flatten(1, 3).transpose(1, 2) for y in (q, k, v))
    frame = torch.arange(4).repeat_interleave(6)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=frame[:, None] >= frame)
    dense = module.out(dense.transpose(1, 2).flatten(-2)).reshape(x.shape)
    torch.testing.assert_close(run(module, x, t), dense, rtol=1e-12, atol=1e-12)


def test_pure_noise_in_the_past_has_no_influence_at_any_scale():
    """The limit g -> 0 in the logits: what is left is attention inside the own unit, image diffusion."""
    scales = (Scale(1, 1, 1, 2, 2), Scale(1, 2, 1, None), Scale(1, 2, 2, None))
    module, x, t = build((scales, "logits", False, 1, 5, (4, 4), 8))
    t[:, :4] = 1.0
    # positions are relative, so a frame alone at time 0 equals the same frame at time 4
    alone = run(module, x[:, 4:], t[:, 4:])
    torch.testing.assert_close(run(module, x, t)[:, 4:], alone, rtol=1e-10, atol=1e-10)


def test_a_clean_past_is_seen_whole():
    """The limit g -> 1: equal to a gate so weak that its logit is 0."""
    scales = (Scale(1, 1, 1, 2, 2), Scale(1, 2, 1, None), Scale(1, 2, 2, None))
    module, x, t = build((scales, "logits", False, 1, 5, (4, 4), 8))
    clean = run(module, x, torch.zeros_like(t))
    module.config = replace(module.config, gate_constants=(GateConstants(1e4, 1e4),) * 3)
    torch.testing.assert_close(clean, run(module, x, t), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 40), st.one_of(st.none(), st.integers(2, 16)), st.booleans())
def test_spatial_windows_tile_the_side(side, window, shifted):
    covered = [start + i for start, count, size in spatial_windows(side, window, shifted) for i in range(count * size)]
    assert covered == list(range(side))


@pytest.mark.slow  # a minute of tracing
@pytest.mark.parametrize("name", ["default", "routed"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(name):
    assert compiled_gradients(SCALES[name], "logits", "sdpa", "cpu", "aot_eager") < 1e-5


def test_of_equally_good_blocks_the_earlier_ones_are_chosen():
    """Blocks of a still picture have the same mean; a better one among them still comes first."""
    q = torch.randn(1, 6, 2, 3, 1, 8)
    k = torch.ones(1, 6, 2, 3, 1, 8)
    scale = Scale(1, top=3)
    blocks, candidates = scale.key_blocks(0, 6, separate_own=False), scale.candidates(0, 6)
    routes = routed.prepare(blocks, candidates, 2, 3, torch.device("cpu"))
    chosen = routed.choose_blocks(q, k, routes)
    assert chosen[0, 0, 4:].tolist() == [[0, 1, 2]] * 8  # of units 2 to 5, which have as many candidates
    chosen = routed.choose_blocks(q.abs(), k.abs() + 2 * (torch.arange(12).view(1, 6, 2, 1, 1, 1) == 5), routes)
    assert chosen[0, 0, 8:].tolist() == [[5, 0, 1]] * 4  # block 5 lies in unit 2, which units 4 and 5 may choose


def test_a_routed_scale_that_may_choose_everything_is_dense():
    everything = (Scale(2, top=99),)
    module, x, t = build((everything, "logits", False, 1, 6, (2, 4), 8))
    routed_out = run(module, x, t)
    module.config = replace(module.config, scales=(Scale(2),))
    torch.testing.assert_close(routed_out, run(module, x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales, message", [
    (lambda: Scale(1, top=0), "top is 0; it must be at least 1"),
    (lambda: Scale(1, time=2, top=1), "does not pool in time"),
    (lambda: check_scales([Scale(1, patch_window=5, top=1)], 1, (7, 8)), "the height of 7 tokens cannot be cut"),
])  # fmt: skip
def test_routed_scales_that_cannot_be_are_named(scales, message):
    with pytest.raises(ValueError, match=message):
        scales()


def test_tables_are_made_once_and_serve_training_after_anything():
    """Not kept from a tracer, whose tensors die with it, nor as inference mode makes them."""
    model, x, t, condition, _ = make(SCALES["default"], 5, 1, dtype=torch.float32)
    attention_inputs._rope_tables.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model(fake.from_tensor(x), fake.from_tensor(t), condition.map(fake.from_tensor))
        model(fake.from_tensor(x), t, condition)
    list(generate(model, x[:, :2], 2, Sampling(steps=1), condition))
    assert attention_inputs._rope_tables.cache_info().currsize == 0
    with torch.inference_mode():
        expected = model(x, t, condition)
    made = attention_inputs._rope_tables.cache_info().misses
    out = model(x, t, condition)
    out.square().mean().backward()
    assert torch.equal(out, expected) and attention_inputs._rope_tables.cache_info().misses == made > 0
