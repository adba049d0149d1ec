"""Roll-outs of an evaluation: clips continued from half of them and compared with the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch_inputs import BatchInputs
from ..diffusion.rectified_flow import frame_shift
from ..diffusion.sampler import Sampling, generate
from ..inference.load import TrainedModel
from ..inference.preview import half_of_clip
from ..model.conditioning import Condition
from . import metrics
from .confidence import ClipRatios, concatenate, with_total
from .frechet import Features
from .held_out_loss import HELD_OUT_SEED

Rows = dict[tuple[str, str], ClipRatios]  # of some clips, by table (or "features") and row
SCORES = {"psnr_by_horizon": metrics.psnr, "ssim_by_horizon": metrics.ssim}


@dataclass(frozen=True)
class Rollouts:
    """How clips are continued: denoising steps, samples of each clip, and the network for Fréchet distances, if any."""

    steps: int
    samples: int
    features: Features | None = None


@torch.no_grad()
def continuations(trained: TrainedModel, inputs: BatchInputs, clips: Sequence[int], rollouts: Rollouts) -> Rows:
    """All rows of a batch of clips. The noise depends on the clips' numbers and the sample alone."""
    model = trained.model
    known, units = half_of_clip(inputs.x.shape[1], model.config.frames_per_unit)
    context, shift = inputs.x[:, :known], frame_shift(trained.config.diffusion, *inputs.x.shape[-2:])

    def rollout(steps: int, seed: int = HELD_OUT_SEED, condition: Condition = inputs.condition) -> Tensor:
        sampling = Sampling(steps, seed, shift)
        return torch.cat([context, *generate(model, context, units, sampling, condition, rows=clips)], 1)

    def pixels(x_TCHW: Tensor) -> Tensor:
        return (trained.autoencoder.decode(model.denormalise(x_TCHW)).clamp(-1, 1) + 1) / 2

    samples = [rollout(rollouts.steps, HELD_OUT_SEED + (k << 32)) for k in range(rollouts.samples)]
    mean = rollout(1)  # a single step gives the mean of all continuations, frame by frame
    misled = None
    if inputs.condition.signals and len(clips) > 1:  # new frames under the signals of another clip of the batch
        signals = {
            name: torch.cat((value[:, :known], value[:, known:].roll(1, 0)), 1)
            for name, value in inputs.condition.signals.items()
        }
        misled = rollout(rollouts.steps, condition=replace(inputs.condition, signals=signals))
    shown = trained.autoencoder.video_frames(known)
    of_clips = []
    for i in range(len(context)):  # one at a time, and one sample of it: pixels take far more memory than latents
        others = None if misled is None else pixels(misled[i])
        videos = pixels(inputs.x[i]), (pixels(x[i]) for x in samples), pixels(mean[i])
        of_clips.append(of_clip(*videos, shown, rollouts.features, others))
    return {key: concatenate([rows[key] for rows in of_clips]) for key in of_clips[0]}


def of_clip(
    truth: Tensor,
    samples: Iterable[Tensor],
    mean: Tensor,
    shown: int,
    features: Features | None = None,
    misled: Tensor | None = None,
) -> Rows:
    """Rows of one clip, of which the first `shown` frames are context. Videos are `[T, 3, H, W]` in [0, 1]. misled: a
    sample under the signals of another clip."""
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
        if misled is not None:
            by_row["sample, others' signals"] = score(misled[shown:], truth[shown:])
            by_row["sample - others' signals"] = by_row["sample"] - by_row["sample, others' signals"]
        rows |= {(table, name): with_total(values[None]) for name, values in by_row.items()}
    sampled, true = torch.stack(traits).mean(0), metrics.traits(truth, shown)
    return rows | {("drift", name): drift(sampled[i], true[i]) for i, name in enumerate(metrics.trait_names(truth))}


def drift(sampled: Tensor, true: Tensor) -> ClipRatios:
    """A trait of generated frames relative to that of the true ones, both `[horizon]`; the first column is the slope of
    their difference per frame, relative to the true mean."""
    sums = torch.cat((metrics.slope(sampled - true)[None], sampled))
    counts = torch.cat((true.mean()[None], true))
    return sums[None].double().cpu(), counts[None].double().cpu()
