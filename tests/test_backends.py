"""Kernels agree on the same blocks; FlexAttention's mask is checked where it runs on a CPU: forward."""

from __future__ import annotations

import pytest
import torch

from msc.pretrain import flex
from msc.pretrain.backends import attend, choose_backend
from msc.pretrain.model import ModelConfig, MSCTransformer
from msc.pretrain.scales import Scale, default_scales

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


def test_a_cpu_uses_the_kernel_with_a_backward_pass():
    assert choose_backend("cpu") == "sdpa"
    assert choose_backend("cuda", 64) == "flex" and choose_backend("cuda", 8) == "sdpa"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scale, units, n", CASES)
def test_flex_equals_sdpa(scale, units, n):
    q, k, v, blocks = draw(scale, units, n)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, blocks, "flex"), attend(q, k, v, blocks, "sdpa"), atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_with_flex_is_captured_whole_and_not_once_per_layer():
    """What a compiler sees: no graph breaks; one graph for even layers, one for odd ones, one for the first."""
    config = ModelConfig(width=64, depth=6, scales=default_scales(4, patch_window=8), patch=1, channels=2)
    torch.manual_seed(0)
    model = MSCTransformer(config)
    x, t = torch.randn(1, 9, 2, 12, 12), torch.rand(1, 9)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        model.final.weight.normal_()
        expected = model(x, t)
        for block in model.blocks:
            block.attention.backend = "flex"
            block.compile(backend=count, fullgraph=True)
        torch.testing.assert_close(model(x, t), expected, atol=1e-4, rtol=0)
        model(x + 1, t / 2)
    assert len(graphs) == 3


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
