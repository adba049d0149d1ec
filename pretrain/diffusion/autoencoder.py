"""Between pixels and latents: `pixels` (identity), `haar` (lossless, no weights) and `diffusers:FOLDER`.

Video is `[..., T, 3, H, W]`, uint8 or float in [-1, 1]; latents are `[..., T', C, h, w]`, float32 (float64
where the video was float64). Leading dimensions are free. Nothing here keeps state between calls.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

DIFFUSERS = "diffusers:"
CHUNK, OVERLAP = 14, 28  # latent frames that `decode_stream` decodes at once, and how many it looks back


class Autoencoder(ABC):
    """What every autoencoder offers; `open_autoencoder` chooses one by its `spec`.

    channels: of a latent frame. spatial_factor: pixels per latent pixel, along height and along width.
    temporal_factor: video frames per latent frame.
    slices: True where latent frame i depends on exactly the video frames [i * temporal_factor,
        (i + 1) * temporal_factor), so that runs of frames encode and decode on their own.
    """

    spec: str
    channels: int
    spatial_factor: int
    temporal_factor: int
    slices: bool = True

    def latent_frames(self, video_frames: int) -> int:
        """Latent frames of a video of `video_frames`; ValueError where it cannot be encoded whole."""
        if video_frames < 1 or video_frames % self.temporal_factor:
            near = max(1, round(video_frames / self.temporal_factor)) * self.temporal_factor
            raise ValueError(
                f"{video_frames} video frames: the autoencoder {self.spec} needs a multiple of "
                f"{self.temporal_factor}; the nearest is {near}"
            )
        return video_frames // self.temporal_factor

    def video_frames(self, latent_frames: int) -> int:
        """Video frames that `latent_frames` decode to."""
        return latent_frames * self.temporal_factor

    def check(self, video_frames: int, height: int, width: int) -> None:
        """Raise ValueError where a video of this size cannot be encoded whole (sizes in pixels)."""
        self.latent_frames(video_frames)
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.spatial_factor:
                raise ValueError(f"{name} of {side} pixels: {self.spec} needs a multiple of {self.spatial_factor}")

    def encode(self, video: Tensor) -> Tensor:
        """Video `[..., T, 3, H, W]`, uint8 or float in [-1, 1], to latents `[..., T', C, h, w]`."""
        if video.ndim < 4 or video.shape[-3] != 3:
            raise ValueError(f"a video is [..., frames, 3, height, width]; got {list(video.shape)}")
        self.check(video.shape[-4], video.shape[-2], video.shape[-1])
        return self._encode(to_float(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[..., T', C, h, w]` to pixels `[..., T, 3, H, W]`, float in [-1, 1] but not clamped."""
        if latents.ndim < 4 or latents.shape[-3] != self.channels:
            raise ValueError(
                f"latents of {self.spec} are [..., frames, {self.channels}, height, width]; got {list(latents.shape)}"
            )
        return self._decode(latents if latents.dtype == torch.float64 else latents.float())

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


class Pixels(Autoencoder):
    """Pixels in [-1, 1] are the latents."""

    def __init__(self):
        self.spec, self.channels, self.spatial_factor, self.temporal_factor = "pixels", 3, 1, 1

    def _encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


class Haar(Autoencoder):
    """Orthonormal Haar transform of blocks of `time × space × space` pixels: energy kept, invertible.

    Channel `((i * space + j) * space + k) * 3 + c` is band i of time, j of height, k of width of colour c,
    coarsest first, so channels 0–2 are the block's mean times the root of the block's size.
    """

    def __init__(self, time: int, space: int):
        self.spec = "haar" if (time, space) == (2, 2) else f"haar:{time}x{space}x{space}"
        self.channels, self.spatial_factor, self.temporal_factor = 3 * time * space * space, space, time

    def _encode(self, pixels: Tensor) -> Tensor:
        time, space = self.temporal_factor, self.spatial_factor
        x = pixels.unflatten(-1, (-1, space)).unflatten(-3, (-1, space)).unflatten(-6, (-1, time))
        for dim in (-6, -3, -1):  # x is [..., T', time, 3, h, space, w, space]
            x = _haar(x, dim)
        lead = x.ndim - 7
        x = x.permute(*range(lead), *(lead + i for i in (0, 1, 4, 6, 2, 3, 5)))
        return x.flatten(-6, -3).contiguous()

    def _decode(self, latents: Tensor) -> Tensor:
        time, space = self.temporal_factor, self.spatial_factor
        x = latents.unflatten(-3, (time, space, space, 3))  # [..., T', time, space, space, 3, h, w]
        lead = x.ndim - 7
        x = x.permute(*range(lead), *(lead + i for i in (0, 1, 4, 5, 2, 6, 3)))
        for dim in (-6, -3, -1):
            x = _unhaar(x, dim)
        return x.flatten(-7, -6).flatten(-4, -3).flatten(-2, -1).contiguous()


def open_autoencoder(spec: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Autoencoder:
    """The autoencoder named by `spec`.

    spec: "pixels"; "haar", the same as "haar:2x2x2" (time × height × width, powers of two); or
        "diffusers:FOLDER", a folder that `diffusers` saved an autoencoder to (never downloaded).
    device, dtype: of the weights, for diffusers only; bfloat16 on a GPU and float32 elsewhere by default.
        Latents and pixels come back on the device of what went in.
    Raises ValueError for an unknown spec or unusable weights, FileNotFoundError where the folder is missing.
    """
    if spec == "pixels":
        return Pixels()
    if spec == "haar":
        return Haar(2, 2)
    if found := re.fullmatch(r"haar:(\d+)x(\d+)x(\d+)", spec):
        time, height, width = (int(number) for number in found.groups())
        for factor in (time, height, width):
            if factor < 1 or factor & (factor - 1) or factor > 64:
                raise ValueError(f"autoencoder {spec}: {factor} is not a power of two from 1 to 64")
        if height != width:
            raise ValueError(f"autoencoder {spec}: the factors of height, {height}, and width, {width}, must be equal")
        return Haar(time, height)
    if spec.startswith(DIFFUSERS) and spec != DIFFUSERS:
        from .diffusers_autoencoder import Diffusers  # which builds on this module

        return Diffusers(spec, Path(spec.removeprefix(DIFFUSERS)).expanduser(), device, dtype)
    raise ValueError(
        f'autoencoder "{spec}" is unknown; choose pixels, haar, haar:TxHxW (for example haar:2x4x4) or diffusers:FOLDER'
    )


def decode_stream(autoencoder: Autoencoder, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Video uint8 `[B, T, 3, H, W]` of latents `[B, T', C, h, w]` that come in parts, in bounded memory.

    Where latent frames decode on their own (`slices`) every part comes out as it went in, and as if decoded whole.
    Others are decoded CHUNK at a time together with the OVERLAP before them, whose pixels are thrown away: three times
    the work, CHUNK frames late, and equal to the whole only for a decoder that looks no further back, and not ahead
    (AutoencoderKLWan with random weights: to one grey level).
    """
    least, overlap = (1, 0) if autoencoder.slices else (CHUNK, OVERLAP)
    seen, recent, new = 0, None, None
    for part in chain(parts, (None,)):  # None: no more will come
        if part is not None:
            new = part if new is None else torch.cat((new, part), 1)
        while new is not None and new.shape[1] >= (1 if part is None else least):
            piece, new = new[:, :CHUNK], new[:, CHUNK:]
            whole = piece if recent is None else torch.cat((recent, piece), 1)
            known, seen = autoencoder.video_frames(seen) if seen else 0, seen + piece.shape[1]
            pixels = autoencoder.decode(whole)
            yield to_uint8(pixels[:, pixels.shape[1] - (autoencoder.video_frames(seen) - known) :])
            recent = whole[:, max(0, whole.shape[1] - overlap) :]


def to_float(video: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]; float64 stays, other floats become float32."""
    if video.dtype == torch.uint8:
        return video.float() / 127.5 - 1
    if not video.is_floating_point():
        raise ValueError(f"a video is uint8 or float in [-1, 1]; got {video.dtype}")
    return video if video.dtype == torch.float64 else video.float()


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] (clamped) to uint8 of the same shape."""
    pixels = pixels if pixels.dtype == torch.float64 else pixels.float()
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# Sums and differences rather than a matrix product: a GPU may run products in TF32, which would cost the
# exact round trip of uint8.


def _haar(x: Tensor, dim: int) -> Tensor:
    """Orthonormal Haar transform along a negative `dim` whose length is a power of two, coarsest first."""
    if x.shape[dim] == 1:
        return x
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    return torch.cat([_haar((even + odd) * 0.5**0.5, dim), (even - odd) * 0.5**0.5], dim)


def _unhaar(x: Tensor, dim: int) -> Tensor:
    """Inverse of `_haar`."""
    if x.shape[dim] == 1:
        return x
    low, high = x.chunk(2, dim)
    low = _unhaar(low, dim)
    pair = torch.stack([(low + high) * 0.5**0.5, (low - high) * 0.5**0.5], dim)  # before -1 is after dim
    return pair.flatten(dim - 1, dim)
