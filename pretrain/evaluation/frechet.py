"""Fréchet distance between videos in the features of a network that the user brings (FVD: Unterthiner et al. 2018)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]  # video [B, T, 3, H, W] in [0, 1] -> [B, K]


def open_features(path: Path, device: torch.device) -> Features:
    """A network from a file of torch.export (.pt2) or TorchScript (.pt, .ts, .torchscript).

    Such a file is a program and is run: it must come from a trusted source. The network must take float32 video
    `[B, T, 3, H, W]` in [0, 1] and return features `[B, K]`; any resizing is its own. ValueError for a file that is
    neither, FileNotFoundError where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no feature network {path}")
    if path.suffix not in (".pt2", ".pt", ".ts", ".torchscript"):
        raise ValueError(
            f"{path} is no feature network: torch.export writes .pt2, TorchScript .pt, .ts or .torchscript"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no feature network: it is not a zip archive, or truncated")
    try:
        if path.suffix == ".pt2":
            network = torch.export.load(path).module().to(device)
        else:
            network = torch.jit.load(path, map_location=device)
    except Exception as error:  # of many types
        raise ValueError(f"{path} cannot be opened as a feature network: {_line(error, 0)}") from None

    @torch.no_grad()
    def features(video: Tensor) -> Tensor:
        try:
            output = network(video.to(device, torch.float32))
        except Exception as error:
            raise ValueError(f"{path} does not take video of {list(video.shape)}: {_line(error, -1)}") from None
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(video):
            kind = f"tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{path} made a {kind} of {len(video)} videos; features are [{len(video)}, K]")
        return output.double().cpu()

    return features


def _line(error: Exception, number: int) -> str:
    """One line of a message: torch adds traces and advice."""
    return f"{([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[number]:.300}"


def check_enough(clips: int, features: int) -> None:
    """ValueError where a covariance of `features` features cannot be estimated from so many clips."""
    if clips <= features:
        raise ValueError(
            f"a Fréchet distance over {features} features needs more than {features} clips to continue, there are "
            f"{clips}: raise --clips, hold out more, or leave out --features"
        )


def frechet(a_NK: Tensor, b_MK: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions with these samples' means and covariances.

    `|μa - μb|² + tr(Ca + Cb - 2 (Ca Cb)^½)` (Dowson & Landau 1982). Biased upwards for few samples: only distances over
    the same number of clips compare.
    """
    a, b = a_NK.double(), b_MK.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
