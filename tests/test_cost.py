"""Closed forms against what really happens."""

from __future__ import annotations

import gc

import pytest
import torch
from context_parallel_ranks import SCALES
from torch.utils.flop_counter import FlopCounterMode

from msc.pretrain import cost
from msc.pretrain.kernels import rectangle
from msc.pretrain.kernels.compile_helpers import limit_kept_activations
from msc.pretrain.model import attention_inputs
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.past_context import WholeVideo
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.parallelize import KEPT_SHARE
from msc.pretrain.presets import PRESETS


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

    forward = rectangle.forward
    monkeypatch.setattr(rectangle, "forward", counting)
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


@pytest.mark.parametrize("scales", [SCALES["windowed"], (Scale(4, 2, 1, 3),), (Scale(4, top=4),)])
def test_windowed_and_routed_attention_grows_linearly_with_the_video(scales):
    c = config(scales)
    first, second, third = (cost.attention_flops(c, frames, 8, 12) for frames in (20, 40, 60))
    assert third - second == second - first


class Later(WholeVideo):
    """A run of units that starts at `first`; what came before it is sent by somebody."""

    def __init__(self, first):
        self.first = first

    def exchange(self, key, x_BU, before, kept, every=1):
        size = before(self.first)

        def earlier():
            sent = x_BU.new_zeros(x_BU.shape[0], size, *x_BU.shape[2:])
            return torch.ops._c10d_functional.wait_tensor(sent) + 0 * x_BU.sum()  # no leaf, which its graph would keep

        return earlier if size else lambda: None

    def noise_levels(self, t_BUF, kept):
        return torch.cat((t_BUF.new_zeros(t_BUF.shape[0], self.first, t_BUF.shape[2]), t_BUF), 1), 0


def held():
    """Storages of the tensors that Python holds on to, by address."""
    gc.collect()
    plain = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta)
    tensors = (x for x in plain if not torch._is_functional_tensor(x))  # an earlier test's tracer may have left some
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}


def kept_bytes(model, past_context, *inputs):
    """What autograd, and recomputation, really keep: every storage once, without what was there before."""
    before, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in before:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    attention_inputs._rope_tables.cache_clear()
    others = held()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*inputs, past_context=past_context)
    assert out.requires_grad
    if model.recompute != "none":  # by Python, not by autograd
        others[out.untyped_storage().data_ptr()] = out.untyped_storage()
        kept |= {at: storage for at, storage in held().items() if at not in others}
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("gate", ["none", "logits"])
@pytest.mark.parametrize(
    "name, frames_per_unit, first, dtype, text_width",
    [
        ("default", 1, 0, torch.float32, 0),
        ("default", 1, 7, torch.float32, 24),
        ("windowed", 2, 0, torch.bfloat16, 0),
        ("windowed", 1, 9, torch.float32, 0),
        ("pooled in time", 2, 3, torch.float32, 0),
        ("dense", 1, 0, torch.float32, 24),
        ("dense", 2, 4, torch.bfloat16, 0),
        ("routed", 1, 0, torch.float32, 0),
        ("routed", 2, 3, torch.float32, 0),
        ("routed by units", 1, 7, torch.bfloat16, 0),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_kept_activations_are_those_counted(name, frames_per_unit, first, dtype, text_width, gate, recompute):
    """Within 0.5 % of all that "none" keeps: the closed form leaves out what frames and text keep, here of 12 frames of
    256 tokens. The most at once is when the last layer has all of its own again."""
    config = ModelConfig(
        width=64, depth=2, scales=SCALES[name], patch=1, channels=3, frames_per_unit=frames_per_unit, gate=gate,
        text_width=text_width,
    )  # fmt: skip
    model = MSCTransformer(config, recompute=recompute).to(dtype)
    past_context = Later(first) if first else WholeVideo()
    counted = kept_bytes(model, past_context, torch.randn(2, 12, 3, 16, 16), torch.rand(2, 12))
    run = cost.Run(12 // frames_per_unit, first, sharded=first > 0)
    sizes = config, run, 16, 16, 2, dtype.itemsize
    again = cost.layer_activation_bytes(*sizes) - cost.layer_activation_bytes(*sizes, recompute)
    error = abs(cost.activation_bytes(*sizes, recompute) - again - counted)
    assert error < 0.005 * cost.activation_bytes(*sizes)


@pytest.mark.slow  # a minute of compilation
def test_cheap_recomputation_keeps_half_and_changes_no_gradient():
    """Of compiled blocks, by torch's partitioner; the closed form is that of eager blocks, which keep no less."""
    kept, gradients = {}, {}
    for recompute, share in (("none", 1.0), ("cheap", KEPT_SHARE)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        limit_kept_activations(share)
        model = MSCTransformer(ModelConfig(width=64, depth=2, scales=SCALES["windowed"], patch=1, channels=3))
        torch.nn.init.normal_(model.final.weight, std=0.02)
        for block in model.blocks:
            block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        inputs = torch.randn(2, 12, 3, 16, 16), torch.rand(2, 12)
        kept[recompute] = kept_bytes(model, WholeVideo(), *inputs)
        model(*inputs).square().mean().backward()
        gradients[recompute] = [parameter.grad for parameter in model.parameters()]
    limit_kept_activations(1.0)
    assert kept["cheap"] < 0.65 * kept["none"]
    for a, b in zip(gradients["none"], gradients["cheap"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_kept_activations_of_windowed_scales_grow_linearly():
    c = config(SCALES["windowed"])
    sizes = [cost.activation_bytes(c, cost.Run(units), 8, 12) for units in (16, 32, 64, 128)]
    assert all(b == 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("name, millions", [("demo", 1.0), ("pilot", 100), ("base", 400), ("2b", 2000), ("14b", 14000)])
def test_presets_have_the_size_they_are_named_for(name, millions):
    from dataclasses import replace

    model = replace(PRESETS[name]().model, channels=16)
    assert cost.parameters(model) == pytest.approx(millions * 1e6, rel=0.1)


def test_zero_shards_state():
    assert cost.state_bytes(1000, 0, 4, bf16=False) == 1000 * 20
    assert cost.state_bytes(1000, 1, 4, bf16=True) == 1000 * (2 + 4 + 16 // 4)
    assert cost.state_bytes(1000, 3, 4, bf16=True) == 1000 * 22 // 4
