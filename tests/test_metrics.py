"""PSNR, SSIM and what may drift, against closed forms and another implementation."""

from __future__ import annotations

import math

import pytest
import torch

from msc.pretrain.evaluation import metrics


def picture(height, width, phase):
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    colours = [
        0.5 + 0.3 * torch.sin(0.37 * x + 0.21 * y + phase + c) + 0.1 * torch.cos(1.3 * x - 0.7 * y * (c + 1))
        for c in range(3)
    ]
    return torch.stack(colours)[None]


def wave(height, width, cycles_down, cycles_across, amplitude=0.2):
    """A single cosine of the transform, so many half cycles along height and width."""
    y, x = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5
    rows, columns = torch.cos(math.pi * cycles_down * y / height), torch.cos(math.pi * cycles_across * x / width)
    return (0.5 + amplitude * rows[:, None] * columns).expand(1, 3, -1, -1)


def test_psnr_of_a_shift_is_its_size():
    a = torch.full((2, 3, 8, 8), 0.4)
    torch.testing.assert_close(metrics.psnr(a, a + 0.1), torch.full((2,), 20.0), rtol=1e-5, atol=0)
    assert metrics.psnr(a, a).tolist() == [100.0, 100.0]


# scikit-image 0.26.0: structural_similarity(a, b, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False) on the same pictures
OTHERS = [
    (24, 32, lambda a: picture(24, 32, 0.4), 0.9135798183760458),
    (24, 32, lambda a: (a * 0.7 + 0.2).clamp(0, 1), 0.922739422356783),
    (24, 32, lambda a: (a * 4).round() / 4, 0.863368136741768),
    (11, 17, lambda a: picture(11, 17, 0.4), 0.9130390955170835),
    (11, 17, lambda a: (a * 4).round() / 4, 0.863134422710134),
]


@pytest.mark.parametrize("height, width, change, expected", OTHERS)
def test_ssim_is_that_of_scikit_image(height, width, change, expected):
    a = picture(height, width, 0.0)
    assert float(metrics.ssim(a, change(a))) == pytest.approx(expected, abs=1e-12)
    assert float(metrics.ssim(a.float(), change(a).float())) == pytest.approx(expected, abs=1e-5)


def test_ssim_of_constant_frames_is_that_of_their_light():
    """Without structure only the first factor is left: (2ab + C1) / (a² + b² + C1)."""
    a, b, c1 = 0.3, 0.5, 1e-4
    frames = [torch.full((2, 3, 16, 16), value, dtype=torch.float64) for value in (a, b)]
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert metrics.ssim(*frames).tolist() == pytest.approx([expected, expected], rel=1e-12)
    small = torch.rand(3, 3, 6, 9)  # smaller than the window
    torch.testing.assert_close(metrics.ssim(small, small), torch.ones(3))


def test_traits_of_a_wave_are_known():
    height, width, amplitude = 32, 64, 0.2
    down, across = wave(height, width, 12, 0), wave(height, width, 0, 12)
    for video in (down, across):
        assert float(metrics.contrast(video)) == pytest.approx(amplitude / 2**0.5)
    # differences of a cosine of frequency w: 2 a sin(w/2) times a sine; their mean square leaves out one edge of n
    for video, n in ((down, height), (across, width)):
        w = math.pi * 12 / n
        edges = sum(math.sin(w * i) ** 2 for i in range(1, n)) / (n - 1)
        assert float(metrics.sharpness(video)) == pytest.approx((2 * amplitude * math.sin(w / 2)) ** 2 * edges)
    moving = torch.cat([0 * down + 0.1, 0 * down + 0.4, 0 * down + 0.2])
    torch.testing.assert_close(metrics.motion(moving), torch.tensor([0.3, 0.2]).double())


@pytest.mark.parametrize(
    ("cycles", "octave"), [((16, 0), 0), ((31, 63), 0), ((15, 0), 1), ((0, 16), 1), ((7, 0), 2), ((0, 1), 2)]
)
def test_energy_lies_in_the_octave_of_the_wave(cycles, octave):
    """n half cycles over a side of N pixels are n / 2N cycles per pixel."""
    energy = metrics.band_energy(wave(32, 64, *cycles))[0]
    assert metrics.bands(32, 64) == ["1/4 to 1/2 c/px", "1/8 to 1/4 c/px", "below 1/8 c/px"]
    assert int(energy.argmax()) == octave
    assert float(energy[octave]) == pytest.approx(float(energy.sum()))


@pytest.mark.parametrize("size", [(7, 9), (16, 24), (33, 40)])
def test_octaves_add_up_to_the_variance(size):
    video = torch.rand(4, 3, *size, dtype=torch.float64)
    expected = video.var((2, 3), correction=0).mean(1)
    torch.testing.assert_close(metrics.band_energy(video).sum(1), expected)
    names = metrics.trait_names(video)
    assert metrics.traits(video, 1).shape == (len(names), 3)
    torch.testing.assert_close(metrics.traits(video, 1)[names.index("contrast")] ** 2, expected[1:], rtol=0.1, atol=0)


def test_slope_is_that_of_the_line_under_the_noise():
    at = torch.arange(9).double()
    torch.testing.assert_close(metrics.slope(2 - 0.3 * at), torch.tensor(-0.3).double())
    assert float(metrics.slope(torch.tensor([5.0]))) == 0
