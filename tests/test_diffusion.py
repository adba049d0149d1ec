"""Noise, noise levels, loss and sampling steps: pure functions."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from msc.pretrain.diffusion.loss import Loss
from msc.pretrain.diffusion.rectified_flow import (
    DiffusionConfig,
    add_noise,
    frame_noise,
    frame_shift,
    keep_condition,
    noise_levels,
    sampling_levels,
    shift_levels,
)
from msc.pretrain.model.output import Prediction, precondition, velocity

CONFIG = DiffusionConfig()


def test_noise_of_a_frame_depends_on_seed_sample_epoch_and_frame_alone():
    whole = frame_noise(1, 7, 2, range(6), (3, 4, 5))
    part = frame_noise(1, 7, 2, range(2, 5), (3, 4, 5))
    assert torch.equal(whole[2:5], part)
    for other in ((2, 7, 2), (1, 8, 2), (1, 7, 3)):
        assert not torch.equal(frame_noise(*other, range(6), (3, 4, 5)), whole)
    frames = whole.flatten(1)
    assert torch.corrcoef(frames).fill_diagonal_(0).abs().max() < 0.6  # 60 values each: independent
    many = frame_noise(0, 0, 0, range(50), (1, 50, 50))
    assert abs(float(many.mean())) < 0.01 and abs(float(many.std()) - 1) < 0.01


def test_levels_are_one_draw_per_unit_with_the_right_share_of_clean_ones():
    t = torch.stack([noise_levels(CONFIG, 1.0, 0, sample, 0, 10, 2) for sample in range(1000)])
    assert t.shape == (1000, 20) and torch.equal(t[:, ::2], t[:, 1::2])
    assert abs(float((t == 0).float().mean()) - CONFIG.clean) < 0.02
    logits = torch.logit(t[t > 0].double())
    assert abs(float(logits.mean())) < 0.05 and abs(float(logits.std()) - 1) < 0.05
    assert torch.equal(noise_levels(CONFIG, 1.0, 0, 5, 0, 10, 2), t[5])


def test_a_share_of_clips_begins_with_a_clean_prefix_of_any_length():
    config = DiffusionConfig(clean=0.0, prefix=0.25)
    clean = torch.stack([noise_levels(config, 1.0, 0, sample, 0, 8, 1) for sample in range(4000)]) == 0
    lengths = clean.sum(1)
    assert all(row[:length].all() for row, length in zip(clean, lengths, strict=True)), "nothing clean after the prefix"
    # a quarter of the clips, an eighth of which each have a prefix of 0, 1, ... 7 units
    shares = torch.bincount(lengths, minlength=9) / 4000
    assert shares[8] == 0 and abs(float(shares[1:].sum()) - 0.25 * 7 / 8) < 0.02
    assert all(abs(float(share) - 0.25 / 8) < 0.01 for share in shares[1:8])


def test_other_levels_do_not_depend_on_the_share_of_prefixes():
    plain = [noise_levels(DiffusionConfig(), 1.0, 3, sample, 1, 6, 1) for sample in range(50)]
    mixed = [noise_levels(DiffusionConfig(prefix=0.5), 1.0, 3, sample, 1, 6, 1) for sample in range(50)]
    equal = sum(map(torch.equal, plain, mixed))
    assert 10 < equal < 45
    assert all(torch.equal(a[(a > 0) & (b > 0)], b[(a > 0) & (b > 0)]) for a, b in zip(plain, mixed, strict=True))


def test_every_supervised_frame_of_a_batch_weighs_the_same_however_long_the_prefixes():
    t = torch.tensor([[0.0, 0.0, 0.0, 0.5], [0.3, 0.5, 0.7, 0.9]])  # a long prefix, and none
    errors = torch.randn(2, 4).square().requires_grad_()
    parts = [Loss().mean(errors[i : i + 1], t[i : i + 1], 5) for i in range(2)]  # micro-batches of one clip
    (weights,) = torch.autograd.grad(sum(parts), errors)
    assert torch.equal(weights, (t > 0) / 5)


def test_no_clip_is_all_clean():
    config = DiffusionConfig(clean=0.99)
    assert all(noise_levels(config, 1.0, 0, sample, 0, 3, 1).max() > 0 for sample in range(200))


def test_shift_keeps_the_ends_and_follows_the_frame_size():
    assert shift_levels(np.array([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]
    assert frame_shift(CONFIG, 64, 64) == 1.0 and frame_shift(CONFIG, 128, 128) == 2.0
    assert frame_shift(DiffusionConfig(shift=1.5), 8, 8) == 1.5
    assert sampling_levels(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_loss_of_the_true_velocity_is_zero():
    x, noise, t = torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4), torch.rand(2, 3)
    assert Loss().per_frame(noise - x, x, noise).abs().max() == 0
    # following the true velocity from t to 0 gives the data back
    torch.testing.assert_close(add_noise(x, noise, t) - t[:, :, None, None, None] * (noise - x), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_every_prediction_can_give_the_true_velocity(prediction):
    x, noise, t = torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4), torch.rand(2, 3) * 0.9 + 0.1
    noisy, true = add_noise(x, noise, t), noise - x
    zero = velocity(prediction, noisy, t, torch.zeros_like(x))
    slope = velocity(prediction, noisy, t, torch.ones_like(x)) - zero  # it is linear in the output
    output = (true - zero) / slope
    torch.testing.assert_close(velocity(prediction, noisy, t, output), true, rtol=1e-4, atol=1e-4)
    if prediction == "x":
        torch.testing.assert_close(output, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_preconditioning_is_the_best_linear_guess_and_leaves_unit_variance(t):
    torch.manual_seed(0)
    x, noise = torch.randn(1, 1, 1, 600, 600), torch.randn(1, 1, 1, 600, 600)
    levels = torch.full((1, 1), t)
    noisy, velocity = add_noise(x, noise, levels), noise - x
    guess = precondition(noisy, levels, torch.zeros_like(x))
    rest = velocity - guess
    assert abs(float((rest * noisy).mean())) < 0.01  # nothing linear is left to gain
    assert float(rest.var()) * (t**2 + (1 - t) ** 2) == pytest.approx(1, abs=0.02)


def test_conditions_are_dropped_by_a_pure_function_of_the_clip():
    clips = [(sample, 0) for sample in range(400)]
    kept = keep_condition(0.25, 0, clips)
    assert abs(float(kept.float().mean()) - 0.75) < 0.07
    assert torch.equal(keep_condition(0.25, 0, clips[:10]), kept[:10])
    assert keep_condition(0.0, 0, clips).all()


@pytest.mark.parametrize("values", [{"clean": 1.0}, {"std": 0.0}, {"shift": -1.0}, {"prefix": 1.5}])
def test_invalid_settings_are_errors(values):
    with pytest.raises(ValueError, match="diffusion"):
        DiffusionConfig(**values)
