"""How good a model is: held-out loss by noise level, and continuations against the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from msc.datasets.batches import Batch, loader
from msc.datasets.mixture import Shards, Stream, only, open_shards

from .autoencoder import to_uint8
from .config import Config
from .diffusion import frame_losses, frame_shift
from .inputs import Feed, Inputs, latents_of
from .metrics import Tracker
from .model import MSCTransformer, precondition
from .pictures import contact_sheet, enlarged, write_mp4
from .runs import Trained, open_run
from .sampler import generate

BINS = 5  # equal ranges of the noise level
EACH = 4  # clips in a batch of `msc evaluate`
PREVIEWS = 8  # clips continued at every evaluation, as far as there are ranks
HELD_OUT_SEED = 1_000_003  # noise of evaluations: the same in every run and at every step


@dataclass
class Losses:
    """Squared velocity errors of supervised frames, summed by noise level; `[BINS]` sums and counts."""

    sums: Tensor
    counts: Tensor

    @staticmethod
    def zeros(device: torch.device) -> Losses:
        return Losses(*(torch.zeros(BINS, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, errors_BT: Tensor, inputs: Inputs) -> None:
        mask = inputs.supervised
        bins = (inputs.t[mask] * BINS).long().clamp(max=BINS - 1)
        self.sums.index_add_(0, bins, errors_BT[mask].double())
        self.counts.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))

    def reduce(self) -> None:
        """Sum over all ranks."""
        if torch.distributed.is_initialized():
            both = torch.stack([self.sums, self.counts])
            torch.distributed.all_reduce(both)
            self.sums, self.counts = both

    def merge(self, other: Losses) -> None:
        self.sums += other.sums
        self.counts += other.counts

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    def metrics(self, prefix: str) -> dict[str, float]:
        """Mean, and the mean in every range of noise levels that was met."""
        found = {prefix + "mean": self.mean}
        for i, (total, count) in enumerate(zip(self.sums.tolist(), self.counts.tolist(), strict=True)):
            if count:
                found[f"{prefix}t_{i / BINS:.1f}_{(i + 1) / BINS:.1f}"] = total / count
        return found


def held_out_batches(
    config: Config,
    shards: Shards,
    clips: int,
    each: int,
    rows: int = 1,
    row: int = 0,
    frames: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Batch]:
    """The first held-out clips, in order, `each` at a time and row; with several rows whole batches only.

    frames: of every bucket. Of several buckets and sets each gives its share of the clips, at least one.
    """
    for bucket, streams in enumerate(shards.streams("held_out")):
        for stream in streams:
            some = min(stream.clips, max(1, round(clips * stream.share)))
            if rows > 1:
                some = max(1, some // (rows * each)) * rows * each  # with fewer clips than rows some are seen twice
            own = None if frames is None else frames[bucket]
            yield from _held_out(stream, bucket, 0, some, rows * each, row, rows, own)


def held_out_clip(shards: Shards, clip: int) -> Batch:
    """One held-out clip, by its number over all buckets and sets."""
    for bucket, streams in enumerate(shards.streams("held_out")):
        for stream in streams:
            if stream.first <= clip < stream.first + stream.clips:
                return next(_held_out(stream, bucket, clip - stream.first, 1, 1))
    raise ValueError(f"clip {clip} does not exist; there are {shards.samples('held_out')} held-out clips")


def _held_out(
    stream: Stream, bucket: int, first: int, clips: int, each: int, row: int = 0, rows: int = 1,
    frames: tuple[int, int] | None = None,
) -> Iterator[Batch]:  # fmt: skip
    batches = loader(
        only(stream.place, stream.index), "held_out", seed=0, clock=first, clips=each, rank=row, ranks=rows,
        frames=[frames], workers=0, shuffle=False, stop=first + clips,
    )  # fmt: skip
    for batch in batches:
        yield replace(batch, bucket=bucket, samples=[stream.first + sample for sample in batch.samples])


@torch.no_grad()
def held_out_losses(
    model: nn.Module, config: Config, shards: Shards, feeds: Sequence[Feed], rows: int, row: int
) -> Losses:
    """Held-out loss of a model that may be sharded over ranks; the same noise at every call. feeds: of every bucket."""
    feeds = [replace(feed, seed=HELD_OUT_SEED, text_dropout=0.0) for feed in feeds]
    frames = [(feed.frames.start, feed.frames.stop) for feed in feeds]
    losses = Losses.zeros(feeds[0].device)
    model.eval()
    for batch in held_out_batches(config, shards, config.train.held_out, config.train.micro, rows, row, frames):
        feed = feeds[batch.bucket]
        inputs = feed(batch)
        velocity = model(inputs.noisy, inputs.t, inputs.text, inputs.labels, feed.timeline)
        losses.add(frame_losses(velocity, inputs.x, inputs.noise), inputs)
    model.train()
    losses.reduce()
    return losses


@torch.no_grad()
def preview(
    model: nn.Module, config: Config, shards: Shards, feeds: Sequence[Feed], run: Path, step: int, rank: int
) -> list[Path]:
    """Continue a held-out clip from half of it, shown beside the truth: a clip for each of the first ranks, which write
    it. Clips are of one shape: weights may be sharded, so all ranks must make equally many passes. Nothing else passes
    between them."""
    alike = next(stream.clips for streams in shards.streams("held_out") for stream in streams if stream.first == 0)
    clip = rank % min(PREVIEWS, alike)
    batch = held_out_clip(shards, clip)
    feed = feeds[batch.bucket]
    assert isinstance(model, MSCTransformer)
    x = model.normalise(latents_of(batch, feed.autoencoder).to(feed.device, torch.float32))
    given, units = half(x.shape[1], config.model.frames_per_unit)
    text, labels = (None if v is None else v.to(feed.device) for v in (batch.text, batch.labels))
    model.eval()
    new = list(generate(model, x[:, :given], units, steps=8, shift=feed.shift, text=text, labels=labels))
    model.train()
    if rank != clip or not new:
        return []
    made = torch.cat([x[:, :given], *new], 1)
    truth, video = (to_uint8(feed.autoencoder.decode(model.denormalise(y[0]).cpu())) for y in (x, made))
    name = run / "samples" / (f"step-{step:08d}" + f"-clip{clip}" * (clip > 0))
    name.parent.mkdir(exist_ok=True)
    shown = feed.autoencoder.video_frames(given)
    contact_sheet([("truth", truth), ("continued", video)], name.with_suffix(".png"), context=shown)
    write_mp4(name.with_suffix(".mp4"), enlarged(torch.cat([truth, video], -1)), shards.index.fps)
    return [name.with_suffix(".png"), name.with_suffix(".mp4")]


def half(frames: int, per_unit: int) -> tuple[int, int]:
    """(frames given, units to make) when a clip is continued from half of it."""
    units = frames // per_unit
    given = max(1, units // 2)
    return given * per_unit, units - given


# msc evaluate ----------------------------------------------------------------------------------------


def evaluate(run: Path, clips: int = 64, weights: str = "ema", steps: int = 16) -> str:
    """Held-out loss and continuation PSNR of a run's newest checkpoint; also written to evaluation.json."""
    trained = open_run(run, weights)
    config, model = trained.config, trained.model
    shards = open_shards(config.data)
    units = [shape.frames // config.model.frames_per_unit for shape in shards.shapes]
    feeds = [
        Feed(
            model, trained.autoencoder, config.diffusion, frame_shift(config.diffusion, shape.height, shape.width),
            HELD_OUT_SEED, range(all_units), all_units, 0.0, trained.device,
        )
        for shape, all_units in zip(shards.shapes, units, strict=True)
    ]  # fmt: skip
    names = ("model", "untrained", "mean velocity")
    losses = {name: Losses.zeros(trained.device) for name in names}
    clips = min(clips, shards.samples("held_out"))
    batches = held_out_batches(config, shards, clips, EACH)
    continued: list[dict[str, Tensor]] = []
    for batch in tqdm(batches, total=-(-clips // EACH), desc="evaluate", unit="batch", disable=None):
        inputs = feeds[batch.bucket](batch)
        with torch.no_grad():
            velocity = model(inputs.noisy, inputs.t, inputs.text, inputs.labels)
        guesses = {
            "model": velocity,
            "untrained": precondition(inputs.noisy, inputs.t, torch.zeros_like(inputs.x)),
            "mean velocity": torch.zeros_like(inputs.x),  # the mean over noise and normalised data
        }
        for name, guess in guesses.items():
            losses[name].add(frame_losses(guess, inputs.x, inputs.noise), inputs)
        # horizons are those of the first bucket: clips of other lengths have others
        if batch.bucket == 0 and half(shards.index.frames, config.model.frames_per_unit)[1]:
            continued.append(continue_clips(trained, inputs, steps))

    psnr = {
        name: [round(float(v), 2) for v in torch.cat([c[name] for c in continued]).mean(0)]
        for name in (continued[0] if continued else ())
    }
    result = {
        "step": trained.step,
        "clock": trained.clock,
        "weights": weights,
        "clips": clips,
        "loss": {name: losses[name].mean for name in names},
        "loss_by_noise": {name: losses[name].metrics("") for name in names},
        "psnr_by_horizon": psnr,
        "sampling_steps": steps,
    }
    (run / "evaluation.json").write_text(json.dumps(result, indent=1))
    tracker = Tracker(config.metrics)
    tracker.start(run, {}, "", run.name, attach=True)
    tracker.log(losses["model"].metrics("quality/loss_"), trained.step)
    tracker.log(
        {f"quality/psnr_1_{name.replace(' ', '_')}": values[0] for name, values in psnr.items()},
        trained.step,
    )
    tracker.artifact(run / "evaluation.json")
    tracker.finish("FINISHED")
    return report(result)


@torch.no_grad()
def continue_clips(trained: Trained, inputs: Inputs, steps: int) -> dict[str, Tensor]:
    """PSNR by horizon `[B, horizon]` (video frames) of continuing the first half of clips, by method."""
    model, space = trained.model, trained.space
    given, units = half(inputs.x.shape[1], model.config.frames_per_unit)
    context, shift = inputs.x[:, :given], frame_shift(trained.config.diffusion, space.height, space.width)

    def pixels(x: Tensor) -> Tensor:
        return trained.autoencoder.decode(model.denormalise(x).cpu()).clamp(-1, 1)

    def rollout(steps: int) -> Tensor:
        new = generate(model, context, units, steps, HELD_OUT_SEED, shift, inputs.text, inputs.labels)
        return torch.cat([context, *new], 1)

    truth, shown = pixels(inputs.x), trained.autoencoder.video_frames(given)
    repeated = truth[:, shown - 1 : shown].expand_as(truth)
    videos = {"mean prediction": pixels(rollout(1)), "sample": pixels(rollout(steps)), "copy last": repeated}
    return {name: psnr(video[:, shown:], truth[:, shown:]) for name, video in videos.items()}


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1]: `[B, T, 3, H, W]` twice -> `[B, T]`."""
    return 10 * torch.log10(4 / (a - b).square().mean((2, 3, 4)).clamp_min(1e-10))


def report(result: dict) -> str:
    """The evaluation as text."""
    lines = [f"step {result['step']}, {result['clips']} held-out clips, {result['weights']} weights"]
    bins = [key for key in result["loss_by_noise"]["model"] if key != "mean"]
    lines.append(f"{'held-out loss':<18}{'mean':>9}" + "".join(f"{key.replace('_', ' '):>12}" for key in bins))
    for name, values in result["loss_by_noise"].items():
        lines.append(f"{name:<18}{values['mean']:>9.4f}" + "".join(f"{values.get(k, math.nan):>12.4f}" for k in bins))
    if not result["psnr_by_horizon"]:
        return "\n".join([*lines, "clips of a single unit leave nothing to continue: no PSNR"])
    horizons = range(1, 1 + len(result["psnr_by_horizon"]["copy last"]))
    lines.append(f"{'PSNR (dB)':<18}" + "".join(f"{f'h={h}':>8}" for h in horizons))
    for name, values in result["psnr_by_horizon"].items():
        lines.append(f"{name:<18}" + "".join(f"{value:>8.2f}" for value in values))
    gained = result["psnr_by_horizon"]["mean prediction"][0] - result["psnr_by_horizon"]["copy last"][0]
    lines.append(f"the model's mean prediction is {gained:+.2f} dB from repeating the last frame at horizon 1")
    return "\n".join(lines)
