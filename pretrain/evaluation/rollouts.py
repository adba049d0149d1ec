"""Clips continued from half of them, against the truth: what each adds to the tables of `msc evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch_inputs import Inputs
from ..diffusion.rectified_flow import frame_shift
from ..diffusion.sampler import generate
from ..inference.load import TrainedModel
from ..inference.preview import half_of_clip
from . import metrics
from .confidence import ClipRatios, concatenate, with_total
from .frechet import Features

Rows = dict[tuple[str, str], ClipRatios]  # what clips add, by table (or "features") and row
SCORES = {"psnr_by_horizon": metrics.psnr, "ssim_by_horizon": metrics.ssim}


@dataclass(frozen=True)
class Rollouts:
    """How clips are continued: denoising steps, samples of each clip, and the network that looks at them, if any."""

    steps: int
    samples: int
    features: Features | None = None


@torch.no_grad()
def continuations(one: TrainedModel, inputs: Inputs, seed: int, rollouts: Rollouts) -> Rows:
    """All rows of a batch of clips. The noise depends on the seed, the clip's place in the batch and the sample."""
    model = one.model
    given, units = half_of_clip(inputs.x.shape[1], model.config.frames_per_unit)
    context, shift = inputs.x[:, :given], frame_shift(one.config.diffusion, *inputs.x.shape[-2:])

    def rollout(steps: int, seed: int) -> Tensor:
        return torch.cat([context, *generate(model, context, units, steps, seed, shift, inputs.text, inputs.labels)], 1)

    def pixels(x_TCHW: Tensor) -> Tensor:
        return (one.autoencoder.decode(model.denormalise(x_TCHW)).clamp(-1, 1) + 1) / 2

    made = [rollout(rollouts.steps, seed + (k << 32)) for k in range(rollouts.samples)]
    mean = rollout(1, seed)  # a single step gives the mean of all continuations, frame by frame
    shown = one.autoencoder.video_frames(given)
    clips = [  # one at a time, and one sample of it: pixels take far more room than latents
        of_clip(pixels(inputs.x[i]), (pixels(x[i]) for x in made), pixels(mean[i]), shown, rollouts.features)
        for i in range(len(context))
    ]
    return {key: concatenate([clip[key] for clip in clips]) for key in clips[0]}


def of_clip(
    truth: Tensor, samples: Iterable[Tensor], mean: Tensor, shown: int, features: Features | None = None
) -> Rows:
    """Rows of one clip, of which the first `shown` frames were given. Videos are `[T, 3, H, W]` in [0, 1]."""
    copied = torch.cat((truth[:shown], truth[shown - 1 : shown].expand_as(truth[shown:])))
    ahead = slice(shown, None)
    scores: dict[str, list[Tensor]] = {table: [] for table in SCORES}
    traits, rows = [], Rows()
    for k, sample in enumerate(samples):
        for table, score in SCORES.items():
            scores[table].append(score(sample[ahead], truth[ahead]))
        traits.append(metrics.traits(sample, shown))
        if features is not None and k == 0:
            for name, video in {"sample": sample, "copy last": copied, "truth": truth}.items():
                seen = features(video[None])
                rows["features", name] = (seen, torch.ones_like(seen))
    for table, score in SCORES.items():
        each = torch.stack(scores[table])  # samples, horizon
        of = {"sample": each.mean(0)}
        if len(each) > 1:
            of[f"best of {len(each)}"] = each[each.mean(1).argmax()]
        of |= {"mean prediction": score(mean[ahead], truth[ahead]), "copy last": score(copied[ahead], truth[ahead])}
        of |= {f"{name} - copy last": of[name] - of["copy last"] for name in ("sample", "mean prediction")}
        rows |= {(table, name): with_total(values[None]) for name, values in of.items()}
    made, true = torch.stack(traits).mean(0), metrics.traits(truth, shown)
    return rows | {("drift", name): drift(made[i], true[i]) for i, name in enumerate(metrics.trait_names(truth))}


def drift(made: Tensor, true: Tensor) -> ClipRatios:
    """A trait of generated frames relative to that of the true ones, both `[horizon]`; in front the slope of their
    difference per frame, relative to the true one's mean."""
    sums, counts = (
        torch.cat((first[None], rest)) for first, rest in ((metrics.slope(made - true), made), (true.mean(), true))
    )
    return sums[None].double().cpu(), counts[None].double().cpu()
