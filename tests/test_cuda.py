"""On a GPU: kernels against a float64 reference, causality, and a step of training in bf16."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from context_parallel_ranks import SCALES, backward, change_after, compiled_gradients, in_double, make
from reference import lay_end_to_end
from torch._dynamo.utils import counters
from torch.nn import functional as F

from msc.parallel import fp8
from msc.pretrain.diffusion import sampler
from msc.pretrain.diffusion.sampler import Sampling, generate
from msc.pretrain.evaluation import metrics
from msc.pretrain.kernels import flash, rectangle
from msc.pretrain.kernels.dispatch import attend
from msc.pretrain.model import rope
from msc.pretrain.model.config import LayerConfig
from msc.pretrain.model.layers import CrossAttention
from msc.pretrain.model.past_context import WholeVideo
from msc.pretrain.model.scales import Scale
from msc.pretrain.optimizer import OptimizerConfig, make_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def flash_attn_loads() -> bool:
    with contextlib.suppress(ValueError):
        return bool(flash.load(flash.capability()))
    return False


KERNELS = [
    "sdpa", "flex", pytest.param("flash", marks=pytest.mark.skipif(not flash_attn_loads(), reason="no flash-attn"))
]  # fmt: skip
CASES = [
    (Scale(4, 1, 1, 2), 6, 256),
    (Scale(4, 2, 1, 8), 12, 64),
    (Scale(4, 4, 4, None), 11, 16),
    (Scale(4), 5, 200),
    (Scale(3, 4, 1, 1), 1, 16),  # so few queries that FlexAttention takes another kernel
    (Scale(4, 4, 4, None), 4, 16),
    (Scale(2, 2, 1, 8), 1, 64),
]


def reference(q, k, v, blocks):
    """Unit by unit in float64 over the listed blocks."""
    outs = []
    for unit, seen in enumerate(blocks):
        keys, values = (x[:, list(seen)].flatten(1, 2).transpose(1, 2) for x in (k, v))
        outs.append(F.scaled_dot_product_attention(q[:, unit].transpose(1, 2), keys, values).transpose(1, 2))
    return torch.stack(outs, 1)


def relative(a, b):
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("width", [64, 16])
@pytest.mark.parametrize("scale, units, n", CASES)
def test_kernels_equal_the_float64_reference(scale, units, n, width, backend):
    """Also where all logits lie far below zero, as where gates close."""
    torch.manual_seed(0)
    blocks = scale.key_blocks(0, units, separate_own=True)
    rows = max(max(seen) for seen in blocks) + 1
    counters.clear()
    for batch, shift in ((2, 0), (3, -60), (1, 0)):  # FlexAttention has one kernel for the first two
        shapes = [(batch, size, n, 4, width) for size in (units, rows, rows)]
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        inputs[0][..., 0], inputs[1][..., 0] = 4, shift * width**0.5 / 4
        direction = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
        exact = [x.double().requires_grad_() for x in inputs]
        expected = reference(*exact, blocks)
        expected_grads = torch.autograd.grad((expected * direction.double()).sum(), exact)
        rough = [x.clone().requires_grad_() for x in inputs]
        out = attend(*rough, blocks, backend)
        grads = torch.autograd.grad((out * direction).sum(), rough)
        assert relative(out, expected) < 5e-3
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert relative(grad[..., 1:], wanted[..., 1:]) < 1e-2
    if backend == "flex":
        assert counters["stats"]["unique_graphs"] == 2


def test_heads_in_groups_have_the_gradients_of_the_float64_reference():
    """16 heads, which an H100 differentiates as 12 and 4, and the same bits again."""
    torch.manual_seed(0)
    blocks = (tuple(range(16)),)
    shapes = [(1, units, 1024, 16, 64) for units in (1, 16, 16, 1)]
    q, k, v, direction = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    assert processors % 16 == 0 or len(rectangle.groups_of_heads(1, 16, 1024, 16384, processors)) > 1
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad((reference(*exact, blocks) * direction.double()).sum(), exact)
    rough = [x.requires_grad_() for x in (q, k, v)]
    found, again = (torch.autograd.grad(attend(*rough, blocks, "sdpa"), rough, direction) for _ in range(2))
    for grad, wanted, same in zip(found, expected, again, strict=True):
        assert relative(grad, wanted) < 1e-2 and torch.equal(grad, same)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_gradients_repeat_bit_by_bit(backend):
    """Many blocks of keys add to those of queries: left alone, torch's flash attention lets them do so in any order."""
    torch.manual_seed(0)
    blocks = Scale(4).key_blocks(0, 12, separate_own=False)
    inputs = [torch.randn(2, 12, 256, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    once, *others = (torch.autograd.grad(attend(*inputs, blocks, backend).square().sum(), inputs) for _ in range(4))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("biased, heads", [(False, 0), (True, 4), (True, 1)])  # of the bias in unrotated channels
@pytest.mark.parametrize("shape", [(2, 3, 2, 4, 4, 64), (1, 5, 1, 1, 3, 24), (2, 6, 8, 8, 4, 128), (2, 2, 2, 2, 6, 40)])
def test_queries_and_keys_are_placed_as_by_plain_operations(shape, biased, heads, compiled):
    """Of a view of a projection, with a gradient whose heads lie apart; the bias is per head, or one for all."""
    torch.manual_seed(0)
    B, T, H, W, h, d = shape
    qkv = torch.randn(B, T, H, W, 3, h, d, device="cuda")
    gain = torch.randn(d, device="cuda")
    bias = torch.randn(B, T, 1 if heads == 1 else h, rope.UNROTATED, device="cuda")
    angles = rope.rope_angles(tuple(torch.arange(n, device="cuda") for n in (T, H, W)), d, 100.0)
    direction = torch.randn(B, h, T, H, W, d, device="cuda").permute(0, 2, 3, 4, 1, 5)

    def results(place):
        inputs = [x.clone().requires_grad_() for x in (qkv, gain, bias)]
        out = place(inputs[0].unbind(-3)[1], inputs[1], inputs[2] if biased else None)
        grads = torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True)
        return [x for x in (out, *grads) if x is not None]

    def kernel(x, gain, bias):
        return rope.normalise_and_rotate(x, gain, angles, bias)

    def plain(x, gain, bias):
        return rope.plain(x, gain, angles.cos, angles.sin, None if bias is None else bias[:, :, None, None])

    expected = results(plain)
    found = results(torch.compile(kernel, dynamic=False) if compiled else kernel)
    assert len(found) == len(expected) == 3 + biased
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["default", "dense"])
def test_causality_is_bit_identical(name, backend):
    model, x, t, condition, _ = make(SCALES[name], 8, 1, dtype=torch.float32, width=128, kernel=backend)
    model = model.cuda().bfloat16()
    x, t, condition = x.cuda(), t.cuda(), condition.to("cuda")
    with torch.no_grad():
        whole = model(x, t, condition)
        for cut in (1, 4, 7):
            later = model(*change_after(x, t, condition, cut))
            assert torch.equal(later[:, :cut], whole[:, :cut])
            assert not torch.equal(later[:, cut:], whole[:, cut:])


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_gradients_in_bf16_err_no_more_than_on_a_cpu(backend):
    """With logits far below zero, where the gate closes, and few queries."""
    model, *inputs = make(SCALES["default"], 11, 1, dtype=torch.bfloat16, kernel="sdpa")
    exact = make(SCALES["default"], 11, 1)[0]
    truth = backward(exact, *in_double(inputs), WholeVideo())
    on_cpu = backward(model, *inputs, WholeVideo())
    model = make(SCALES["default"], 11, 1, dtype=torch.bfloat16, kernel=backend)[0].cuda()
    on_gpu = backward(model, *(x.to("cuda") for x in inputs), WholeVideo())
    for rough, rougher, right in zip(on_cpu[:2], on_gpu[:2], truth[:2], strict=True):
        assert relative(rougher, right) <= 1.5 * relative(rough, right) + 1e-3


@pytest.mark.parametrize("tokens", [3, 64, 192])
def test_gradients_through_text_equal_the_float64_reference(tokens):
    torch.manual_seed(0)
    exact = CrossAttention(64, 4, LayerConfig()).double()
    x, text = torch.randn(2, 5, 4, 6, 64).double(), torch.randn(2, tokens, 64).double()
    seen = torch.rand(2, tokens) < 0.7
    seen[:, 0] = True

    def gradients(layer, *inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(layer(*inputs, seen.to(inputs[0].device)).square().sum(), inputs)

    expected = gradients(exact, x, text)
    found = gradients(copy.deepcopy(exact).cuda().bfloat16(), x.cuda().bfloat16(), text.cuda().bfloat16())
    for a, b in zip(found, expected, strict=True):
        assert relative(a.cpu(), b) < 3e-2


def test_bf16_weights_train():
    model, x, t, condition, _ = make(SCALES["default"], 8, 1, dtype=torch.float32)
    exact = model.cuda()(x.cuda(), t.cuda(), condition.to("cuda"))
    rough = model.bfloat16()(x.cuda(), t.cuda(), condition.to("cuda"))
    assert rough.dtype == torch.float32 and relative(rough, exact.double()) < 3e-2
    rough.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("gate", ["logits", "none"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(gate):
    """Torch 2.11 once lost the gradients of q and k here while outputs were right.

    Without windows in space: each size of window would be another kernel to compile.
    """
    scales = [replace(scale, patch_window=None) for scale in SCALES["default"]]
    assert compiled_gradients(tuple(scales), gate, "auto", "cuda", "inductor") < 1e-4


def test_compiled_blocks_train_with_parameters_in_one_buffer():
    """All layers share kernels, which take parameters to be aligned as the first layer's were."""
    model, x, t, condition, _ = make((Scale(6, 2),), 4, 1, dtype=torch.float32, width=96)
    model.cuda()
    lay_end_to_end(model, make_optimizer(model, OptimizerConfig()).param_groups)
    for block in model.blocks:
        block.compile()
    model(x.cuda(), t.cuda(), condition.to("cuda")).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["cheap", "full"])
def test_gradients_are_those_without_recomputation(recompute, compiled):
    scales, found = (Scale(2, 2, 1, 8), Scale(2, 1, 1, None, None, top=1)), []
    for way in ("none", recompute):
        torch._dynamo.reset()
        inputs = make(scales, 8, 1, dtype=torch.float32, width=128, recompute=way)
        model, *rest = (value.cuda() for value in inputs)
        if compiled:
            for block in model.blocks:
                block.compile()
        out, x_grad, grads = backward(model, *rest, WholeVideo())
        found.append([out, x_grad, *grads.values()])
    for value, expected in zip(found[1], found[0], strict=True):
        assert (value - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.skipif(not has("transformer_engine"), reason="no TransformerEngine")
def test_fp8_layers_compute_what_bf16_ones_do():
    """Within what 8 bits hold (e4m3 has 4 significant ones), and every weight gets its gradient."""
    model, x, t, condition, _ = make(SCALES["default"], 8, 1, dtype=torch.float32, width=128)
    model, inputs = model.cuda().bfloat16(), [y.to("cuda") for y in (x, t, condition)]
    found = []
    for in_fp8 in (False, True):
        if in_fp8:
            assert all(fp8.convert_linear_layers(block, skip=["cross_attention.kv"]) for block in model.blocks)
        for _ in range(3 if in_fp8 else 1):  # scales come from the steps before
            model.zero_grad()
            with fp8.autocast(in_fp8):
                out = model(*inputs)
            out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    names = ["output", *(name for name, _ in model.named_parameters())]
    far = {name: relative(b, a.double()) for name, a, b in zip(names, *found, strict=True) if a.norm() > 0}
    assert 1e-4 < far["output"] < 0.05, "no difference at all: not computed in 8 bits"
    assert max(far.values()) < 0.3, far


def test_figures_of_videos_are_those_of_a_cpu():
    """In fp32 throughout: TF32 would show, above all in the differences of squares of SSIM."""
    a = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    b = 0.9 * a + 0.05
    for score in (metrics.psnr, metrics.ssim):
        torch.testing.assert_close(score(a.cuda(), b.cuda()).cpu(), score(a, b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics.traits(a.cuda(), 1).cpu(), metrics.traits(a, 1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["default", "routed"])
def test_denoising_steps_replayed_from_a_graph_equal_launched_ones(name, monkeypatch):
    """To the bit, also while windows fill and groups complete; and the past stays as it is."""
    model, x, _, condition, _ = make(SCALES[name], 12, 1, dtype=torch.float32, width=128)
    model, x, condition = model.cuda(), x.cuda(), condition.to("cuda")
    how = Sampling(4, 3, solver="heun", guidance=2.0)
    replayed = list(generate(model, x[:, :3], 9, how, condition))
    monkeypatch.setattr(sampler, "RepeatedPass", lambda forward, previous: sampler.at_level(forward))
    launched = list(generate(model, x[:, :3], 9, how, condition))
    assert all(map(torch.equal, replayed, launched))
