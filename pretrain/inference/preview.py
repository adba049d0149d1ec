"""Previews while a model trains: held-out clips continued from half of them, beside the truth."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from msc.datasets.loading.held_out import held_out_clip
from msc.datasets.loading.mixture import Shards

from ..batch_inputs import InputBuilder, condition_of, latents_of
from ..config import Config
from ..diffusion.autoencoder import to_uint8
from ..diffusion.sampler import Sampling, generate
from ..model.transformer import MSCTransformer
from .contact_sheet import write_contact_sheet
from .video_io import upscaled, write_mp4

log = logging.getLogger(__name__)
PREVIEWS = 8  # clips continued at every evaluation, one for each of the first ranks


def half_of_clip(frames: int, per_unit: int) -> tuple[int, int]:
    """(frames of context, units to generate) when a clip is continued from half of it."""
    units = frames // per_unit
    context = max(1, units // 2)
    return context * per_unit, units - context


@torch.no_grad()
def write_preview(
    model: nn.Module, config: Config, shards: Shards, builders: Sequence[InputBuilder], run: Path, step: int, rank: int
) -> list[Path]:
    """Continue a held-out clip from half of it and write it beside the truth: one clip for each of the first ranks.

    All clips have one shape: weights may be sharded, so all ranks must make the same number of forward passes.
    """
    of_one_shape = next(
        stream.clips for streams in shards.streams("held_out") for stream in streams if stream.first == 0
    )
    clip = rank % min(PREVIEWS, of_one_shape)
    batch = held_out_clip(shards, clip)
    builder = builders[batch.bucket]
    assert isinstance(model, MSCTransformer)
    x = model.normalise(latents_of(batch, builder.autoencoder, builder.device))
    context, units = half_of_clip(x.shape[1], config.model.frames_per_unit)
    condition = condition_of(batch, model).to(builder.device)
    model.eval()
    sampling = Sampling(steps=8, shift=builder.noise.shift)
    new = list(generate(model, x[:, :context], units, sampling, condition, replay=False))  # weights may be sharded
    model.train()
    if rank != clip or not new:
        return []
    continued = torch.cat([x[:, :context], *new], 1)
    truth, video = (to_uint8(builder.autoencoder.decode(model.denormalise(y[0]).cpu())) for y in (x, continued))
    name = run / "samples" / (f"step-{step:08d}" + f"-clip{clip}" * (clip > 0))
    shown = builder.autoencoder.video_frames(context)
    try:
        name.parent.mkdir(exist_ok=True)
        write_contact_sheet([("truth", truth), ("continued", video)], name.with_suffix(".png"), context=shown)
        write_mp4(name.with_suffix(".mp4"), upscaled(torch.cat([truth, video], -1)), shards.index.fps)
    except OSError as error:  # no reason to end training: on a full disk the next checkpoint fails
        log.warning("preview %s could not be written: %s", name.name, error)
        return []
    return [name.with_suffix(".png"), name.with_suffix(".mp4")]
