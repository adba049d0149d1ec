"""Autoencoders with trained weights: what `diffusers:FOLDER` opens. Nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .autoencoder import Autoencoder


class Diffusers(Autoencoder):
    """An autoencoder saved by `diffusers`, of video (AutoencoderKLWan and others) or images (AutoencoderKL).

    Encoding is deterministic (the posterior's mode) and latents come out normalised as the model's own
    pipeline does: `(z - latents_mean) / latents_std`, or `(z - shift_factor) * scaling_factor`. Autoencoders
    of video keep the first frame alone: 1 + k · temporal_factor video frames give 1 + k latent frames.
    Autoencoders of images see every frame alone. Clips go through one at a time to bound memory.
    """

    def __init__(self, spec: str, folder: Path, device: torch.device | str, dtype: torch.dtype | None):
        self.spec, self.device = spec, torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model: Any = _load(folder, self.dtype).to(self.device).eval().requires_grad_(False)
        self.image = not any(isinstance(module, torch.nn.Conv3d) for module in self.model.modules())
        self.temporal_factor = 1 if self.image else _temporal_factor(self.model, folder)
        self.slices = self.image
        # Sizes are measured, not read: the fields that name them differ from class to class, and are
        # not always true of the weights beside them.
        side, frames = 64, 1 if self.image else 1 + self.temporal_factor
        probe = self._posterior(torch.zeros(1, frames, 3, side, side))
        got, self.channels, self.spatial_factor = probe.shape[1], probe.shape[2], side // probe.shape[-1]
        if got != (1 if self.image else 2):
            raise ValueError(
                f"{folder}: {type(self.model).__name__} made {got} latent frames of {frames} video "
                "frames; only autoencoders that turn 1 + k · factor frames into 1 + k are supported"
            )
        self.mean, self.std, self.scale = _normalisation(self.model, self.channels, folder)

    def latent_frames(self, video_frames: int) -> int:
        if video_frames < 1 or (video_frames - 1) % self.temporal_factor:
            near = 1 + max(0, round((video_frames - 1) / self.temporal_factor)) * self.temporal_factor
            raise ValueError(
                f"{video_frames} video frames: the autoencoder {self.spec} keeps the first frame alone "
                f"and needs 1 + a multiple of {self.temporal_factor}; the nearest is {near}"
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
        x_BTCHW = torch.stack([self._clip(lambda x: self.model.decode(x).sample, z_TChw) for z_TChw in z_BTChw])
        return x_BTCHW.reshape(*latents.shape[:-4], *x_BTCHW.shape[1:]).to(latents.device)

    @torch.no_grad()
    def _posterior(self, x_BTCHW: Tensor) -> Tensor:
        """The posterior's mode, not normalised: float32 `[B, T', C, h, w]` on the model's device."""

        def mode(x: Tensor) -> Tensor:
            out = self.model.encode(x)
            return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent

        return torch.stack([self._clip(mode, x_TCHW) for x_TCHW in x_BTCHW])

    def _clip(self, function: Callable[[Tensor], Tensor], x_TCHW: Tensor) -> Tensor:
        """Apply the model to one clip in its own layout: frames as a batch, or as the third dimension."""
        x_TCHW = x_TCHW.to(self.device, self.dtype)
        if self.image:
            return torch.cat([function(frame) for frame in x_TCHW.split(1)]).float()
        return function(x_TCHW.transpose(0, 1)[None])[0].transpose(0, 1).float()


def _load(folder: Path, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"  # a whole pipeline was given
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: save an autoencoder there with diffusers' save_pretrained")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not an autoencoder saved by diffusers")
    try:
        from diffusers import AutoModel
    except ImportError as error:
        raise ValueError(
            f"diffusers:{folder} needs diffusers ({error}): pip install 'msc-video[autoencoders]'"
        ) from None
    try:
        # Safetensors only: the other format is a pickle, which may run code.
        return AutoModel.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,  # True needs accelerate
        )
    except Exception as error:  # diffusers raises many kinds for a folder that it cannot read
        raise ValueError(f"diffusers cannot read the autoencoder in {folder}: {error}") from error


def _temporal_factor(model: Any, folder: Path) -> int:
    for name in ("scale_factor_temporal", "temporal_compression_ratio"):
        factor = model.config.get(name) or getattr(model, name, None)
        if factor:
            return int(factor)
    raise ValueError(f"{folder}: {type(model).__name__} does not say how many frames it makes one of; not supported")


def _normalisation(model: Any, channels: int, folder: Path) -> tuple[Tensor, Tensor, float]:
    """mean `[C, 1, 1]`, std `[C, 1, 1]` and scale of `(z - mean) / std * scale`."""

    buffers = dict(model.named_buffers())

    def given(name: str) -> Any:  # LTX-Video keeps them as buffers, the others in the configuration
        return buffers[name] if name in buffers else model.config.get(name)

    def vector(name: str, default: float) -> Tensor:
        value = default if given(name) is None else given(name)
        values = torch.as_tensor(value, dtype=torch.float32, device=model.device).flatten()
        if values.numel() not in (1, channels) or not values.isfinite().all():
            raise ValueError(f"{folder}: {name} has {values.numel()} values for {channels} channels")
        return values.expand(channels)[:, None, None]

    mean = vector("shift_factor" if given("latents_mean") is None else "latents_mean", 0.0)
    return mean, vector("latents_std", 1.0), float(model.config.get("scaling_factor") or 1.0)
