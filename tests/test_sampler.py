"""Step-by-step generation with caches equals the full forward pass."""

from __future__ import annotations

import pytest
import torch
from sharded import SCALES, make

from msc.pretrain.sampler import Cache, generate, remember


@pytest.mark.parametrize("level", [0.0, 0.3])
@pytest.mark.parametrize("name, frames_per_unit, gate", [
    *((name, frames, "logits") for name in SCALES for frames in (1, 2)),
    *(("default", 1, gate) for gate in ("none", "values", "pair", "mix")),
])  # fmt: skip
def test_cached_steps_equal_the_full_forward(name, frames_per_unit, gate, level):
    model, x, _, text, labels, _ = make(SCALES[name], 7, frames_per_unit, gate)
    t = torch.full((2, 7 * frames_per_unit), level, dtype=x.dtype)
    full = model(x, t, text, labels)
    cache, at = Cache(), 0
    for units in (3, 1, 1, 2):  # a context in one pass, then unit by unit, then two at once
        frames = slice(at * frames_per_unit, (at + units) * frames_per_unit)
        own = model(x[:, frames], t[:, frames], text, labels, cache)
        torch.testing.assert_close(own, full[:, frames], rtol=1e-10, atol=1e-10)
        remember(model, cache, x[:, frames], text, labels, level)
        at += units


def test_windowed_caches_stop_growing():
    model, x, *_ = make(SCALES["windowed"], 12, 1)
    cache, sizes = Cache(), []
    for frame in range(12):
        remember(model, cache, x[:, frame : frame + 1])
        sizes.append(cache.bytes)
    assert sizes[4] == sizes[-1] > sizes[0]
    whole = Cache()
    remember(model, whole, x)  # a long context in one pass leaves no more behind
    assert whole.bytes == sizes[-1]


def test_the_same_seed_gives_the_same_video_whatever_the_batch():
    model, x, *_ = make(SCALES["default"], 4, 1)
    pair = list(generate(model, x, 2, steps=3, seed=5))
    alone = list(generate(model, x[:1], 2, steps=3, seed=5))
    for both, one in zip(pair, alone, strict=True):
        torch.testing.assert_close(both[:1], one, rtol=1e-10, atol=1e-10)


def test_a_noisy_context_is_noised_at_its_level():
    model, x, *_ = make(SCALES["default"], 4, 1)
    clean, noisy = (next(generate(model, x, 1, steps=2, seed=5, context_level=level)) for level in (0.0, 0.5))
    assert not torch.allclose(clean, noisy)
    with pytest.raises(ValueError, match="context_level is 1.0"):
        next(generate(model, x, 1, context_level=1.0))


def test_context_must_be_whole_units():
    model, x, *_ = make(SCALES["default"], 4, 2)
    with pytest.raises(ValueError, match="3 latent frames.*units of 2"):
        next(generate(model, x[:, :3], 1))
