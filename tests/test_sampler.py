"""Step-by-step generation with caches equals the full forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from context_parallel_ranks import SCALES, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import scales_and_gate

from msc.pretrain import cost
from msc.pretrain.diffusion.rectified_flow import frame_noise, sampling_levels
from msc.pretrain.diffusion.sampler import LEVELS, Cache, Sampling, extend_cache, generate, limit_context
from msc.pretrain.model.conditioning import Condition, concatenated, padded
from msc.pretrain.model.scales import Scale


@pytest.mark.parametrize("level", [0.0, 0.3])
@pytest.mark.parametrize("name, frames_per_unit, gate", [
    *((name, frames, "logits") for name in SCALES for frames in (1, 2)),
    ("default", 1, "none"),
])  # fmt: skip
def test_cached_steps_equal_the_full_forward(name, frames_per_unit, gate, level):
    model, x, _, condition, _ = make(SCALES[name], 7, frames_per_unit, gate)
    t = torch.full((2, 7 * frames_per_unit), level, dtype=x.dtype)
    full = model(x, t, condition)
    cache, at = Cache(), 0
    for units in (3, 1, 1, 2):  # a context in one pass, then unit by unit, then two at once
        frames = slice(at * frames_per_unit, (at + units) * frames_per_unit)
        own = model(x[:, frames], t[:, frames], condition.of_frames(frames), cache)
        torch.testing.assert_close(own, full[:, frames], rtol=1e-10, atol=1e-10)
        extend_cache(model, cache, x[:, frames], condition.of_frames(frames), level)
        at += units


def test_windowed_caches_stop_growing():
    model, x, *_ = make(SCALES["windowed"], 12, 1)
    cache, sizes = Cache(), []
    for frame in range(12):
        extend_cache(model, cache, x[:, frame : frame + 1])
        sizes.append(cache.bytes)
    assert sizes[4] == sizes[-1] > sizes[0]
    whole = Cache()
    extend_cache(model, whole, x)  # a long context in one pass leaves no more behind
    assert whole.bytes == sizes[-1]


def test_the_same_seed_gives_the_same_video_whatever_the_batch():
    model, x, *_ = make(SCALES["default"], 4, 1)
    pair = list(generate(model, x, 2, Sampling(steps=3, seed=5)))
    alone = list(generate(model, x[:1], 2, Sampling(steps=3, seed=5)))
    for both, one in zip(pair, alone, strict=True):
        torch.testing.assert_close(both[:1], one, rtol=1e-10, atol=1e-10)


def test_a_noisy_context_is_noised_at_its_level():
    model, x, *_ = make(SCALES["default"], 4, 1)
    clean, noisy = (next(generate(model, x, 1, Sampling(2, 5, context_level=level))) for level in (0.0, 0.5))
    assert not torch.allclose(clean, noisy)
    with pytest.raises(ValueError, match="context_level is 1.0"):
        Sampling(context_level=1.0)


def test_context_must_be_whole_units():
    model, x, *_ = make(SCALES["default"], 4, 2)
    with pytest.raises(ValueError, match="3 latent frames.*units of 2"):
        next(generate(model, x[:, :3], 1))


@st.composite
def roll_outs(draw):
    """(scales, gate, frames per unit, context units, solver, guidance, context level, guidance of a signal)."""
    scales, gate = draw(scales_and_gate())
    solver, guidance = draw(st.sampled_from(["euler", "heun"])), draw(st.sampled_from([0.0, 1.0, 2.5]))
    level = draw(st.sampled_from([0.0, 0.3]))
    keys = draw(st.sampled_from([1.0, 3.0]))
    return scales, gate, draw(st.integers(1, 2)), draw(st.integers(0, 4)), solver, guidance, level, keys


def uncached(model, context, units, steps, seed, condition, context_level, solver, guidance, keys):
    """What `generate` must yield, from the whole video at every pass, one condition after the other."""
    F, past, generated = model.config.frames_per_unit, [], []
    levels = sampling_levels(steps)

    def noise(frames, purpose):
        return torch.stack([frame_noise(seed, row, purpose, frames, context.shape[2:]) for row in (0, 1)]).to(context)

    def append(unit):
        frames = range(len(past) * F, (len(past) + 1) * F)
        past.append((1 - context_level) * unit + context_level * noise(frames, 1))

    def velocity(x, t):
        video = torch.cat([*past, x], 1)
        known = torch.full(video.shape[:2], context_level, dtype=x.dtype)
        known[:, -F:] = t
        own = padded(condition.of_frames(slice(video.shape[1])), video.shape[1])
        given = model(video, known, own)[:, -F:]
        without_text = model(video, known, Condition(signals=own.signals))[:, -F:]
        pose = {"pose": own.signals["pose"]}
        without_keys = model(video, known, replace(own, signals=pose))[:, -F:]
        return without_text + guidance * (given - without_text) + (keys - 1) * (given - without_keys)

    for unit in context.split(F, 1) if context.shape[1] else ():
        append(unit)
    for _ in range(units):
        x = noise(range(len(past) * F, (len(past) + 1) * F), 0)
        for i in range(steps):
            dt, slope = levels[i + 1] - levels[i], velocity(x, levels[i])
            if solver == "heun" and i < steps - 1:
                slope = 0.5 * slope + 0.5 * velocity(x + dt * slope, levels[i + 1])
            x = x + dt * slope
        generated.append(x)
        append(x)
    return generated


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(roll_outs())
@torch.no_grad()
def test_a_cached_roll_out_equals_an_uncached_one(case):
    scales, gate, F, given_units, solver, guidance, level, keys = case
    width = 16 * sum(scale.heads for scale in scales)
    model, x, _, condition, _ = make(scales, max(1, given_units), F, gate, width=width)
    context = x[:, : given_units * F]
    expected = uncached(model, context, 3, 3, 7, condition, level, solver, guidance, keys)
    how = Sampling(3, 7, context_level=level, solver=solver, guidance=guidance, signal_guidance={"keys": keys})
    made = list(generate(model, context, 3, how, condition))
    for own, whole in zip(made, expected, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", SCALES)
def test_cache_size_equals_the_plan_after_every_unit(name, guidance):
    for F in (1, 2):
        model, x, _, condition, _ = make(SCALES[name], 5, F, dtype=torch.float32)
        cache, batch = Cache(), 2 if guidance == 1 else 4
        new = generate(model, x, 8, Sampling(1, guidance=guidance), condition, cache=cache)
        for units, _ in enumerate(new, 5):
            assert cache.bytes == cost.cache_bytes(model.config, units, 4, 6, batch=batch), units
        assert cache.first == 13
        assert cache.bytes == cost.cache_bytes(model.config, 13, 4, 6, batch=batch)


def test_only_caches_of_unlimited_scales_grow_by_their_pooled_size():
    model, x, *_ = make((Scale(2, 1, 1, 2, 3), Scale(2, 2, 4, None)), 4, 1, dtype=torch.float32)
    cache, sizes = Cache(), {}
    for _ in generate(model, x[:1, :4], 16, Sampling(1), cache=cache):
        sizes[cache.first] = cache.bytes
    a_unit = 2 * 4 * model.config.depth * 2 * model.config.head_width * (4 * 6)  # k and v of the two unlimited heads
    assert sizes[16] - sizes[8] == 8 * a_unit // (4 * 2**2)


def test_guidance_of_one_costs_nothing_and_others_double_the_batch():
    model, x, _, condition, _ = make(SCALES["default"], 2, 1)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    plain = list(generate(model, x, 2, Sampling(2), condition))
    assert seen == [2] * (2 + 2 * 3)
    seen.clear()
    list(generate(model, x, 2, Sampling(2, guidance=3.0, solver="heun"), condition))
    assert seen == [4] * (2 + 2 * 4)  # the last step of Heun's is Euler's
    without = list(generate(model, x, 2, Sampling(2, guidance=0.0), condition))
    signals_only = replace(condition, text=None, labels=None)
    for a, b in zip(without, generate(model, x, 2, Sampling(2), signals_only), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(plain[0], without[0])


def test_noise_of_a_row_depends_on_its_number_alone():
    model, x, _, condition, _ = make(SCALES["default"], 3, 2)
    x = x[:1].expand(3, -1, -1, -1, -1)
    one = condition.map(lambda value: value[:1])
    how = Sampling(2, 5, guidance=2.0)
    many = list(generate(model, x, 2, how, concatenated([one] * 3), rows=[4, 9, 2]))
    for i, row in enumerate([4, 9, 2]):
        alone = list(generate(model, x[:1], 2, how, one, rows=[row]))
        again = list(generate(model, x[:1], 2, how, one, rows=[row]))
        for a, b, c in zip(many, alone, again, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-10, atol=1e-10)  # kernels differ with the batch
            assert torch.equal(b, c)
    assert not torch.allclose(many[0][0], many[0][1])


def test_continuing_from_a_cache_or_from_more_context_changes_no_bit():
    model, x, *_ = make(SCALES["default"], 3, 1, dtype=torch.float32)
    whole = list(generate(model, x, 4, Sampling(2, 1)))
    cache = Cache()
    parts = list(generate(model, x, 2, Sampling(2, 1), cache=cache))
    parts += generate(model, x[:, :0], 2, Sampling(2, 1), cache=cache)
    assert all(map(torch.equal, whole, parts))
    later = list(generate(model, torch.cat([x, *whole[:2]], 1), 2, Sampling(2, 1)))
    assert all(map(torch.equal, whole[2:], later))


@pytest.mark.parametrize("gate", ["none", "logits"])
def test_no_frames_are_valid_input(gate):
    model, x, t, *_ = make(SCALES["default"], 3, 1, gate)
    with torch.no_grad():
        assert model(x[:, :0], t[:, :0]).shape == x[:, :0].shape
    cache, other = Cache(), Cache()
    for part in (x[:, :2], x[:, :0], x[:, 2:]):
        extend_cache(model, cache, part)
    extend_cache(model, other, x[:, :2])
    extend_cache(model, other, x[:, 2:])
    assert cache.first == 3 and all(map(torch.equal, generate(model, x[:, :0], 1, Sampling(1), cache=cache),
                                        generate(model, x[:, :0], 1, Sampling(1), cache=other)))  # fmt: skip


def test_an_interrupted_unit_leaves_the_cache_as_it_was():
    model, x, *_ = make(SCALES["default"], 3, 1)
    caches = Cache(), Cache()
    for cache in caches:
        extend_cache(model, cache, x[:, :2])

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        extend_cache(model, caches[0], x[:, 2:])
    hook.remove()
    for cache in caches:
        extend_cache(model, cache, x[:, 2:])
    assert caches[0].first == 3 and not caches[0].writing
    assert all(map(torch.equal, *(generate(model, x[:, :0], 2, Sampling(1), cache=cache) for cache in caches)))


def test_units_missing_from_the_cache_are_an_error():
    model, x, t, *_ = make(SCALES["default"], 5, 1)
    cache = Cache()
    extend_cache(limit_context(model, 1), cache, x[:, :4])
    cache._kept = {LEVELS: cache._kept[LEVELS][:, -1:]}
    with pytest.raises(ValueError, match="noise levels of units 3 to 5 are known, not of 2 to 4"):
        model(x[:, 4:], t[:, 4:], past_context=cache)


def test_limited_context_bounds_the_cache_and_changes_nothing_within_it():
    model, x, *_ = make((Scale(2, 1, 1, 2, 3), Scale(1, 2, 4, None), Scale(1, 2)), 2, 1, dtype=torch.float32)
    limited, cache, sizes = limit_context(model, 8), Cache(), []
    within = list(generate(limited, x, 6, Sampling(1)))
    assert all(map(torch.equal, within, generate(model, x, 6, Sampling(1))))
    for _ in generate(limited, x, 30, Sampling(1), cache=cache):
        sizes.append(cache.bytes)
    assert sizes[8] == sizes[-1] == cost.cache_bytes(limited.config, 31, 4, 6, batch=2)
    assert sizes[-1] < cost.cache_bytes(model.config, 31, 4, 6, batch=2)
    assert model.config.scales[1].window is None
    with pytest.raises(ValueError, match="the limit of the context .* is 0 units"):
        limit_context(model, 0)


@torch.no_grad()
def test_output_does_not_depend_on_the_position_in_the_video():
    model, x, t, condition, _ = make(SCALES["windowed"], 5, 1, dtype=torch.float32)
    cache = Cache()
    extend_cache(model, cache, x[:, :4], condition.of_frames(slice(4)))
    near = model(x[:, 4:], t[:, 4:], condition.of_frames(slice(4, None)), cache)
    cache.first += 1_000_000  # angles are made in float64: in float32 these positions would be 0.06 apart
    far = model(x[:, 4:], t[:, 4:], condition.of_frames(slice(4, None)), cache)
    torch.testing.assert_close(near, far, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"guidance": 2.0}, "neither text nor a label"),
    ({"signal_guidance": {"keys": 2.0}}, "guidance of 'keys', but no such signal"),
    ({"signal_guidance": {"keys": -2.0}}, "keys is -2.0"),
    ({"guidance": -1.0}, "guidance is -1.0"),
    ({"guidance": float("nan")}, "guidance is nan"),
    ({"solver": "rk4"}, "solver is 'rk4'; choose one of euler, heun"),
    ({"steps": 0}, "steps is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"rows": [1]}, "1 rows are numbered, the context has 2"),
])  # fmt: skip
def test_invalid_settings_are_refused_before_anything_is_computed(arguments, message):
    arguments = dict(arguments)
    model, x, *_ = make(SCALES["default"], 2, 1)
    with pytest.raises(ValueError, match=message):
        rows = arguments.pop("rows", None)
        generate(model, x, 1, Sampling(**arguments), rows=rows)
