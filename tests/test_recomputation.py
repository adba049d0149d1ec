"""Recomputation: the same gradients, and what is computed again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from context_parallel_ranks import SCALES, backward, make
from torch.utils._python_dispatch import TorchDispatchMode

from msc.pretrain import config
from msc.pretrain.model.past_context import WholeVideo
from msc.pretrain.parallelize import ParallelConfig, ZeroConfig


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALES)
def test_gradients_are_the_same_to_the_bit(name, dtype):
    results = [
        backward(*make(SCALES[name], 7, 1, dtype=dtype, recompute=recompute), WholeVideo())
        for recompute in ("none", "cheap", "full")
    ]
    (out, x_grad, grads), *others = results
    for other_out, other_x_grad, other_grads in others:
        assert torch.equal(out, other_out) and torch.equal(x_grad, other_x_grad)
        for parameter, grad in grads.items():
            assert torch.equal(grad, other_grads[parameter]), parameter


@pytest.mark.parametrize("name", ["default", "dense", "routed"])
def test_cheap_recomputation_computes_no_product_and_no_attention_again(name):
    """But norms."""
    counts = {}
    for recompute in ("none", "cheap", "full"):
        inputs = make(SCALES[name], 7, 1, dtype=torch.float32, recompute=recompute)
        with Calls() as calls:
            backward(*inputs, WholeVideo())
        counts[recompute] = calls.counts
    dear = ["aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu"]
    dear += ["aten::topk"] * (name == "routed")
    for operator in dear:
        assert counts["none"][operator] == counts["cheap"][operator] < counts["full"][operator], operator
    norm = "aten::native_layer_norm"
    assert counts["none"][norm] < counts["cheap"][norm] <= counts["full"][norm]


def test_a_compiled_block_with_cheap_recomputation_is_one_graph():
    model, *inputs = make(SCALES["dense"], 3, 1, "none", torch.float32, recompute="cheap")
    expected = backward(model, *inputs, WholeVideo())
    model.zero_grad()
    torch._dynamo.utils.counters.clear()
    model.blocks[0].compile()
    found = backward(model, *inputs, WholeVideo())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(whole(found), whole(expected), strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def whole(results):
    """Output, input gradient, all gradients of parameters as one."""
    out, x_grad, grads = results
    return out, x_grad, torch.cat([grad.flatten() for grad in grads.values()])


@pytest.mark.parametrize("value, expected", [("true", "full"), ("false", "none"), ("cheap", "cheap"), ("none", "none")])
def test_settings_of_earlier_versions_are_read(value, expected):
    assert config.load(overrides=[f"parallel.recompute={value}"]).parallel.recompute == expected
    flat = config.flat(config.Config()) | {"parallel.recompute": value == "true" if value in "true false" else value}
    assert config.from_flat(flat, "a checkpoint").parallel.recompute == expected


def test_another_word_is_an_error():
    with pytest.raises(ValueError, match="parallel.recompute.*some.*none.*cheap.*full"):
        config.load(overrides=["parallel.recompute=some"])


def test_cheap_recomputation_is_refused_where_parameters_are_gathered_in_between():
    with pytest.raises(ValueError, match=r"recompute=cheap at ZeRO stage 3 needs parallel\.compile=true"):
        ParallelConfig(recompute="cheap", zero=ZeroConfig(stage=3))
    assert ParallelConfig(recompute="cheap", compile=True, zero=ZeroConfig(stage=3)).kept_share < 1
