"""Kernels agree on the same blocks; FlexAttention's mask is checked where it runs on a CPU: forward."""

from __future__ import annotations

import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn import functional as F

from msc.pretrain.diffusion.sampler import Sampling, generate
from msc.pretrain.kernels import dispatch, flash, flex, rectangle, sdpa
from msc.pretrain.kernels.blocks import KeyBlocks
from msc.pretrain.kernels.compile_helpers import graph_breaks
from msc.pretrain.kernels.dispatch import attend, choose_kernel
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.model.transformer import MSCTransformer

CASES = [
    (scale, units, n)
    for scale in (Scale(2, 1, 1, 2), Scale(2, 2, 3, None), Scale(2, 1, 2, 2), Scale(2))
    for units, n in ((7, 40), (3, 128), (6, 16), (1, 200))
]


def draw(scale, units, n, dtype=torch.float32):
    torch.manual_seed(0)
    blocks = scale.key_blocks(0, units, separate_own=True)
    rows = max(max(seen) for seen in blocks) + 1
    q, k, v = (torch.randn(2, size, n, 2, 16, dtype=dtype) for size in (units, rows, rows))
    return q, k, v, blocks


def test_each_device_gets_the_kernel_that_can_run_there(monkeypatch):
    assert choose_kernel("cpu") == "sdpa"  # the one with a backward pass
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    assert choose_kernel("cuda", 64) == "flex" and choose_kernel("cuda", 8) == "sdpa"
    monkeypatch.setattr(flash, "load", lambda capability: ("flash-attn 2", None))
    assert choose_kernel("cuda", 8) == "flash" and choose_kernel("cuda", 8, torch.float32) == "sdpa"
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)  # no Triton
    assert choose_kernel("cuda", 64) == "flash" and choose_kernel("cuda", 20) == "sdpa"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scale, units, n", CASES)
def test_flex_equals_sdpa(scale, units, n):
    q, k, v, blocks = draw(scale, units, n)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, blocks, "flex"), attend(q, k, v, blocks, "sdpa"), atol=2e-6, rtol=0)


def test_a_training_step_with_flex_is_captured_whole_and_not_once_per_layer(monkeypatch):
    """What a compiler sees: no graph breaks; one graph for even layers, one for odd ones.

    FlexAttention refuses to be compiled with gradients on a CPU; attention to all keys stands in for it.
    """
    monkeypatch.setattr(flex, "flex_attention", lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v))
    config = ModelConfig(width=64, depth=6, scales=default_scales(4, patch_window=8), patch=1, channels=2)
    torch.manual_seed(0)
    model = MSCTransformer(config, "flex")
    torch.nn.init.normal_(model.final.weight)
    x, t = torch.randn(1, 9, 2, 12, 12), torch.rand(1, 9)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, t):
        model.zero_grad()
        model(x, t).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = step(x, t)
    for block in model.blocks:
        block.compile(backend=count, fullgraph=True)
    for grad, wanted in zip(step(x, t), expected, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4)
    step(x + 1, t / 2)
    with torch.no_grad():
        # nothing is compiled for a past that grows
        assert len(list(generate(model, x[:, :2], 2, Sampling(steps=1)))) == 2
    assert len(graphs) == 2


def test_a_cpus_kernel_leaves_a_compiled_block_whole():
    blocks = ((0, 5), (0, 1, 6), (1, 2, 7), (2, 3, 8))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, units, 3, 2, 8, requires_grad=True) for units in (4, 9, 9))
    for kernel in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        out = kernel(q, k, v, blocks, "sdpa")
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        if kernel is attend:
            expected = grads
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_looking_for_a_kernel_leaves_a_compiled_block_whole(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())

    def named(x):
        return x * len(dispatch.resolve_kernel("auto", 2, "cuda", 64))

    assert torch.compile(named, backend="eager", fullgraph=True)(torch.ones(1)) == len("flex")


def test_it_is_said_why_what_is_compiled_falls_into_pieces():
    """But not what keeps out of compilers by design."""

    def in_pieces(f):
        counters.clear()
        torch.compile(f, backend="eager")(torch.ones(2))
        why = graph_breaks()
        counters.clear()
        return why

    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    kept_out = torch.compiler.disable(lambda x: -x)
    assert in_pieces(lambda x: x + 1) == "" == in_pieces(lambda x: kept_out(x) + 1)
    why = in_pieces(broken)
    assert "graph_break" in why and why.endswith("(×1)")


def test_the_switch_for_a_fixed_order_is_left_as_it_was():
    """Also where threads overlap, as of autograd with several GPUs."""

    def use(_):
        with rectangle._in_fixed_order():
            time.sleep(0.002)
            return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(use, range(40))) == {(True, False)}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_heads_are_differentiated_in_groups_that_fill_a_gpu():
    """In a fixed order; how long it takes: docs/benchmarks.md."""
    groups = rectangle.groups_of_heads
    assert groups(1, 16, 32768, 32768, 132) == (12, 4)
    assert groups(2, 16, 16384, 16384, 132) == (11, 3, 2)
    assert groups(8, 16, 4096, 4096, 132) == groups(128, 16, 256, 256, 132) == (16,), "full already"
    assert groups(1, 16, 256, 4096, 132) == (16,), "not worth the launches"
    for batch, heads, n, processors in product((1, 3), (1, 5, 20, 24), (100, 5000), (108, 132)):
        assert sum(groups(batch, heads, n, n, processors)) == heads


def test_gradients_of_groups_of_heads_are_those_of_all(monkeypatch):
    torch.manual_seed(0)
    blocks = Scale(5).key_blocks(0, 4, separate_own=False)
    inputs = [torch.randn(2, 4, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(attend(*inputs, blocks, "sdpa").square().sum(), inputs)
    for groups in ([(0, 3), (3, 5)], [(0, 2), (2, 3), (3, 5)]):
        monkeypatch.setattr(rectangle, "head_slices", lambda q, k, groups=groups: [slice(*group) for group in groups])
        found = torch.autograd.grad(attend(*inputs, blocks, "sdpa").square().sum(), inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale, units, n", CASES)
def test_tiles_count_every_visible_pair(scale, units, n):
    *_, k, _, blocks = draw(scale, units, n)
    table = torch.zeros(units, k.shape[1], dtype=torch.bool)
    for unit, seen in enumerate(blocks):
        table[unit, list(seen)] = True
    mask = table.repeat_interleave(n, 0).repeat_interleave(n, 1).long()
    tile = flex.TILE
    counts = flex.tile_counts(table, n)
    for i in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            assert counts[i, j] == mask[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile].sum()


@pytest.mark.parametrize("scale, units, n", CASES[:8])
def test_the_hand_written_backward_is_the_gradient(scale, units, n):
    q, k, v, blocks = draw(scale, min(units, 4), 3, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, blocks, "sdpa"), inputs, atol=1e-6)


@pytest.mark.parametrize("scale, units, n", [*CASES, (Scale(2), 12, 4), (Scale(2, 1, 3, None), 40, 2)])
def test_flash_calls_equal_sdpa_forward_and_gradients(scale, units, n):
    """Everything but flash-attn itself: packing, gathering, cumulative lengths, recomputation."""
    q, k, v, blocks = draw(scale, units, n, torch.float64)
    calls = []

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
        """Plain torch in place of flash-attn's function of the same signature."""
        ends_q, ends_k = cu_seqlens_q, cu_seqlens_k
        assert ends_q.dtype == ends_k.dtype == torch.int32 and (ends_q[-1], ends_k[-1]) == (len(q), len(k))
        assert (max_seqlen_q, max_seqlen_k) == (ends_q.diff().max(), ends_k.diff().max())
        calls.append(len(k))
        outs = []
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
            logits = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * softmax_scale
            outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[c:d]))
        return torch.cat(outs), None

    inputs = [x.requires_grad_() for x in (q, k, v)]
    direction = torch.randn_like(q)
    found = flash.attend(*inputs, blocks, varlen)
    assert max(calls) <= flash.COPIES * k[:, :, :, 0, 0].numel()
    windowed = scale.time == 1 and scale.window is not None
    assert len(calls) == 1 or not windowed
    expected = attend(*inputs, blocks, "sdpa")
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad((found * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_asking_for_flash_where_there_is_none_says_so():
    q, k, v, blocks = draw(Scale(2, 1, 1, 2), 3, 4)
    with pytest.raises(ValueError, match=r"parallel\.attention flash needs.*flash-attn 2: No module.*use auto"):
        attend(q, k, v, blocks, "flash")


def test_flash_names_the_heads_it_does_not_take(monkeypatch):
    monkeypatch.setattr(flash, "load", lambda capability: ("flash-attn 2", None))
    flash.check(64, torch.bfloat16)
    for width, dtype, message in ((64, torch.float32, "float32 of 64"), (20, torch.bfloat16, "bfloat16 of 20")):
        with pytest.raises(ValueError, match=message):
            flash.check(width, dtype)


@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3", "flash-attn 4"])
def test_any_flash_attn_that_loads_is_used(name, monkeypatch):
    """Only one is installed, here as a stand-in under the module's real name."""
    flash.load.cache_clear()
    module = types.ModuleType(flash.MODULES[name])
    module.flash_attn_varlen_func = lambda *arguments: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    capability = {"flash-attn 2": 8, "flash-attn 3": 9, "flash-attn 4": 10}[name]
    assert flash.load(capability) == (name, module.flash_attn_varlen_func)
    flash.load.cache_clear()


def test_parts_of_the_keys_and_what_sees_the_same_of_them(monkeypatch):
    """Units that see the same blocks share one copy of them; units that see nothing have no part in the sum."""
    blocks = ((), (0, 1), (0, 1), (0, 1), (2, 4), (1, 3))
    expected_calls = [((1, 3, 1, 3), [(0, 1)]), ((4, 1, 2, 1), [(2, 4), (1, 3)])]
    check_part(blocks, expected_calls)
    monkeypatch.setattr(sdpa, "CPU_UNITS", 1)
    check_part(blocks, [((1, 3, 1, 3), [(0, 1)]), ((4, 1, 1, 1), [(2, 4)]), ((5, 1, 1, 1), [(1, 3)])])


def test_equal_runs_that_see_equally_many_blocks_are_one_call(monkeypatch):
    """As those of a ring's own units are; on a CPU a few at a time."""
    blocks = ((), (), (0, 1), (0, 1), (), (), (4, 5), (4, 5), (), (), (8, 9), (8, 9), (), (0,))
    check_part(blocks, [((2, 4, 3, 2), [(0, 1), (4, 5), (8, 9)]), ((13, 1, 1, 1), [(0,)])])
    monkeypatch.setattr(sdpa, "CPU_UNITS", 5)
    check_part(blocks, [((2, 4, 2, 2), [(0, 1), (4, 5)]), ((10, 2, 1, 2), [(8, 9)]), ((13, 1, 1, 1), [(0,)])])


def check_part(blocks: KeyBlocks, expected_calls: list) -> None:
    """All at once, and each unit's first block before its others: merged, and added to what there is."""
    assert sdpa._calls(blocks, torch.device("cpu")) == expected_calls
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, units, 3, 2, 8, dtype=torch.float64) for units in (len(blocks), 11, 11))
    grad = torch.randn_like(q)
    sees = [unit for unit, seen in enumerate(blocks) if seen]
    sums = torch.full((2, len(blocks), 3, 2, 1), -torch.inf, dtype=q.dtype)
    for unit in sees:
        keys = k[:, list(blocks[unit])].flatten(1, 2)
        sums[:, unit] = (torch.einsum("bnhd,bkhd->bnhk", q[:, unit], keys) / 8**0.5).logsumexp(-1, keepdim=True)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = attend(inputs[0][:, sees], *inputs[1:], tuple(blocks[unit] for unit in sees), "sdpa")
    expected = sums, *torch.autograd.grad(whole, inputs, grad[:, sees])
    whole = whole.detach()
    for parts in ([blocks], [tuple(seen[:1] for seen in blocks), tuple(seen[1:] for seen in blocks)]):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-2)):
            out, *found = in_parts(*(x.to(dtype) for x in (grad, q, k, v)), parts)
            assert relative(out[:, sees], whole) < tolerance
            assert out[:, [not seen for seen in blocks]].eq(0).all()
            for a, b in zip(found, expected, strict=True):
                assert (a.isfinite() == b.isfinite()).all()
                assert relative(a[b.isfinite()], b[b.isfinite()]) < tolerance


def in_parts(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: list[KeyBlocks]
) -> tuple[torch.Tensor, ...]:
    """Output, log-sum-exp and gradients, the last added to random ones and these taken off."""
    inputs = q, k, v
    wide = torch.promote_types(grad.dtype, torch.float32)
    out = torch.zeros_like(grad, dtype=wide)
    log_sum = torch.full((*grad.shape[:-1], 1), -torch.inf, dtype=wide)
    for blocks in parts:
        sdpa.attend_part(*inputs, blocks, out, log_sum)
    before = [torch.randn_like(x, dtype=wide) for x in inputs]
    grads = tuple(x.clone() for x in before)
    for blocks in parts:
        sdpa.differentiate_part(grad, *inputs, out.to(grad.dtype), log_sum, blocks, grads)
    return out, log_sum, *(a - b for a, b in zip(grads, before, strict=True))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_compiled_calls_with_gaps_between_their_runs_change_nothing_in_the_gaps():
    """No scale has such, but whoever calls `attend` may (pytorch issue 198102)."""
    blocks = ((0, 1, 2, 3), (1, 2, 4, 5), (0, 1), (3, 4), (6, 7))
    torch.manual_seed(0)
    inputs = [torch.randn(1, units, 2, 2, 8, requires_grad=True) for units in (5, 8, 8)]
    kernels = sdpa.attend, torch.compile(sdpa.attend, backend="aot_eager", fullgraph=True)
    plain, compiled = (torch.autograd.grad(kernel(*inputs, blocks).square().sum(), inputs) for kernel in kernels)
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_roll_outs_single_unit_needs_no_mask_and_so_no_compiling(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())  # Triton is there
    with torch.no_grad():
        assert dispatch.resolve_kernel("auto", 1, "cuda", 64) == "sdpa"
        assert dispatch.resolve_kernel("auto", 2, "cuda", 64) == "flex"
    assert dispatch.resolve_kernel("auto", 1, "cuda", 64) == "flex", "training has one kernel for all runs of units"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_shape_is_compiled_for_itself_and_for_any_batch(monkeypatch):
    """Torch looks through all that it compiled of one piece of code at every call: here each finds just one."""
    whole, made = torch.compile, CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda f, backend=made, **options: whole(f, backend=backend, **options))
    flex.compiled.cache_clear()
    for batch, units in [(2, 2), (2, 3), (5, 2), (1, 2), (3, 2), (1, 2)]:
        mask = flex.block_mask(Scale(2, window=1).key_blocks(0, units, False), 8, "cpu")
        q = torch.randn(batch, 2, 8 * units, 16)
        kernel = flex.for_any_batch(q, q, q)
        with torch.no_grad():
            out = kernel(q, q, q, mask, {})
        torch.testing.assert_close(out, flex._attend(q, q, q, mask, {}))
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(kernel._torchdynamo_orig_callable.__code__)
        assert len(entries) == 1
    assert flex.compiled.cache_info().currsize == made.frame_count == 3
    flex.compiled.cache_clear()
