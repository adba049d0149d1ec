"""Which layers are converted to fp8, and the errors where none can be. The products themselves need a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msc.parallel import fp8
from msc.pretrain import parallelize
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.layers import Block
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.optimizer import OptimizerConfig


def test_layers_whose_sides_divide_by_16_are_convertible():
    block = Block(ModelConfig(width=64, mlp_ratio=2.5, scales=(Scale(4),), text_width=8), shifted=False)
    every = ["attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"]
    assert sorted(fp8.convertible_layers(block, skip=["cross_attention.kv"])) == sorted(
        [*every, "cross_attention.q", "cross_attention.out"]
    )
    block = Block(ModelConfig(width=64, mlp_ratio=100 / 64, scales=(Scale(4),)), shifted=False)
    assert sorted(fp8.convertible_layers(block)) == ["attention.out", "attention.qkv"]
    assert fp8.convertible_layers(nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(16)])) == {}


@pytest.mark.parametrize(
    "engine, cuda, stage, recompute, tokens, message",
    [
        (False, True, 2, False, 64, "TransformerEngine.*not installed"),
        (True, False, 2, False, 64, "NVIDIA GPU"),
        (True, True, 3, False, 64, "zero.stage 2, not 3"),
        (True, True, 2, True, 64, "recompute"),
        (True, True, 2, False, 63, "multiple of 8 tokens; there are 63"),
    ],
)
def test_unsupported_combinations_are_errors(engine, cuda, stage, recompute, tokens, message, monkeypatch):
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: object() if engine else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(ValueError, match=message):
        fp8.check_fp8(stage, recompute, tokens)


def test_every_block_is_converted_before_the_engine_takes_the_model(monkeypatch):
    model = MSCTransformer(ModelConfig(width=64, depth=2, scales=(Scale(4),), patch=1, channels=2))
    converted = []
    monkeypatch.setattr(fp8, "convert_linear_layers", lambda block, skip: converted.append(block))
    monkeypatch.setattr(parallelize, "make_engine", lambda model, *rest: (model, list(converted)))
    config = parallelize.ParallelConfig(precision="fp8")
    _, done = parallelize.parallelize(model, config, OptimizerConfig(), 1)
    assert done == list(model.blocks)
