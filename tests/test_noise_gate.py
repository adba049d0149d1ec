"""The noise gate's mathematics against drawn data, and its constants from measured statistics."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
import yaml
from fake_checkpoints import configured

from msc.datasets.statistics import Statistics, measure_statistics
from msc.datasets.synthetic import gaussian_fields
from msc.pretrain.config import flat, load, plain
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.noise_gate import gate_constants, log_gate, log_snr, pooled_log_snr
from msc.pretrain.model.scales import Scale
from msc.pretrain.typed_values import read
from msc.pretrain.validation import check_same_model


def test_log_snr_is_finite_and_falls():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    values = log_snr(t)
    assert values.isfinite().all() and (values.diff() < 0).all()
    assert values[50] == pytest.approx(0, abs=1e-12)
    gates = log_gate(values, torch.zeros(1, dtype=torch.float64)).exp()
    assert gates[0] == 1 and gates[-1] < 1e-50


def test_a_group_of_clean_frames_is_finite_in_float32():
    clean = pooled_log_snr(torch.zeros(1, 8), 4)
    assert clean.isfinite().all() and log_gate(clean, torch.zeros(1)).isfinite().all()


@pytest.mark.parametrize("time", [1, 2, 4])
def test_equal_noise_in_a_group_only_adds_the_averaging(time):
    t = torch.tensor([[0.3] * 8])
    torch.testing.assert_close(pooled_log_snr(t, time), log_snr(t[:, : 8 // time]) + math.log(time))


def test_mixed_noise_in_a_group_matches_drawn_noise():
    """A still scene: the mean of differently noisy frames keeps mean(1-t) of the signal."""
    torch.manual_seed(0)
    t = torch.tensor([0.1, 0.9, 0.5, 0.4], dtype=torch.float64)
    x = torch.randn(200_000, 1, dtype=torch.float64)
    signal = ((1 - t) * x).mean(1)
    noise = (t * torch.randn(200_000, 4, dtype=torch.float64)).mean(1)
    drawn = math.log(signal.var() / noise.var())
    assert drawn == pytest.approx(float(pooled_log_snr(t[None], 4)), abs=0.02)


@pytest.mark.parametrize("space, t", [(1, 0.5), (2, 0.6), (4, 0.8), (8, 0.9)])
def test_the_gate_is_the_recoverable_share_of_variance(space, t):
    """sigmoid(λ + b) equals the share of a pooled field's variance that the best linear estimate recovers."""
    x = gaussian_fields(seed=3, clips=64, frames=1, height=64, width=64, beta=2.0)
    statistics = measure_statistics(x)
    x = (x - statistics.mean[0]) / statistics.std[0]
    noisy = (1 - t) * x + t * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def pool(y):
        return torch.nn.functional.avg_pool2d(y.flatten(0, 1), space).flatten().double()

    truth, seen = pool(x), pool(noisy)
    recovered = torch.corrcoef(torch.stack((truth, seen)))[0, 1].square()
    b = 2 * math.log(space) + math.log(statistics.ratio(space, 1))
    gate = log_gate(log_snr(torch.tensor([[t]])) + b, torch.zeros(1)).exp()
    assert float(gate) == pytest.approx(float(recovered), abs=0.02)


def test_constants_use_the_detail_band_for_the_finest_scale_only():
    statistics = Statistics.default(3)
    fine, coarse = gate_constants((Scale(1, window=2), Scale(1, 2, 4)), 2, statistics)
    assert fine[0] == pytest.approx(math.log(statistics.detail(2)))
    assert coarse[0] == pytest.approx(2 * math.log(4) + math.log(statistics.ratio(4, 1)))
    assert coarse[1] == pytest.approx(2 * math.log(4) + math.log(statistics.ratio(4, 4)))
    (alone,) = gate_constants((Scale(1),), 2, statistics)
    assert alone[0] == pytest.approx(2 * math.log(2) + math.log(statistics.ratio(2, 1)))


def test_constants_of_earlier_versions_are_read(tmp_path):
    """They wrote two more numbers of every scale: a run goes on, an exported folder loads."""
    config, _ = configured()
    old = [[*row, 0.9, 0.8] for row in config.model.gate_constants]
    written = plain(asdict(config))
    written["model"]["gate_constants"] = old
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert load(file=tmp_path / "config.yaml") == config
    assert read(ModelConfig, written["model"], "model", "config.yaml") == config.model
    check_same_model(config, {**flat(config), "model.gate_constants": old})
    old[0][0] += 1
    with pytest.raises(ValueError, match="model.gate_constants"):
        check_same_model(config, {**flat(config), "model.gate_constants": old})
