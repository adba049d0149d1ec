"""`msc sample`: continue a video file or a held-out clip, or start from nothing; mp4 files and a contact sheet.

Any length in bounded memory: units are decoded and written as they come. Only the context is held whole.
"""

from __future__ import annotations

import glob
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from msc.datasets.loading.dataloader import Batch
from msc.datasets.loading.held_out import held_out_clip
from msc.datasets.loading.mixture import open_shards
from msc.datasets.video import decode_frames, frame_indices, probe

from ..batch_inputs import latents_of
from ..config import Config
from ..diffusion.autoencoder import decode_stream, to_uint8
from ..diffusion.rectified_flow import frame_shift
from ..diffusion.sampler import check_sampling, generate, limit_context
from ..diffusion.text_encoder import open_text_encoder
from ..requests import SampleConfig
from ..tracking.tracker import Tracker
from .contact_sheet import MAX_COLUMNS, write_contact_sheet
from .load import TrainedModel, open_run, read_run
from .video_io import partial_name, stream_mp4

SHEET_ROWS = 16  # videos on the contact sheet, and sent to MLflow
TELL_EVERY = 30.0  # seconds between lines on progress in a log


@dataclass(frozen=True)
class Conditions:
    """What each of some videos is to show: texts `[L, E]` and class numbers, taken in turns; empty where not asked."""

    videos: int
    names: Sequence[str] = ()
    texts: Sequence[Tensor] = ()
    labels: Sequence[int] = ()

    def text(self, rows: Sequence[int]) -> Tensor | None:
        """Of these videos, `[B, L, E]`, padded with zeros."""
        some = [self.texts[row % len(self.texts)] for row in rows] if self.texts else []
        return torch.nn.utils.rnn.pad_sequence(some, batch_first=True) if some else None

    def label(self, rows: Sequence[int]) -> Tensor | None:
        return torch.tensor([self.labels[row % len(self.labels)] for row in rows]) if self.labels else None

    def name(self, row: int) -> str:
        return self.names[row % len(self.names)] if self.names else ""


@dataclass(frozen=True)
class Start:
    """Where videos begin: latents `[T', C, h, w]` as encoded, of which the first `given` are the context, and what is
    known of them."""

    name: str
    encoded: Tensor
    given: int
    text: Tensor | None = None
    labels: Tensor | None = None


def sample(run: Path, request: SampleConfig) -> str:
    """Generate videos with a run's model, in mp4 files and a contact sheet; returns what was written."""
    steps, seed, guidance, batch = request.steps, request.seed, request.guidance, request.batch
    config, space = read_run(run)
    check_sampling(steps, seed, request.context_level, request.solver, guidance)
    prompts, labels, clip = request.read_prompts(), request.label, request.context_clip
    check_conditions(config, prompts, labels, guidance, clip is not None, request.count)
    conditions = Conditions(
        request.count or max(len(prompts), len(labels), 1), prompts or labels,
        embed(config, prompts, request.text), [number(config, label) for label in labels],
    )  # fmt: skip

    trained = open_run(run, request.weights)
    start = find_start(trained, request.video, clip, request.context, seed)
    model = trained.model if request.reach is None else limit_context(trained.model, request.reach)
    clip_units = space.frames // config.model.frames_per_unit
    units = request.units or max(1, clip_units - start.given // config.model.frames_per_unit)
    latents = model.normalise(start.encoded[: start.given])[None]
    shift = frame_shift(config.diffusion, *latents.shape[-2:])
    shown = trained.autoencoder.video_frames(start.given) if start.given else 0
    length = trained.autoencoder.video_frames(start.given + units * config.model.frames_per_unit)
    every = -(-length // MAX_COLUMNS)

    n = conditions.videos
    sheet: list[tuple[str, Tensor]] = []
    if start.given:
        sheet.append(("truth", to_uint8(trained.autoencoder.decode(start.encoded.cpu()))[:length:every]))
    paths, picture = free_names(request.out or run / "samples", start.name, n)
    rows = range(0)
    try:
        for first in range(0, n, batch):
            rows = range(first, min(first + batch, n))
            given = [conditions.text(rows), conditions.label(rows)]
            own = [start.text, start.labels]  # of the clip, where nothing else was asked for
            both = (x if x is not None else None if y is None else y.expand(len(rows), *y.shape[1:])
                    for x, y in zip(given, own, strict=True))  # fmt: skip
            words, classes = (None if x is None else x.to(trained.device) for x in both)
            context_BTCHW = latents.expand(len(rows), -1, -1, -1, -1)
            new = generate(
                model, context_BTCHW, units, steps, seed, shift, words, classes, request.context_level,
                solver=request.solver, guidance=guidance, rows=rows,
            )  # fmt: skip
            made = chain([context_BTCHW] if start.given else [], told(new, units, rows, n))
            pixels = decode_stream(trained.autoencoder, (model.denormalise(x).cpu() for x in made))
            for row, kept in zip(rows, write(pixels, [paths[row] for row in rows], space.fps, every), strict=True):
                if row < SHEET_ROWS:
                    sheet.append((conditions.name(row)[:32] or ("continued" if start.given else "generated"), kept))
    except BaseException:
        left = [path for path in (partial_name(paths[row]) for row in rows) if path.is_file() and path.stat().st_size]
        for path in [*paths[: rows.start], *left]:
            print(f"msc: made so far: {path}", file=sys.stderr)
        raise
    write_contact_sheet(sheet, picture, every=1, step=every, context=shown)
    tracker = Tracker(config.metrics)
    tracker.start(run, {}, "", run.name, attach=True)
    for file in (*paths[:SHEET_ROWS], picture):
        tracker.artifact(file, "samples")
    tracker.finish("FINISHED")
    return (
        f"{shown} frames of context and {length - shown} generated at {space.fps:g} frames/s "
        f"(step {trained.step}, {steps} sampling steps)\n"
        f"video          {paths[0]}{f' to {paths[-1].name}' if n > 1 else ''}\ncontact sheet  {picture}"
    )


# What is asked for ---------------------------------------------------------------------------------------------


def check_conditions(
    config: Config, prompts: Sequence[str], labels: Sequence[str], guidance: float, clip: bool, count: int | None
) -> None:
    """ValueError for conditions that the model does not know, or that do not fit each other."""
    model = config.model
    if prompts and not model.text_width:
        raise ValueError("--prompt: the model knows no text, as its clips had no captions (msc convert --text)")
    if labels and not model.classes:
        raise ValueError("--label: the model knows no classes, as its clips had no labels")
    if len(prompts) != len(labels) and min(len(prompts), len(labels)) > 1:
        raise ValueError(f"{len(prompts)} prompts and {len(labels)} labels: give as many of both, or one of either")
    if count is not None and count < max(len(prompts), len(labels)):
        raise ValueError(f"--count {count} is less than the {max(len(prompts), len(labels))} prompts or labels")
    known = clip and (model.text_width or model.classes)
    if guidance != 1 and not (prompts or labels or known):
        raise ValueError(f"--guidance {guidance:g} needs something to guide by: --prompt or --label")


def embed(config: Config, prompts: Sequence[str], folder: Path | None) -> list[Tensor]:
    """Embeddings `[L, E]` of the prompts, by the encoder of the shards' captions or that in `folder`."""
    if not prompts:
        return []
    name = str(folder) if folder else open_shards(config.data).index.settings.get("text")
    if not name:
        raise ValueError("--prompt: the shards do not say which text encoder they were made with; name it with --text")
    encode = open_text_encoder(name)
    texts = [encode(prompt).float() for prompt in prompts]
    if texts[0].shape[1] != config.model.text_width:
        raise ValueError(
            f"the text encoder {name} gives embeddings of {texts[0].shape[1]} numbers, the model was trained with "
            f"{config.model.text_width}: name the same encoder as in msc convert --text"
        )
    return texts


def number(config: Config, label: str) -> int:
    """Of a class, by its number or by its name in the shards."""
    names = [] if label.isdecimal() else list(open_shards(config.data).index.settings.get("labels", ()))
    if label in names:
        return names.index(label)
    if not label.isdecimal() or int(label) >= config.model.classes:
        known = f", or one of {', '.join(names[:20])}{', ...' * (len(names) > 20)}" if names else ""
        raise ValueError(f"--label {label}: it must be a number from 0 to {config.model.classes - 1}{known}")
    return int(label)


def find_start(trained: TrainedModel, video: Path | None, clip: int | None, context: int | None, seed: int) -> Start:
    """The context; ValueError where what is named is too short for it."""
    space, model = trained.space, trained.model
    if video is None and clip is None:
        nothing = torch.zeros(0, model.config.channels, space.height, space.width, device=trained.device)
        return Start(f"nothing-seed{seed}", nothing, 0)
    per_unit = model.config.frames_per_unit
    units = max(1, space.frames // per_unit // 2) if context is None else context
    if video is not None:
        batch, name = read_video(trained, video, units * per_unit), video.stem
    else:
        assert clip is not None
        batch, name = held_out_clip(open_shards(trained.config.data), clip), f"clip{clip}"
    encoded = latents_of(batch, trained.autoencoder, trained.device)[0]
    if len(encoded) < units * per_unit:
        raise ValueError(
            f"a context of {units} units needs {units * per_unit} latent frames; "
            f"{video or f'held-out clip {clip}'} has {len(encoded)} at {space.fps:g} frames/s: lower --context"
        )
    return Start(name, encoded, units * per_unit, batch.text, batch.labels)


def read_video(trained: TrainedModel, video: Path, frames: int) -> Batch:
    """The start of a video file, as many frames as make `frames` latent frames, or a training clip if it has them."""
    space, autoencoder = trained.space, trained.autoencoder
    length = len(frame_indices(probe(video), space.fps))
    fitting = [n for n in range(1, max(frames, space.frames) + 1) if autoencoder.video_frames(n) <= length]
    if not fitting:
        raise ValueError(f"{video} has {length} frames at {space.fps:g} frames/s, too few for one latent frame")
    stop = autoencoder.video_frames(fitting[-1])
    shown = decode_frames(video, fps=space.fps, stop=stop, size=(space.video_height, space.video_width))
    return Batch([0], [0], [video.stem], video=shown[None])


# What becomes of it --------------------------------------------------------------------------------------------


def free_names(folder: Path, name: str, videos: int) -> tuple[list[Path], Path]:
    """Of the videos and their contact sheet: NAME, or NAME-2, NAME-3 … where something in the folder begins so.

    The first video's partial file is made at once, empty: a process that starts meanwhile takes the next name.
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


def write(parts: Iterable[Tensor], paths: Sequence[Path], fps: float, every: int) -> list[Tensor]:
    """Write pixels `[B, T, 3, H, W]` that come in parts to B files as they come; returns every `every`-th frame."""
    kept: list[list[Tensor]] = [[] for _ in paths]
    done = 0
    with ExitStack() as stack:
        files = [stack.enter_context(stream_mp4(path, fps)) for path in paths]
        for part in parts:
            for video, append, some in zip(part, files, kept, strict=True):
                append(video)
                some.append(video[-done % every :: every].clone())
            done += part.shape[1]
    return [torch.cat(some) for some in kept]


def told(new: Iterator[Tensor], units: int, rows: range, videos: int) -> Iterator[Tensor]:
    """Pass units on and tell how far it is: by a bar on a terminal, else by a line now and then."""
    name = "sample" if videos == 1 else f"sample {rows[0] + 1}-{rows[-1] + 1} of {videos}"
    bar = tqdm(new, total=units, desc=name, unit="unit", disable=not sys.stderr.isatty())
    begun = said = time.monotonic()
    for done, unit in enumerate(bar, 1):
        yield unit
        now = time.monotonic()
        if bar.disable and (now - said > TELL_EVERY or done == units):
            said, each = now, (now - begun) / done
            left = f", {each * (units - done) / 60:.1f} min left" * (done < units)
            print(f"{name}: {done} of {units} units, {each:.3g} s each{left}", file=sys.stderr, flush=True)
