"""Validation before training: settings taken from the shards, every check that needs no device, and the dry run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msc.datasets.files import format_bytes, free_bytes
from msc.datasets.loading.mixture import (
    DataConfig,
    Shards,
    batches_per_round,
    check_shard_sizes,
    open_shards,
    single_set,
)
from msc.datasets.shards.index import Index
from msc.datasets.shards.remote import is_url
from msc.datasets.statistics import Statistics
from msc.datasets.text_table import text_table

from . import cost
from .checkpoints import directory as checkpoint_directory
from .checkpoints import initialize_from, pretrained
from .config import Config, dump, flat
from .diffusion.autoencoder import DIFFUSERS, open_autoencoder
from .layout_planner import layout_table
from .model.conditioning import SignalConfig
from .model.config import ModelConfig, check_clip
from .model.noise_gate import gate_constants, without_correlations
from .parallelize import check_fp8, check_parallel, clip_shape, peak_activation_bytes
from .run_folder import RunFolder


def latent_sizes(shards: Shards) -> list[tuple[int, int, int]]:
    """Frames, height and width of the latents of every bucket."""
    return [(shape.frames, shape.height, shape.width) for shape in shards.shapes]


def resolve(config: Config, index: Index) -> Config:
    """Fill in what the shards determine: channels and their moments, gate constants, labels and text.

    ValueError where the configuration contradicts them. Moments and gate constants that are set stay: a model may go on
    with those it was trained with. A published model gets latents as diffusers' autoencoder gives them.
    """
    model = config.model
    from_shards: dict[str, Any] = {
        "channels": index.channels, "classes": index.classes, "text_width": index.has_text or 0
    }  # fmt: skip
    for name, value in from_shards.items():
        if (setting := getattr(model, name)) not in (0, value):
            paths = ", ".join(shard_set.path for shard_set in config.data.sets)
            raise ValueError(f"model.{name} is {setting}, but the shards in {paths} have {value}")
    mean, std = tuple(index.statistics.mean), tuple(index.statistics.std)
    if model.layers.rope != "msc" and index.autoencoder.startswith(DIFFUSERS):
        # A published model's layers, in every stage of adapting them: autoencoders of diffusers give latents as their
        # pipeline's transformer expects them.
        mean, std = (0.0,) * index.channels, (1.0,) * index.channels
    model = replace(
        model,
        **from_shards,
        latent_mean=model.latent_mean or mean,
        latent_std=model.latent_std or std,
        gate_constants=model.gate_constants or gate_constants(model.scales, model.patch, index.statistics),
        signals=model.signals or signal_configs(config.data.signals, index),
    )
    train = replace(config.train, init_from=pretrained.absolute(config.train.init_from))
    return replace(config, model=model, data=absolute_paths(config.data), train=train)


def signal_configs(names: Sequence[str] | None, index: Index) -> tuple[SignalConfig, ...]:
    """The signals of the shards that a model takes (None: all); ValueError for a name that they do not have."""
    known = {signal.name: signal for signal in index.signals}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"data.signals has {unknown[0]!r}; the shards have {', '.join(known) or 'none'}")
    return tuple(
        SignalConfig(name, signal.kind, signal.columns, index.temporal_factor, signal.mean, signal.std)
        for name, signal in known.items()
        if names is None or name in names
    )


def absolute_paths(data: DataConfig) -> DataConfig:
    """With shards named by absolute paths, so that they are read from any working folder."""

    def absolute(path: str) -> str:
        return path if is_url(path) or not path else str(Path(path).absolute())

    if isinstance(data.shards, str):
        return replace(data, shards=absolute(data.shards))
    return replace(data, shards=tuple(replace(shard_set, path=absolute(shard_set.path)) for shard_set in data.shards))


def validate(config: Config, run: Path, resume: bool, processes: int) -> Config:
    """The resolved configuration; ValueError or OSError for every rule that can be checked before a process starts."""
    folder = RunFolder(run)
    shards = open_shards(config.data)
    if "RANK" not in os.environ:  # of several ranks the first does it (train.py)
        check_shard_sizes(shards)
    config = resolve(config, shards.index)
    check_clips(config, shards, processes)
    if config.parallel.precision == "fp8":
        for _, height, width in latent_sizes(shards):
            unit = config.model.frames_per_unit * cost.tokens_per_frame(config.model, height, width)
            check_fp8(config.parallel, unit)
    if not shards.samples("train"):
        raise ValueError(f"{shards} holds no clip to train on")
    batches_per_round(shards, "train", config.train.batch)
    if config.train.evaluate and not shards.samples("held_out"):
        raise ValueError(f"{shards} holds no held-out clip; convert with --held-out, or set train.evaluate=0")
    if not resume and not folder.has_only_startup_files():
        raise FileExistsError(f"{run} is not empty; continue it with --resume, or choose another --run")
    meta = checkpoint_directory.newest_meta(run) if resume else None
    if meta is not None:
        check_same_model(config, meta.config)
    elif resume and not folder.exists():
        raise FileNotFoundError(f"{run} has nothing to resume: no config.yaml and no checkpoint in it")
    if config.train.init_from and not (resume and checkpoint_directory.resume_candidates(run)):
        describe_initial_weights(config, shards.index)
    if (
        shards.index.store == "video"
        and not open_autoencoder(shards.index.autoencoder).slices
        and config.parallel.sp > 1
    ):
        raise ValueError(
            f"parallel.sp is {config.parallel.sp}, but video for {shards.index.autoencoder} cannot be cut along time "
            "before it is encoded; convert with --store latent"
        )
    check_room(config, run)
    return config


def check_clips(config: Config, shards: Shards, processes: int) -> int:
    """Data-parallel ranks; ValueError where the clips of a bucket do not fit the model, the mesh or the batch."""
    model, dp = config.model, 0
    for frames, height, width in latent_sizes(shards):
        check_clip(model, frames, height, width)
        dp = check_parallel(config.parallel, model, processes, frames // model.frames_per_unit)
    config.train.accumulate(dp)
    return dp


def describe_initial_weights(config: Config, index: Index) -> list[str]:
    """What a run takes from train.init_from and what not, in lines; ValueError if it cannot."""
    start = initialize_from.find_weights(Path(config.train.init_from))
    return initialize_from.describe_differences(start, config.model, index.autoencoder)


def check_room(config: Config, run: Path) -> None:
    """OSError where the checkpoints that a run will keep do not fit: the oldest goes when the next is whole."""
    saved = config.checkpoint
    size, most = 16 * cost.parameters(config.model), min(saved.keep + 1, -(-config.train.steps // saved.every))
    more = max(1, most - len(checkpoint_directory.resume_candidates(run)))
    free = free_bytes(run)
    if free < more * size:
        raise OSError(
            f"the disk of {run} has {format_bytes(free)} free; a checkpoint takes {format_bytes(size)}, and {more} "
            f"more are to come before the oldest goes (checkpoint.keep is {saved.keep}): free some, or keep fewer"
        )


# Assumed by a dry run without shards: 5 s of 512 × 512 video at 16 frames/s in a common autoencoder's latents.
ASSUMED_INDEX = Index(
    store="latent", autoencoder="assumed", temporal_factor=4, channels=16, frames=20, height=64, width=64,
    video_frames=77, video_height=512, video_width=512, fps=16.0, splits={"train": [], "held_out": []},
    statistics=Statistics.default(16), settings={},
)  # fmt: skip


def assumed_index(model: ModelConfig) -> Index:
    """Of clips that a model can take, where there are no shards yet."""
    channels = model.channels or ASSUMED_INDEX.channels
    return replace(
        ASSUMED_INDEX, channels=channels, statistics=Statistics.default(channels), has_text=model.text_width or None
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
    shards = open_shards(config.data) if config.data.shards else single_set("", assumed_index(config.model))
    if config.data.shards:
        check_shard_sizes(shards)
    config = resolve(config, shards.index)
    dp = check_clips(config, shards, processes)
    model, parallel, train, zero_stage = config.model, config.parallel, config.train, config.parallel.zero.stage
    index = costliest_index(config, shards)
    size = (index.frames, index.height, index.width)
    clip = clip_shape(model, parallel, *size)
    parameters, flops = cost.parameters(model), cost.step_flops(model, *size)
    attention = 3 * cost.attention_flops(model, *size)
    tokens = cost.tokens_per_frame(model, index.height, index.width)
    state = cost.state_bytes(parameters, zero_stage, processes, parallel.precision != "fp32")
    activations = peak_activation_bytes(model, parallel, clip, train.micro)
    whole = f"; {4 * parameters / 1e9:.2f} at the start, before sharding" if zero_stage < 3 else ""
    source = "as in data.shards" if config.data.shards else "ASSUMED, as data.shards is empty"
    if len(shards.shapes) > 1:
        source = f"the most costly of {len(shards.shapes)} buckets: {', '.join(map(str, shards.shapes))}"
    rows = [
        ("clip", source),
        ("parameters", f"{parameters:,}"),
        ("tokens per clip", f"{index.frames * tokens:,} ({index.frames} frames of {tokens:,})"),
        ("clips", f"{shards.samples('train'):,} to train on, {shards.samples('held_out'):,} held out"),
        ("steps", f"{train.steps:,} of {train.batch} clips"),
        ("processes", f"{processes} = dp {dp} × sp {parallel.sp}, {train.accumulate(dp)} micro-batches each"),
        ("training FLOPs per clip", f"{flops:.3e} ({attention / flops:.0%} attention)"),
        ("memory per process", f"about {(state + activations) / 1e9:.2f} GB (estimate): state {state / 1e9:.2f}, "
                               f"activations {activations / 1e9:.2f}{whole}"),
    ]  # fmt: skip
    if train.init_from:
        rows += [("starts from", line) for line in describe_initial_weights(config, index)]
    if parallel.sp > 1:
        rows += layout_table(model.scales, clip, parallel.sp, parallel.layout, parallel.rates)
    return dump(config) + "\n" + text_table(rows)


def costliest_index(config: Config, shards: Shards) -> Index:
    """The index of the bucket whose clips take the most FLOPs."""
    indices = (index for shard_set in shards.sets for index in shard_set.index.by_bucket())
    return max(indices, key=lambda index: cost.step_flops(config.model, index.frames, index.height, index.width))
