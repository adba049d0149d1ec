"""Schedules by the sample clock, and the average in the optimizer's state."""

from __future__ import annotations

import pytest
import torch
from reference import lay_end_to_end

from msc.pretrain.model.conditioning import SignalConfig
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.optimizer import AdamWEMA, OptimizerConfig, ema_decay, learning_rate, make_optimizer
from msc.pretrain.parallelize import check_alignment


def test_learning_rate_warms_up_and_decays_by_clips_not_steps():
    config = OptimizerConfig(lr=1.0, warmup=100, decay="cosine", final=0.1)
    rates = [learning_rate(config, clock, 1000) for clock in range(0, 1001, 10)]
    assert rates[0] < 0.02 and max(rates) == rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(OptimizerConfig(lr=1.0, warmup=0, decay="constant"), 500, 1000) == 1.0
    for clips, warmup in ((1000, 50), (10**7, 10_000)):  # by default it follows the run's length
        rates = [learning_rate(OptimizerConfig(lr=1.0), clock, clips) for clock in (warmup // 2, warmup)]
        assert rates == [pytest.approx(0.5, abs=0.02), 1.0]
    assert learning_rate(OptimizerConfig(lr=1.0, warmup=0, decay="linear", final=0.0), 500, 1000) == 0.5


def test_the_average_forgets_by_half_in_its_halflife_whatever_the_batch():
    config = OptimizerConfig(ema_halflife=1000)
    assert ema_decay(config, 10**6, 10) ** 100 == pytest.approx(0.5)
    assert ema_decay(config, 10**6, 250) ** 4 == pytest.approx(0.5)
    assert ema_decay(config, 100, 10) == pytest.approx(0.5)  # early: over a tenth of what was seen
    assert ema_decay(OptimizerConfig(ema_halflife=0), 100, 10) == 0


def test_weights_move_as_adamw_and_the_average_follows():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    average = ours.weight.detach().clone()
    a = AdamWEMA([{"params": ours.parameters(), "ema_decay": 0.9}], lr=0.1)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for _ in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        average = 0.9 * average + 0.1 * ours.weight.detach()
    assert torch.equal(ours.weight, theirs.weight)
    torch.testing.assert_close(a.state[ours.weight]["ema"], average)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = make_optimizer(model, OptimizerConfig(weight_decay=0.5)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.5), (3, 0.0)]


@pytest.mark.parametrize(("width", "heads"), [(96, 6), (96, 12), (80, 5), (100, 5)])
def test_compiled_blocks_have_their_parameters_at_multiples_of_16_bytes(width, heads):
    """In 6 heads' models what followed the gate's offsets did not, and a compiled step crashed on a GPU."""
    signals = (SignalConfig("actions", "discrete", ("left", "right", "stay")),)
    config = ModelConfig(width, 2, (Scale(heads),), classes=3, text_width=24, channels=3, signals=signals)
    model = MSCTransformer(config)
    lay_end_to_end(model, make_optimizer(model, OptimizerConfig()).param_groups)
    if width % 8 == 0:
        return check_alignment(model.blocks)
    with pytest.raises(ValueError, match=r"make model\.width.* multiples of 8, or set parallel\.compile=false"):
        check_alignment(model.blocks)
