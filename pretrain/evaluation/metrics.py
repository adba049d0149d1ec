"""Video metrics per frame: PSNR, SSIM, and traits that may drift; pure functions of `[T, 3, H, W]` in [0, 1]."""

from __future__ import annotations

import torch
from scipy.fft import dctn
from torch import Tensor

BEST_DB = 100.0  # of identical frames


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every frame in dB, at most 100: `[T]`."""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp_min(10 ** (-BEST_DB / 10)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of every frame, mean over the three colours: `[T]`.

    Wang et al. 2004 as published: an 11 × 11 Gaussian of σ = 1.5, K1 = 0.01, K2 = 0.03, without padding. Smaller
    frames get the largest odd window that fits.
    """
    side = min(11, *((n - 1) // 2 * 2 + 1 for n in a.shape[-2:]))
    at = torch.arange(side, device=a.device, dtype=a.dtype) - side // 2
    window = torch.exp(-at.square() / (2 * 1.5**2))
    window = window / window.sum()
    # frame by frame: a long video at once would take five times its memory
    return torch.stack([_ssim(x, y, window) for x, y in zip(a, b, strict=True)])


def _ssim(a_CHW: Tensor, b_CHW: Tensor, window: Tensor) -> Tensor:
    local = torch.stack([a_CHW, b_CHW, a_CHW.square(), b_CHW.square(), a_CHW * b_CHW])
    for dim in (-2, -1):  # not a convolution: a GPU may run those in TF32, too coarse for differences of squares
        places = local.shape[dim] - len(window) + 1
        local = sum((w * local.narrow(dim, i, places) for i, w in enumerate(window)), local.new_zeros(()))
    mean_a, mean_b, aa, bb, ab = local
    var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean()


# Traits that drift in a roll-out --------------------------------------------------------


def contrast(video: Tensor) -> Tensor:
    """Standard deviation over the pixels of a frame, each colour about its own mean: `[T]`."""
    return video.var((2, 3), correction=0).mean(1).sqrt()


def sharpness(video: Tensor) -> Tensor:
    """Gradient energy: mean square difference of neighbours along height plus along width: `[T]`."""
    down, across = (video.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3))
    return down + across


def motion(video: Tensor) -> Tensor:
    """Mean absolute difference from the frame before: `[T - 1]`."""
    return video.diff(dim=0).abs().mean((1, 2, 3))


def bands(height: int, width: int) -> list[str]:
    """Names of the octaves of spatial frequency, in cycles per pixel, finest first."""
    count = max(1, min(height, width).bit_length() - 3)
    octaves = [f"1/{4 << i} to 1/{2 << i} c/px" for i in range(count - 1)]
    return [*octaves, f"below 1/{1 << count} c/px"]


def band_energy(video: Tensor) -> Tensor:
    """Variance of every frame by octave of spatial frequency, mean over colours, as `bands` names them: `[T, bands]`.

    By the cosine transform, which has no leakage at the borders (Denis et al. 2002); octaves add up to the variance.
    """
    height, width = video.shape[-2:]
    count = len(bands(height, width))
    cosines = torch.from_numpy(dctn(video.cpu().numpy(), axes=(-2, -1), norm="ortho")).to(video)
    energy = cosines.square().mean(1) / (height * width)
    energy[:, 0, 0] = 0  # the mean is not part of the variance
    rows, columns = (torch.arange(n, device=video.device) / (2 * n) for n in (height, width))
    octave = (-torch.hypot(rows[:, None], columns).log2()).ceil().clamp(2, count + 1).long() - 2
    return video.new_zeros(len(video), count).index_add_(1, octave.flatten(), energy.flatten(1))


def trait_names(video: Tensor) -> list[str]:
    """Names of the rows of `traits`."""
    return ["contrast", "sharpness", "motion", *bands(*video.shape[-2:])]


def traits(video: Tensor, shown: int) -> Tensor:
    """Traits of the frames after the first `shown` ones: `[traits, T - shown]`."""
    ahead = video[shown:]
    return torch.stack([contrast(ahead), sharpness(ahead), motion(video[shown - 1 :]), *band_energy(ahead).T])


def slope(of_T: Tensor) -> Tensor:
    """Least-squares slope per frame along the last dimension: `[..., T] -> [...]`; 0 for a single frame."""
    at = torch.arange(of_T.shape[-1], device=of_T.device, dtype=of_T.dtype)
    at = at - at.mean()
    return (of_T * at).sum(-1) / at.square().sum().clamp_min(1)
