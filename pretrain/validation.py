"""Before training: what the shards tell the configuration, every check that needs no device, and the dry run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from msc.datasets.files import free_bytes
from msc.datasets.loading.mixture import (
    DataConfig,
    Shards,
    batches_per_round,
    check_shard_sizes,
    open_shards,
    single_set,
)
from msc.datasets.prepare.statistics import Statistics
from msc.datasets.shards.index import Index
from msc.datasets.shards.remote import is_url

from . import cost
from .checkpoints import directory as checkpoint_directory
from .checkpoints import initialize_from
from .config import Config, dump, flat
from .diffusion.autoencoder import open_autoencoder
from .layout_planner import layout_table
from .model.config import check_clip
from .model.noise_gate import gate_constants, without_correlations
from .parallelize import check_fp8, check_parallel, clip_shape, peak_activation_bytes

# What a run that failed before its first step leaves: logs of its ranks, a last sign of life.
LEFT_BY_A_START = ("logs", "heartbeat.json", ".heartbeat.*")


def latent_sizes(shards: Shards) -> list[tuple[int, int, int]]:
    """Frames, height and width of the latents of every bucket."""
    return [(shape.frames, shape.height, shape.width) for shape in shards.shapes]


def resolve(config: Config, index: Index) -> Config:
    """Fill in what the shards know: channels, their moments, the gate's constants, labels and text.

    ValueError where the configuration says otherwise. Moments and gate constants that are given stay: a
    model may go on with those it was trained with.
    """
    known = {"channels": index.channels, "classes": index.classes, "text_width": index.has_text or 0}
    where = ", ".join(found.path for found in config.data.sets)
    for name, value in known.items():
        if (given := getattr(config.model, name)) not in (0, value):
            raise ValueError(f"model.{name} is {given}, but the shards in {where} have {value}")
    model = replace(
        config.model,
        channels=index.channels,
        classes=index.classes,
        text_width=index.has_text or 0,
        latent_mean=config.model.latent_mean or tuple(index.statistics.mean),
        latent_std=config.model.latent_std or tuple(index.statistics.std),
        gate_constants=config.model.gate_constants
        or gate_constants(config.model.scales, config.model.patch, index.statistics),
    )
    train = config.train
    if train.init_from:
        train = replace(train, init_from=str(Path(train.init_from).absolute()))
    return replace(config, model=model, data=absolute_paths(config.data), train=train)


def absolute_paths(data: DataConfig) -> DataConfig:
    """With folders named so that they are found from anywhere."""

    def where(path: str) -> str:
        return path if is_url(path) or not path else str(Path(path).absolute())

    if isinstance(data.shards, str):
        return replace(data, shards=where(data.shards))
    return replace(data, shards=tuple(replace(found, path=where(found.path)) for found in data.shards))


def validate(config: Config, run: Path, resume: bool, processes: int) -> Config:
    """Every rule that can be checked before a process starts; ValueError or OSError says what is wrong."""
    shards = open_shards(config.data)
    if "RANK" not in os.environ:  # ranks leave it to the first of them (train.py)
        check_shard_sizes(shards)
    index = shards.index
    config = resolve(config, index)
    for frames, height, width in latent_sizes(shards):
        check_clip(config.model, frames, height, width)
        dp = check_parallel(config.parallel, config.model, processes, frames // config.model.frames_per_unit)
        config.train.accumulate(dp)
        if config.parallel.precision == "fp8":
            unit = config.model.frames_per_unit * cost.tokens_per_frame(config.model, height, width)
            check_fp8(config.parallel, unit)
    if not shards.samples("train"):
        raise ValueError(f"{shards} holds no clip to train on")
    batches_per_round(shards, "train", config.train.batch)
    if config.train.evaluate and not shards.samples("held_out"):
        raise ValueError(f"{shards} holds no held-out clip; convert with --held-out, or set train.evaluate=0")
    if run.exists() and not all(any(map(path.match, LEFT_BY_A_START)) for path in run.iterdir()) and not resume:
        raise FileExistsError(f"{run} is not empty; continue it with --resume, or choose another --run")
    if resume and not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} has nothing to resume: no config.yaml in it")
    if resume and (meta := checkpoint_directory.newest_meta(run)) is not None:
        check_same_model(config, meta.config)
    if config.train.init_from and not (resume and checkpoint_directory.resume_candidates(run)):
        initialize_from.describe_differences(
            initialize_from.find_weights(Path(config.train.init_from)), config.model, index.autoencoder
        )
    if index.store == "video":
        autoencoder = open_autoencoder(index.autoencoder)
        if config.parallel.sp > 1 and not autoencoder.slices:
            raise ValueError(
                f"parallel.sp is {config.parallel.sp}, but video for {index.autoencoder} cannot be cut along time "
                "before it is encoded; convert with --store latent"
            )
    check_room(config, run)
    return config


def check_room(config: Config, run: Path) -> None:
    """OSError where the checkpoints that a run will keep do not fit: the oldest goes when the next is whole."""
    saved = config.checkpoint
    each, most = 16 * cost.parameters(config.model), min(saved.keep + 1, -(-config.train.steps // saved.every))
    more = max(1, most - len(checkpoint_directory.resume_candidates(run)))
    free = free_bytes(run)
    if free < more * each:
        raise OSError(
            f"the disk of {run} has {free / 1e9:.1f} GB free; a checkpoint takes {each / 1e9:.1f} GB, and {more} more "
            f"are to come before the oldest goes (checkpoint.keep is {saved.keep}): free some, or keep fewer"
        )


# What a dry run without shards assumes: 5 s of 512 × 512 video at 16 frames/s in a common autoencoder's latents.
ASSUMED_INDEX = Index(
    store="latent", autoencoder="assumed", temporal_factor=4, channels=16, frames=20, height=64, width=64,
    video_frames=77, video_height=512, video_width=512, fps=16.0, splits={"train": [], "held_out": []},
    statistics=Statistics.default(16), settings={},
)  # fmt: skip


def check_same_model(config: Config, before: dict[str, Any]) -> None:
    """ValueError if a run would go on with another model, seed or start than `before`, its saved flat settings."""
    now = flat(config)
    if constants := before.get("model.gate_constants"):
        before = {**before, "model.gate_constants": without_correlations(constants)}
    for name in sorted(now):
        fixed = name.startswith("model.") or name in ("train.seed", "train.init_from")
        if fixed and name in before and before[name] != now[name]:
            raise ValueError(
                f"the run was trained with {name} = {before[name]}; it cannot go on with {now[name]}. "
                "Start a new run, or leave the setting as it was"
            )


def describe(config: Config, processes: int = 1) -> str:
    """The resolved configuration and what it costs, for `--dry-run`."""
    shards = open_shards(config.data) if config.data.shards else single_set("", ASSUMED_INDEX)
    config = resolve(config, shards.index)
    for frames, height, width in latent_sizes(shards):
        check_clip(config.model, frames, height, width)
        dp = check_parallel(config.parallel, config.model, processes, frames // config.model.frames_per_unit)
    index = costliest_index(config, shards)
    accumulate = config.train.accumulate(dp)
    bf16 = config.parallel.precision != "fp32"
    count = cost.parameters(config.model)
    tokens = index.frames * cost.tokens_per_frame(config.model, index.height, index.width)
    state = cost.state_bytes(count, config.parallel.zero.stage, processes, bf16)
    clip = clip_shape(config.model, config.parallel, index.frames, index.height, index.width)
    activations = peak_activation_bytes(
        config.model, config.parallel, clip, config.train.micro, config.parallel.recompute
    )
    whole = f"; {4 * count / 1e9:.2f} at the start, before sharding" if config.parallel.zero.stage < 3 else ""
    flops = cost.step_flops(config.model, index.frames, index.height, index.width)
    attention = 3 * cost.attention_flops(config.model, index.frames, index.height, index.width)
    facts = [
        ("clip", described(shards) if config.data.shards else "ASSUMED, as data.shards is empty"),
        ("parameters", f"{count:,}"),
        ("tokens per clip", f"{tokens:,} ({index.frames} frames of {tokens // index.frames:,})"),
        ("clips", f"{shards.samples('train'):,} to train on, {shards.samples('held_out'):,} held out"),
        ("steps", f"{config.train.steps:,} of {config.train.batch} clips"),
        ("processes", f"{processes} = dp {dp} × sp {config.parallel.sp}, {accumulate} micro-batches each"),
        ("training FLOPs per clip", f"{flops:.3e} ({attention / flops:.0%} attention)"),
        ("memory per process", f"about {(state + activations) / 1e9:.2f} GB (estimate): state {state / 1e9:.2f}, "
                               f"activations {activations / 1e9:.2f}{whole}"),
    ]  # fmt: skip
    if config.train.init_from:
        start = initialize_from.find_weights(Path(config.train.init_from))
        facts += [
            ("starts from", line)
            for line in initialize_from.describe_differences(start, config.model, index.autoencoder)
        ]
    if config.parallel.sp > 1:
        facts += layout_table(
            config.model.scales, clip, config.parallel.sp, config.parallel.layout, config.parallel.rates
        )
    return dump(config) + "\n" + "\n".join(f"{name:<24} {value}" for name, value in facts)


def costliest_index(config: Config, shards: Shards) -> Index:
    """The index of the bucket whose clips take the most FLOPs."""
    every = (one for found in shards.sets for one in found.index.by_bucket())
    return max(every, key=lambda one: cost.step_flops(config.model, one.frames, one.height, one.width))


def described(shards: Shards) -> str:
    if len(shards.shapes) == 1:
        return "as in data.shards"
    return f"the most costly of {len(shards.shapes)} buckets: {', '.join(map(str, shards.shapes))}"
