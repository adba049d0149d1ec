"""Roll-outs of an evaluation: clips continued from half of them and compared with the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch_inputs import BatchInputs
from ..diffusion.rectified_flow import frame_shift
from ..diffusion.sampler import Sampling, generate
from ..inference.load import TrainedModel
from ..inference.preview import half_of_clip
from . import metrics
from .confidence import ClipRatios, concatenate, with_total
from .frechet import Features

Rows = dict[tuple[str, str], ClipRatios]  # of some clips, by table (or "features") and row
SCORES = {"psnr_by_horizon": metrics.psnr, "ssim_by_horizon": metrics.ssim}


@dataclass(frozen=True)
class Rollouts:
    """How clips are continued: denoising steps, samples of each clip, and the network for Fréchet distances, if any."""

    steps: int
    samples: int
    features: Features | None = None


@torch.no_grad()
def continuations(trained: TrainedModel, inputs: BatchInputs, seed: int, rollouts: Rollouts) -> Rows:
    """All rows of a batch of clips. The noise depends on the seed, the clip's place in the batch and the sample."""
    model = trained.model
    known, units = half_of_clip(inputs.x.shape[1], model.config.frames_per_unit)
    context, shift = inputs.x[:, :known], frame_shift(trained.config.diffusion, *inputs.x.shape[-2:])

    def rollout(steps: int, seed: int) -> Tensor:
        sampling = Sampling(steps, seed, shift)
        return torch.cat([context, *generate(model, context, units, sampling, inputs.condition)], 1)

    def pixels(x_TCHW: Tensor) -> Tensor:
        return (trained.autoencoder.decode(model.denormalise(x_TCHW)).clamp(-1, 1) + 1) / 2

    samples = [rollout(rollouts.steps, seed + (k << 32)) for k in range(rollouts.samples)]
    mean = rollout(1, seed)  # a single step gives the mean of all continuations, frame by frame
    shown = trained.autoencoder.video_frames(known)
    clips = [  # one at a time, and one sample of it: pixels take far more memory than latents
        of_clip(pixels(inputs.x[i]), (pixels(x[i]) for x in samples), pixels(mean[i]), shown, rollouts.features)
        for i in range(len(context))
    ]
    return {key: concatenate([clip[key] for clip in clips]) for key in clips[0]}


def of_clip(
    truth: Tensor, samples: Iterable[Tensor], mean: Tensor, shown: int, features: Features | None = None
) -> Rows:
    """Rows of one clip, of which the first `shown` frames are context. Videos are `[T, 3, H, W]` in [0, 1]."""
    copied = torch.cat((truth[:shown], truth[shown - 1 : shown].expand_as(truth[shown:])))
    scores: dict[str, list[Tensor]] = {table: [] for table in SCORES}
    traits, rows = [], Rows()
    for k, sample in enumerate(samples):
        for table, score in SCORES.items():
            scores[table].append(score(sample[shown:], truth[shown:]))
        traits.append(metrics.traits(sample, shown))
        if features is not None and k == 0:
            for name, video in {"sample": sample, "copy last": copied, "truth": truth}.items():
                values = features(video[None])
                rows["features", name] = (values, torch.ones_like(values))
    for table, score in SCORES.items():
        by_sample = torch.stack(scores[table])  # [samples, horizon]
        by_row = {"sample": by_sample.mean(0)}
        if len(by_sample) > 1:
            by_row[f"best of {len(by_sample)}"] = by_sample[by_sample.mean(1).argmax()]
        by_row |= {name: score(video[shown:], truth[shown:])
                   for name, video in {"mean prediction": mean, "copy last": copied}.items()}  # fmt: skip
        by_row |= {f"{name} - copy last": by_row[name] - by_row["copy last"] for name in ("sample", "mean prediction")}
        rows |= {(table, name): with_total(values[None]) for name, values in by_row.items()}
    sampled, true = torch.stack(traits).mean(0), metrics.traits(truth, shown)
    return rows | {("drift", name): drift(sampled[i], true[i]) for i, name in enumerate(metrics.trait_names(truth))}


def drift(sampled: Tensor, true: Tensor) -> ClipRatios:
    """A trait of generated frames relative to that of the true ones, both `[horizon]`; the first column is the slope of
    their difference per frame, relative to the true mean."""
    sums = torch.cat((metrics.slope(sampled - true)[None], sampled))
    counts = torch.cat((true.mean()[None], true))
    return sums[None].double().cpu(), counts[None].double().cpu()
