"""`msc sample`: continue a video file or a held-out clip, or start from nothing; mp4 and contact sheet."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from msc.datasets.batches import Batch
from msc.datasets.decode import frames as decode_frames
from msc.datasets.decode import probe, timeline
from msc.datasets.mixture import open_shards

from .autoencoder import to_uint8
from .diffusion import frame_shift
from .held_out import held_out_clip
from .inputs import latents_of
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
    space, model = trained.space, trained.model
    text = labels = truth = None
    if video is None and clip is None:
        given, name = 0, f"nothing-seed{seed}"
        latents = torch.zeros(1, 0, model.config.channels, space.height, space.width, device=trained.device)
    else:
        given = max(1, clip_units // 2) if context is None else context
        if video is not None:
            start, name = read_video(trained, video, given * per_unit), video.stem
        else:
            assert clip is not None
            start, name = read_clip(trained, clip), f"clip{clip}"
        encoded = latents_of(start, trained.autoencoder)[0].to(trained.device, torch.float32)
        if len(encoded) < given * per_unit:
            raise ValueError(
                f"a context of {given} units needs {given * per_unit} latent frames; "
                f"{video or f'held-out clip {clip}'} has {len(encoded)} at {space.fps:g} frames/s: lower --context"
            )
        latents = model.normalise(encoded)[None, : given * per_unit]
        text, labels = (None if v is None else v.to(trained.device) for v in (start.text, start.labels))
        truth = to_uint8(trained.autoencoder.decode(encoded.cpu()))
    units = max(1, clip_units - given) if units is None else units
    shift = frame_shift(trained.config.diffusion, *latents.shape[-2:])
    new = generate(model, latents, units, steps, seed, shift, text, labels)
    made = torch.cat([latents, *tqdm(new, total=units, desc="sample", unit="unit", disable=None)], 1)
    result = to_uint8(trained.autoencoder.decode(model.denormalise(made[0]).cpu()))

    folder = out or run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.mp4"
    write_mp4(path, result, space.fps)
    shown = trained.autoencoder.video_frames(given * per_unit) if given else 0
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


def read_clip(trained: Trained, clip: int) -> Batch:
    """One held-out clip."""
    return held_out_clip(open_shards(trained.config.data), clip)


def read_video(trained: Trained, video: Path, frames: int) -> Batch:
    """The start of a video file, as many frames as make `frames` latent frames, or a training clip if it has them."""
    space, autoencoder = trained.space, trained.autoencoder
    length = len(timeline(probe(video), space.fps))
    fitting = [n for n in range(1, max(frames, space.frames) + 1) if autoencoder.video_frames(n) <= length]
    if not fitting:
        raise ValueError(f"{video} has {length} frames at {space.fps:g} frames/s, too few for one latent frame")
    stop = autoencoder.video_frames(fitting[-1])
    shown = decode_frames(video, fps=space.fps, stop=stop, size=(space.video_height, space.video_width))
    return Batch([0], [0], [video.stem], video=shown[None])
