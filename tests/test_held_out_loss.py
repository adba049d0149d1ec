"""Losses by noise, position and context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from context_parallel_ranks import SCALES, make

from msc.pretrain.batch_inputs import BatchInputs
from msc.pretrain.diffusion.loss import Loss
from msc.pretrain.diffusion.sampler import Cache, extend_cache
from msc.pretrain.evaluation.confidence import ratio_over_clips
from msc.pretrain.evaluation.held_out_loss import BINS, LossByNoise, by_context, by_noise, by_position, hide_past


def test_parts_of_the_loss_make_up_the_loss():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(5, 7, generator=generator)
    t = torch.rand(5, 7, generator=generator) * (torch.rand(5, 7, generator=generator) > 0.3)
    inputs = BatchInputs(torch.zeros(()), torch.zeros(()), t, None, None)
    mean = float(errors[t > 0].double().mean())
    for sums, counts in (by_noise(errors, inputs), by_position(errors, inputs)):
        assert float(ratio_over_clips(sums, counts)[0][0]) == pytest.approx(mean)
        assert float(sums[:, 1:].sum() / counts[:, 1:].sum()) == pytest.approx(mean)
    assert by_noise(errors, inputs)[0].shape == (5, 1 + BINS) and by_position(errors, inputs)[0].shape == (5, 1 + 7)
    in_training = LossByNoise.zeros(torch.device("cpu"))
    in_training.add(errors, inputs.t, inputs.supervised)
    expected = ratio_over_clips(*by_noise(errors, inputs))[0][1:].tolist()
    assert [v for k, v in in_training.metrics("").items() if k != "mean"] == pytest.approx(expected)


class ChangedPast(Cache):
    """A past that was another one at some scales."""

    def __init__(self, changed, scales):
        super().__init__()
        self.changed, self.scales = set(changed), scales

    def exchange(self, key, x_BU, before, kept, every=1):
        found = super().exchange(key, x_BU, before, kept, every)
        if self.writing or key[-1] not in self.changed:
            return found
        return lambda: None if found() is None else found().flip(0) + 0.5

    def noise_levels(self, t_BUF, kept):
        """All scales see the same: changed where all of them are."""
        own = t_BUF.shape[1]
        known, first = super().noise_levels(t_BUF, kept)
        if self.writing or len(self.changed) < self.scales:
            return known, first
        return torch.cat((1 - known[:, :-own], known[:, -own:]), 1), first


@pytest.mark.parametrize("gate", ["logits", "none"])
@pytest.mark.parametrize("name", ["default", "pooled in time"])
def test_a_hidden_scale_has_no_influence_and_the_others_have(name, gate):
    """Of every scale: with its past hidden, another past changes no bit; the others' pasts still count."""
    model, x, t, condition, _ = make(SCALES[name], 9, 1, gate)
    scales, own = range(len(model.config.scales)), condition.of_frames(slice(-1, None))

    def last(reader, *changed):
        cache = ChangedPast(changed, len(scales))
        extend_cache(model, cache, x[:, :-1], condition.of_frames(slice(-1)))
        with torch.no_grad():
            return reader(x[:, -1:], t[:, -1:], own, cache)

    for i in scales:
        without = hide_past(model, {i})
        assert torch.equal(last(without), last(without, i))
        assert not torch.equal(last(model), last(model, i))
        for j in scales:
            assert i == j or not torch.equal(last(without), last(without, j))
    alone = hide_past(model, set(scales))
    assert torch.equal(last(alone), last(alone, *scales))
    seen = alone(x[:, -1:], t[:, -1:], own, _at(8))
    torch.testing.assert_close(last(alone), seen, rtol=1e-12, atol=1e-12)
    assert alone.embed.weight.data_ptr() == model.embed.weight.data_ptr()  # nothing is copied


def _at(first):
    cache = Cache()
    cache.first = first
    return cache


def test_the_loss_by_context_is_that_of_the_whole_video():
    """The last unit at a level, after a clean past: as one forward pass over all of it gives."""
    model, x, _, condition, _ = make(SCALES["default"], 6, 2)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    rows = by_context(model, BatchInputs(x, noise, torch.zeros(2, 12).double(), condition))
    assert list(rows) == [
        "with all of the past", "added without any past", "without scale 1 (space 1, time 1)",
        "without scale 2 (space 2, time 1)", "without scale 3 (space 2, time 4)",
        "with keys of another clip", "with pose of another clip",
    ]  # fmt: skip
    for i, level in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        t = torch.zeros(2, 12).double()
        t[:, -2:] = level
        whole = BatchInputs(x, noise, t, condition)
        errors = Loss().per_frame(model(whole.noisy, t, condition), x, noise)[:, -2:].mean(1)
        torch.testing.assert_close(rows["with all of the past"][0][:, 1 + i], errors.double(), rtol=1e-5, atol=1e-6)
        pose = condition.signals["pose"].clone()
        pose[:, -2:] = pose[:, -2:].flip(0)
        exchanged = replace(condition, signals={**condition.signals, "pose": pose})
        added = Loss().per_frame(model(whole.noisy, t, exchanged), x, noise)[:, -2:].mean(1) - errors
        found = rows["with pose of another clip"][0][:, 1 + i]
        assert added.abs().min() > 1e-3
        torch.testing.assert_close(found, added.double(), rtol=1e-4, atol=1e-5)
    single, y, _, condition, _ = make(SCALES["dense"], 4, 1)
    rows = by_context(single, BatchInputs(y, torch.randn(y.shape).double(), torch.zeros(2, 4).double(), condition))
    assert list(rows) == [
        "with all of the past", "added without any past", "with keys of another clip", "with pose of another clip"
    ]  # fmt: skip
