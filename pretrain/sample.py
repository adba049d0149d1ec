"""`msc sample`: continue a video file or a held-out clip, or start from nothing; mp4 and contact sheet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from msc.datasets.decode import frames as decode_frames
from msc.datasets.shards import read_index

from .autoencoder import to_uint8
from .diffusion import frame_shift
from .evaluate import held_out_clip
from .metrics import Tracker
from .pictures import contact_sheet, write_mp4
from .runs import Trained, open_run
from .sampler import generate


def sample_run(
    run: Path,
    video: Path | None = None,
    clip: int | None = None,
    units: int | None = None,
    context: int | None = None,
    steps: int = 16,
    seed: int = 0,
    out: Path | None = None,
    weights: str = "ema",
) -> str:
    """Generate `units` units after `context` units of `video` or of held-out clip `clip`, or after nothing.

    Defaults: half a training clip of context and as many units as complete it. Returns what was written.
    """
    trained = open_run(run, weights)
    per_unit = trained.config.model.frames_per_unit
    clip_units = trained.space.frames // per_unit
    if video is None and clip is None:
        given, truth, name = 0, None, f"nothing-seed{seed}"
    else:
        given = max(1, clip_units // 2) if context is None else context
        truth, name = read_start(trained, video, clip, given * per_unit)
    units = max(1, clip_units - given) if units is None else units

    space, model = trained.space, trained.model
    latents = torch.zeros(1, 0, model.config.channels, space.height, space.width, device=trained.device)
    if truth is not None:
        encoded = trained.autoencoder.encode(truth).to(trained.device).float()
        latents = model.normalise(encoded)[None, : given * per_unit]
    new = generate(model, latents, units, steps, seed, frame_shift(trained.config.diffusion, space.height, space.width))
    made = torch.cat([latents, *tqdm(new, total=units, desc="sample", unit="unit", disable=None)], 1)
    result = to_uint8(trained.autoencoder.decode(model.denormalise(made[0]).cpu()))

    folder = out or run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.mp4"
    write_mp4(path, result, space.fps)
    shown = len(result) * given * per_unit // made.shape[1]
    rows = [("generated" if truth is None else "continued", result)]
    contact_sheet(rows if truth is None else [("truth", truth), *rows], path.with_suffix(".png"), context=shown)
    tracker = Tracker(trained.config.metrics)
    tracker.start(run, {}, "", run.name, attach=True)
    for file in (path, path.with_suffix(".png")):
        tracker.artifact(file, "samples")
    tracker.finish("FINISHED")
    return (
        f"{shown} frames of context and {len(result) - shown} generated at {space.fps:g} frames/s "
        f"(step {trained.step}, {steps} sampling steps)\n"
        f"video          {path}\ncontact sheet  {path.with_suffix('.png')}"
    )


def read_start(trained: Trained, video: Path | None, clip: int | None, frames: int) -> tuple[Tensor, str]:
    """Video uint8 `[T, 3, H, W]` to continue, as long as it is known, and a name for what comes of it."""
    space = trained.space
    if video is not None:
        longest = trained.autoencoder.video_frames(max(frames, space.frames))
        truth = decode_frames(video, fps=space.fps, stop=longest, size=(space.video_height, space.video_width))
        name = video.stem
    else:
        assert clip is not None
        index = read_index(trained.config.data.shards)
        if not 0 <= clip < index.samples("held_out"):
            raise ValueError(f"clip {clip} does not exist; there are {index.samples('held_out')} held-out clips")
        truth, name = held_out_clip(trained, index, clip), f"clip{clip}"
    whole = trained.autoencoder.latent_frames(len(truth)) if len(truth) else 0
    if whole < frames:
        raise ValueError(
            f"{video or f'held-out clip {clip}'} has {len(truth)} frames at {space.fps:g} frames/s; a context of "
            f"{frames} latent frames needs {trained.autoencoder.video_frames(frames)}: lower --context"
        )
    return truth[: trained.autoencoder.video_frames(whole)], name
