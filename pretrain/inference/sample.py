"""`msc sample`: continue a video file or a held-out clip, or generate without context; mp4 files and a contact sheet.

Videos of any length in bounded memory: units are decoded and written as they are generated. Only the context is held
whole.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from msc.datasets.loading.dataloader import Batch
from msc.datasets.loading.held_out import held_out_clip
from msc.datasets.loading.mixture import check_shard_sizes, open_shards
from msc.datasets.video import decode_frames, frame_indices, probe

from ..batch_inputs import condition_of, latents_of
from ..config import Config
from ..diffusion.autoencoder import decode_stream, to_uint8
from ..diffusion.rectified_flow import frame_shift
from ..diffusion.sampler import Sampling, generate, limit_context
from ..diffusion.text_encoder import open_text_encoder
from ..model.conditioning import Condition
from ..requests import SampleConfig
from ..run_folder import RunFolder
from ..tracking.tracker import Tracker
from .contact_sheet import MAX_COLUMNS, write_contact_sheet
from .load import TrainedModel, open_run, read_run
from .progress import progress
from .signal_options import read_guidance, read_signals
from .video_io import partial_name, stream_mp4

log = logging.getLogger(__name__)
T = TypeVar("T")
SHEET_ROWS = 16  # videos on the contact sheet, and logged to MLflow


@dataclass(frozen=True)
class Conditions:
    """Of every video: label on the contact sheet, text embeddings `[L, E]`, class number; empty lists without."""

    videos: int
    names: list[str]
    texts: list[Tensor]
    labels: list[int]


@dataclass(frozen=True)
class Context:
    """Latents `[T', C, h, w]` as encoded, of which the first `frames` are the context; the condition of the clip."""

    name: str
    encoded: Tensor
    frames: int
    condition: Condition = field(default_factory=Condition)


def sample(run: Path, request: SampleConfig) -> str:
    """Generate videos with a run's model, in mp4 files and a contact sheet; returns what was written."""
    config, space = read_run(run)
    sampling = Sampling(
        request.steps, request.seed, 1.0, request.context_level, request.solver, request.guidance,
        read_guidance(config.model, request.signal_guidance),
    )  # fmt: skip
    steering = read_signals(config.model, request.signal, request.units)
    conditions = read_conditions(config, request)
    trained = open_run(run, request.weights)
    autoencoder, per_unit = trained.autoencoder, config.model.frames_per_unit
    context = read_context(trained, request)
    model = trained.model if request.reach is None else limit_context(trained.model, request.reach)
    steered = max(map(len, steering.values()), default=0) // per_unit
    units = request.units or steered or max(1, (space.frames - context.frames) // per_unit)
    latents = model.normalise(context.encoded[: context.frames])[None]
    sampling = replace(sampling, shift=frame_shift(config.diffusion, *latents.shape[-2:]))
    signals = dict(context.condition.signals)
    for name, value in model.normalise_signals(steering).items():
        known = signals.get(name, value.new_full((1, context.frames, value.shape[1]), torch.nan))
        signals[name] = torch.cat((known[:, : context.frames], value[None]), 1)
    shown = autoencoder.video_frames(context.frames) if context.frames else 0
    length = autoencoder.video_frames(context.frames + units * per_unit)
    every = -(-length // MAX_COLUMNS)
    sheet: list[tuple[str, Tensor]] = []
    if context.frames:
        sheet.append(("truth", to_uint8(autoencoder.decode(context.encoded.cpu()))[:length:every]))

    def to_rows(own: Tensor | None, of_clip: Tensor | None) -> Tensor | None:
        """The conditions of the current videos, or those of the clip where none were asked for."""
        if own is None:
            own = None if of_clip is None else of_clip.expand(len(rows), *of_clip.shape[1:])
        return None if own is None else own.to(trained.device)

    videos, rows = conditions.videos, range(0)
    paths, sheet_path = free_names(request.out or RunFolder(run).samples, context.name, videos)
    try:
        for first in range(0, videos, request.batch):
            rows = range(first, min(first + request.batch, videos))
            batch = slice(rows.start, rows.stop)
            texts, classes = conditions.texts[batch], conditions.labels[batch]
            context_BTCHW = latents.expand(len(rows), -1, -1, -1, -1)
            condition = Condition(
                to_rows(pad_sequence(texts, batch_first=True) if texts else None, context.condition.text),
                to_rows(torch.tensor(classes) if classes else None, context.condition.labels),
                {name: value.expand(len(rows), -1, -1).to(trained.device) for name, value in signals.items()},
            )
            new = generate(model, context_BTCHW, units, sampling, condition, rows=rows)
            name = "sample" if videos == 1 else f"sample {rows[0] + 1}-{rows[-1] + 1} of {videos}"
            parts = chain([context_BTCHW] if context.frames else [], progress(new, units, name, "unit"))
            pixels = decode_stream(autoencoder, (model.denormalise(x).cpu() for x in parts))
            for row, frames in zip(rows, write_videos(pixels, paths[batch], space.fps, every), strict=True):
                if row < SHEET_ROWS:
                    label = conditions.names[row] if conditions.names else ""
                    sheet.append((label[:32] or ("continued" if context.frames else "generated"), frames))
    except BaseException:
        partial = [path for path in map(partial_name, paths[rows.start : rows.stop]) if path.is_file()]
        for path in [*paths[: rows.start], *(path for path in partial if path.stat().st_size)]:
            log.warning("made so far: %s", path)
        raise
    write_contact_sheet(sheet, sheet_path, every=1, step=every, context=shown)
    tracker = Tracker(config.metrics)
    tracker.start(run, {}, "", run.name, attach=True)
    for file in (*paths[:SHEET_ROWS], sheet_path):
        tracker.artifact(file, "samples")
    tracker.finish("FINISHED")
    return (
        f"{shown} frames of context and {length - shown} generated at {space.fps:g} frames/s "
        f"(step {trained.step}, {request.steps} sampling steps)\n"
        f"video          {paths[0]}{f' to {paths[-1].name}' if videos > 1 else ''}\ncontact sheet  {sheet_path}"
    )


# Inputs --------------------------------------------------------------------------------------------------------


def read_conditions(config: Config, request: SampleConfig) -> Conditions:
    """The conditions of every video; ValueError where the model does not take them, or they do not fit each other."""
    model, labels, prompts, count = config.model, request.label, request.read_prompts(), request.count
    if prompts and not model.text_width:
        raise ValueError("--prompt: the model knows no text, as its clips had no captions (msc convert --text)")
    if labels and not model.classes:
        raise ValueError("--label: the model knows no classes, as its clips had no labels")
    if len(prompts) != len(labels) and min(len(prompts), len(labels)) > 1:
        raise ValueError(f"{len(prompts)} prompts and {len(labels)} labels: give as many of both, or one of either")
    if count is not None and count < max(len(prompts), len(labels)):
        raise ValueError(f"--count {count} is less than the {max(len(prompts), len(labels))} prompts or labels")
    conditioned_clip = request.context_clip is not None and (model.text_width or model.classes)
    if request.guidance != 1 and not (prompts or labels or conditioned_clip):
        raise ValueError(f"--guidance {request.guidance:g} needs something to guide by: --prompt or --label")

    texts: list[Tensor] = []
    if prompts:
        encoder = str(request.text) if request.text else open_shards(config.data).index.settings.get("text")
        if not encoder:
            raise ValueError("--prompt: the shards do not name their text encoder; name it with --text")
        embed = open_text_encoder(encoder)
        texts = [embed(prompt).float() for prompt in prompts]
        if texts[0].shape[1] != model.text_width:
            raise ValueError(
                f"the text encoder {encoder} gives embeddings of {texts[0].shape[1]} numbers, the model was trained "
                f"with {model.text_width}: name the same encoder as in msc convert --text"
            )
    classes = [class_number(config, label) for label in labels]
    videos = count or max(len(prompts), len(labels), 1)

    def one_per_video(values: Sequence[T]) -> list[T]:
        return [values[i % len(values)] for i in range(videos)] if values else []

    return Conditions(videos, one_per_video(prompts or labels), one_per_video(texts), one_per_video(classes))


def class_number(config: Config, label: str) -> int:
    """The number of a class, given by its number or by its name in the shards."""
    names = [] if label.isdecimal() else list(open_shards(config.data).index.settings.get("labels", ()))
    if label in names:
        return names.index(label)
    if not label.isdecimal() or int(label) >= config.model.classes:
        choices = f", or one of {', '.join(names[:20])}{', ...' * (len(names) > 20)}" if names else ""
        raise ValueError(f"--label {label}: it must be a number from 0 to {config.model.classes - 1}{choices}")
    return int(label)


def read_context(trained: TrainedModel, request: SampleConfig) -> Context:
    """The context to continue; ValueError where the video or clip is too short for it."""
    space, model, clip, video = trained.space, trained.model, request.context_clip, request.video
    per_unit = model.config.frames_per_unit
    units = max(1, space.frames // per_unit // 2) if request.context is None else request.context
    if video is not None:
        batch, name, source = read_video(trained, video, units * per_unit), video.stem, str(video)
    elif clip is not None:
        shards = open_shards(trained.config.data)
        check_shard_sizes(shards)
        batch = held_out_clip(shards, clip)
        name, source = f"clip{clip}", f"held-out clip {clip}"
    else:
        empty = torch.zeros(0, model.config.channels, space.height, space.width, device=trained.device)
        return Context(f"nothing-seed{request.seed}", empty, 0)
    encoded = latents_of(batch, trained.autoencoder, trained.device)[0]
    if len(encoded) < units * per_unit:
        raise ValueError(
            f"a context of {units} units needs {units * per_unit} latent frames; "
            f"{source} has {len(encoded)} at {space.fps:g} frames/s: lower --context"
        )
    return Context(name, encoded, units * per_unit, condition_of(batch, model))


def read_video(trained: TrainedModel, video: Path, frames: int) -> Batch:
    """The start of a video file: `frames` latent frames of it, or as many as a training clip has if that is more."""
    space, autoencoder = trained.space, trained.autoencoder
    length = len(frame_indices(probe(video), space.fps))
    fitting = [n for n in range(1, max(frames, space.frames) + 1) if autoencoder.video_frames(n) <= length]
    if not fitting:
        raise ValueError(f"{video} has {length} frames at {space.fps:g} frames/s, too few for one latent frame")
    stop = autoencoder.video_frames(fitting[-1])
    pixels = decode_frames(video, fps=space.fps, stop=stop, size=(space.video_height, space.video_width))
    return Batch([0], [0], [video.stem], video=pixels[None])


# Outputs -------------------------------------------------------------------------------------------------------


def free_names(folder: Path, name: str, videos: int) -> tuple[list[Path], Path]:
    """Paths of the videos and their contact sheet: NAME, or NAME-2, NAME-3, ... where files of that name exist.

    The first video's partial file is created at once, empty: a process that starts meanwhile takes another name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = name, 1
    while True:
        paths = [folder / (f"{stem}.mp4" if videos == 1 else f"{stem}-{i:04d}.mp4") for i in range(videos)]
        own = partial_name(paths[0])
        with suppress(FileExistsError):
            own.touch(exist_ok=False)
            if list(folder.glob(f"{glob.escape(stem)}[.-]*")) == [own]:
                return paths, folder / f"{stem}.png"
            own.unlink()
        number += 1
        stem = f"{name}-{number}"


def write_videos(parts: Iterable[Tensor], paths: Sequence[Path], fps: float, every: int) -> list[Tensor]:
    """Write pixels `[B, T, 3, H, W]` that come in parts to B files as they come; returns every `every`-th frame."""
    kept: list[list[Tensor]] = [[] for _ in paths]
    done = 0
    with ExitStack() as stack:
        files = [stack.enter_context(stream_mp4(path, fps)) for path in paths]
        for part in parts:
            for video, append, frames in zip(part, files, kept, strict=True):
                append(video)
                frames.append(video[-done % every :: every].clone())
            done += part.shape[1]
    return [torch.cat(frames) for frames in kept]
