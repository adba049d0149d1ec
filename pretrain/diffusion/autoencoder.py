"""Autoencoders between pixels and latents: `pixels` (identity), `haar` (lossless, no weights), `diffusers:FOLDER`.

Video is `[..., T, 3, H, W]`, uint8 or float in [-1, 1]; latents are `[..., T', C, h, w]`, float32 (float64
where the video was float64). Leading dimensions are free. Nothing here keeps state between calls.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIFFUSERS = "diffusers:"
CHUNK, OVERLAP = 14, 28  # latent frames that `decode_stream` decodes at once, and frames of context before them


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
            nearest = max(1, round(video_frames / self.temporal_factor)) * self.temporal_factor
            raise ValueError(
                f"{video_frames} video frames: the autoencoder {self.spec} needs a multiple of "
                f"{self.temporal_factor}; the nearest is {nearest}"
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


def open_autoencoder(spec: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Autoencoder:
    """The autoencoder named by `spec`.

    spec: "pixels"; "haar", the same as "haar:2x2x2" (time × height × width, powers of two); or
        "diffusers:FOLDER", a folder that `diffusers` saved an autoencoder to (never downloaded).
    device, dtype: of the weights, for diffusers only; bfloat16 on a GPU and float32 elsewhere by default.
        Latents and pixels come back on the device of the input.
    Raises ValueError for an unknown spec or unusable weights, FileNotFoundError where the folder is missing.
    """
    if spec == "pixels":
        return Pixels()
    if match := re.fullmatch(r"haar:(\d+)x(\d+)x(\d+)", "haar:2x2x2" if spec == "haar" else spec):
        time, height, width = map(int, match.groups())
        for factor in (time, height, width):
            if factor < 1 or factor & (factor - 1) or factor > 64:
                raise ValueError(f"autoencoder {spec}: {factor} is not a power of two from 1 to 64")
        if height != width:
            raise ValueError(f"autoencoder {spec}: the factors of height, {height}, and width, {width}, must be equal")
        return Haar(time, height)
    if spec.startswith(DIFFUSERS) and spec != DIFFUSERS:
        return Diffusers(spec, device, dtype)
    raise ValueError(
        f'autoencoder "{spec}" is unknown; choose pixels, haar, haar:TxHxW (for example haar:2x4x4) or diffusers:FOLDER'
    )


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
            x = _inverse_haar(x, dim)
        return x.flatten(-7, -6).flatten(-4, -3).flatten(-2, -1).contiguous()


# Sums and differences rather than a matrix product: a GPU may run products in TF32, which would cost the
# exact round trip of uint8.


def _haar(x: Tensor, dim: int) -> Tensor:
    """Orthonormal Haar transform along a negative `dim` whose length is a power of two, coarsest first."""
    if x.shape[dim] == 1:
        return x
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    return torch.cat([_haar((even + odd) * 0.5**0.5, dim), (even - odd) * 0.5**0.5], dim)


def _inverse_haar(x: Tensor, dim: int) -> Tensor:
    if x.shape[dim] == 1:
        return x
    low, high = x.chunk(2, dim)
    low = _inverse_haar(low, dim)
    pair = torch.stack([(low + high) * 0.5**0.5, (low - high) * 0.5**0.5], dim)  # before -1 is after dim
    return pair.flatten(dim - 1, dim)


class Diffusers(Autoencoder):
    """An autoencoder saved by `diffusers`, of video (AutoencoderKLWan and others) or images (AutoencoderKL).

    Encoding is deterministic (the posterior's mode) and latents are normalised as the model's own pipeline does:
    `(z - latents_mean) / latents_std`, or `(z - shift_factor) * scaling_factor`. Autoencoders of video keep the first
    frame alone: 1 + k · temporal_factor video frames give 1 + k latent frames. Autoencoders of images encode every
    frame on its own. Clips go through one at a time to bound memory.
    """

    def __init__(self, spec: str, device: torch.device | str, dtype: torch.dtype | None):
        self.spec, self.device = spec, torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        folder = Path(spec.removeprefix(DIFFUSERS)).expanduser()
        self.model: Any = _load_diffusers(folder, self.dtype).to(self.device).eval().requires_grad_(False)
        kind, settings = type(self.model).__name__, self.model.config
        self.image = not any(isinstance(module, torch.nn.Conv3d) for module in self.model.modules())
        names = ("scale_factor_temporal", "temporal_compression_ratio")
        factors = [1] if self.image else [settings.get(name) or getattr(self.model, name, None) for name in names]
        if not any(factors):
            raise ValueError(f"{folder}: {kind} has no {' or '.join(names)}, so it is not supported")
        self.temporal_factor, self.slices = int(next(filter(None, factors))), self.image

        # Sizes are measured, not read: the fields that name them differ from class to class, and do not always
        # match the weights.
        side, frames = 64, 1 if self.image else 1 + self.temporal_factor
        probe = self._posterior(torch.zeros(1, frames, 3, side, side))
        latent_frames, self.channels, self.spatial_factor = probe.shape[1], probe.shape[2], side // probe.shape[-1]
        if latent_frames != (1 if self.image else 2):
            raise ValueError(
                f"{folder}: {kind} made {latent_frames} latent frames of {frames} video frames; only autoencoders that "
                "turn 1 + k · factor frames into 1 + k are supported"
            )

        # Of (z - mean) / std * scale; LTX-Video keeps the vectors as buffers, the others in the configuration.
        vectors = {**settings, **dict(self.model.named_buffers())}

        def vector(name: str, default: float) -> Tensor:
            value = default if vectors.get(name) is None else vectors[name]
            values = torch.as_tensor(value, dtype=torch.float32, device=self.device).flatten()
            if values.numel() not in (1, self.channels) or not values.isfinite().all():
                raise ValueError(f"{folder}: {name} has {values.numel()} values for {self.channels} channels")
            return values.expand(self.channels)[:, None, None]

        self.mean = vector("shift_factor" if vectors.get("latents_mean") is None else "latents_mean", 0.0)
        self.std, self.scale = vector("latents_std", 1.0), float(settings.get("scaling_factor") or 1.0)

    def latent_frames(self, video_frames: int) -> int:
        if video_frames < 1 or (video_frames - 1) % self.temporal_factor:
            nearest = 1 + max(0, round((video_frames - 1) / self.temporal_factor)) * self.temporal_factor
            raise ValueError(
                f"{video_frames} video frames: the autoencoder {self.spec} keeps the first frame alone "
                f"and needs 1 + a multiple of {self.temporal_factor}; the nearest is {nearest}"
            )
        return 1 + (video_frames - 1) // self.temporal_factor

    def video_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.temporal_factor

    def _encode(self, pixels: Tensor) -> Tensor:
        z_BTChw = self._posterior(pixels.reshape(-1, *pixels.shape[-4:]))
        z_BTChw = (z_BTChw - self.mean) / self.std * self.scale
        return z_BTChw.reshape(*pixels.shape[:-4], *z_BTChw.shape[1:]).to(pixels.device)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        z_BTChw = latents.reshape(-1, *latents.shape[-4:]).to(self.device, torch.float32)
        z_BTChw = z_BTChw / self.scale * self.std + self.mean
        x_BTCHW = torch.stack([self._apply(lambda x: self.model.decode(x).sample, z_TChw) for z_TChw in z_BTChw])
        return x_BTCHW.reshape(*latents.shape[:-4], *x_BTCHW.shape[1:]).to(latents.device)

    @torch.no_grad()
    def _posterior(self, x_BTCHW: Tensor) -> Tensor:
        """The posterior's mode, not normalised: float32 `[B, T', C, h, w]` on the model's device."""

        def mode(x: Tensor) -> Tensor:
            out = self.model.encode(x)
            return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent

        return torch.stack([self._apply(mode, x_TCHW) for x_TCHW in x_BTCHW])

    def _apply(self, function: Callable[[Tensor], Tensor], x_TCHW: Tensor) -> Tensor:
        """Apply the model to one clip in its own layout: frames as a batch, or as the third dimension."""
        x_TCHW = x_TCHW.to(self.device, self.dtype)
        if self.image:
            return torch.cat([function(frame) for frame in x_TCHW.split(1)]).float()
        return function(x_TCHW.transpose(0, 1)[None])[0].transpose(0, 1).float()


def _load_diffusers(folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder of diffusers, or in the `vae` of a whole pipeline."""
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: save an autoencoder there with diffusers' save_pretrained")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not an autoencoder saved by diffusers")
    try:
        from diffusers import AutoModel
    except ImportError as error:
        raise ValueError(
            f"{DIFFUSERS}{folder} needs diffusers ({error}): pip install 'msc-video[autoencoders]'"
        ) from None
    try:
        return AutoModel.from_pretrained(
            str(folder), local_files_only=True, torch_dtype=dtype,
            use_safetensors=True,  # the other format is a pickle, which may run code
            low_cpu_mem_usage=False,  # True needs accelerate
        )  # fmt: skip
    except Exception as error:  # diffusers raises many kinds for a folder that it cannot read
        raise ValueError(f"diffusers cannot read the autoencoder in {folder}: {error}") from error


def decode_stream(autoencoder: Autoencoder, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Video uint8 `[B, T, 3, H, W]` of latents `[B, T', C, h, w]` that come in parts, in bounded memory.

    Where latent frames decode on their own (`slices`) every part is decoded as it comes, with the same result as the
    whole. Others are decoded CHUNK at a time together with the OVERLAP before them, whose pixels are dropped: three
    times the work, CHUNK frames late, and equal to the whole only for a decoder of no longer and only past context
    (AutoencoderKLWan with random weights: to one grey level).
    """
    least, overlap = (1, 0) if autoencoder.slices else (CHUNK, OVERLAP)
    done, recent, new = 0, None, None
    for part in chain(parts, (None,)):  # None: no more will come
        if part is not None:
            new = part if new is None else torch.cat((new, part), 1)
        while new is not None and new.shape[1] >= (1 if part is None else least):
            chunk, new = new[:, :CHUNK], new[:, CHUNK:]
            window = chunk if recent is None else torch.cat((recent, chunk), 1)
            first = autoencoder.video_frames(done) if done else 0
            done += chunk.shape[1]
            pixels = autoencoder.decode(window)
            yield to_uint8(pixels[:, pixels.shape[1] - (autoencoder.video_frames(done) - first) :])
            recent = window[:, max(0, window.shape[1] - overlap) :]


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
