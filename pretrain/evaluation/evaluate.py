"""`msc evaluate`: held-out loss and roll-outs of a run with confidence intervals (docs/evaluation.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msc.datasets.files import write_atomically
from msc.datasets.loading.held_out import held_out_batches, held_out_counts
from msc.datasets.loading.mixture import Shards, check_shard_sizes, open_shards

from .. import cost
from ..batch_inputs import BatchInputs, InputBuilder, NoiseSource
from ..diffusion.loss import Loss
from ..diffusion.rectified_flow import DiffusionConfig
from ..inference.load import TrainedModel, open_run
from ..inference.preview import half_of_clip
from ..inference.progress import progress
from ..model.config import check_clip
from ..model.output import precondition
from ..requests import EvaluateConfig
from ..run_folder import RunFolder
from ..tracking.tracker import Tracker
from .confidence import OTHER_RUN, Table, concatenate, draw
from .frechet import check_enough, frechet, open_features
from .held_out_loss import BIN_NAMES, BINS, HELD_OUT_SEED, by_context, by_noise, by_position
from .rollouts import Rollouts, Rows, continuations

LEAST_CLIPS, MOST_CLIPS = 4, 128  # of a batch
VALUES = {"cpu": 1 << 25, "cuda": 1 << 28}  # tokens x width of a batch, by device: some 10 GB on a GPU


@dataclass(frozen=True)
class TableKind:
    """What a table shows; total: name of its first column."""

    title: str
    axis: str
    unit: str
    digits: int
    total: str = "mean"


TABLES = {
    "loss_by_noise": TableKind("held-out loss by noise level", "noise level t", "squared velocity error", 4),
    "loss_by_position": TableKind("held-out loss by position", "latent frame", "squared velocity error", 4),
    "loss_by_context": TableKind(
        "last unit, clean past: loss, and what hiding the past or exchanging a signal adds", "noise level t", "loss", 4
    ),
    "psnr_by_horizon": TableKind("continuations: PSNR", "frames ahead", "dB", 2),
    "ssim_by_horizon": TableKind("continuations: SSIM", "frames ahead", "1: identical", 3),
    "drift": TableKind("continuations: drift", "frames ahead", "sample / truth; slope: per frame", 3, "slope"),
}
BASELINES = ("untrained", "mean velocity", "copy last", "truth")  # rows that do not depend on the trained model


def evaluate(run: Path, request: EvaluateConfig) -> str:
    """Measure a run on its first held-out clips: the report as text, also kept in the run folder.

    Files of a chosen checkpoint carry its step. After Ctrl-C the results are those of the clips so far.
    """
    trained = open_run(run, request.weights, request.checkpoint)
    shards = open_shards(trained.config.data)
    check_shard_sizes(shards)
    models = {"": trained}
    if request.against is not None:
        models[OTHER_RUN] = open_run(request.against, request.weights)
        check_comparable(trained, models[OTHER_RUN], shards)
    network = None if request.features is None else open_features(request.features, trained.device)
    rollouts = Rollouts(request.steps, request.samples, network)
    batches, clips, interrupted = measure_clips(models, shards, request.clips, rollouts)

    keys = dict.fromkeys(key for rows in batches for key in rows)
    rows = with_differences({key: concatenate([batch[key] for batch in batches if key in batch]) for key in keys})
    tables = {name: table_of(name, rows) for name in TABLES if name in {table for table, _ in rows}}
    features = {row: values for (table, row), (values, _) in rows.items() if table == "features"}
    result = {
        "step": trained.step,
        "clock": trained.clock,
        "weights": request.weights,
        "clips": clips,
        "interrupted": interrupted,
        "sampling_steps": request.steps,
        "samples": request.samples,
        "against": request.against and {"run": str(request.against), "step": models[OTHER_RUN].step},
        "loss": {name: row["mean"][0] for name, row in tables["loss_by_noise"].json()["rows"].items()},
        "frechet": distances(features) if request.features else None,
        "tables": {name: table.json() for name, table in tables.items()},
    }
    text = report(run, result, tables)
    keep(run, trained, None if request.checkpoint is None else trained.step, result, tables, text)
    return text


def check_comparable(one: TrainedModel, other: TrainedModel, shards: Shards) -> None:
    """ValueError where two models cannot be measured on the same latents with the same noise."""
    for name in ("channels", "frames_per_unit", "latent_mean", "latent_std"):
        a, b = getattr(one.config.model, name), getattr(other.config.model, name)
        if a != b:
            raise ValueError(f"the runs cannot be compared: their model.{name} is {a} and {b}")
    if one.space.autoencoder != other.space.autoencoder:
        raise ValueError(
            f"the runs cannot be compared: their autoencoders are {one.space.autoencoder} and {other.space.autoencoder}"
        )
    for shape in shards.shapes:
        check_clip(other.config.model, shape.frames, shape.height, shape.width)


def input_builders(trained: TrainedModel, diffusion: DiffusionConfig, shards: Shards) -> list[InputBuilder]:
    """Builders of the inputs, one for every bucket; noise and noise levels do not depend on the model."""
    return [
        InputBuilder(
            model=trained.model,
            autoencoder=trained.autoencoder,
            noise=NoiseSource(
                diffusion,
                HELD_OUT_SEED,
                (shape.frames, shape.height, shape.width),
                trained.config.model.channels,
                trained.config.model.frames_per_unit,
                units=range(shape.frames // trained.config.model.frames_per_unit),
            ),
            device=trained.device,
        )
        for shape in shards.shapes
    ]


def measure_clips(
    models: dict[str, TrainedModel], shards: Shards, limit: int, rollouts: Rollouts
) -> tuple[list[Rows], int, bool]:
    """The rows of every batch of held-out clips, the number of clips, and whether Ctrl-C ended it early.

    models: by the prefix of their rows. Only clips of one bucket are continued, as others have other horizons.
    """
    counts = [sum(counts) for counts in held_out_counts(shards, min(limit, shards.samples("held_out")))]  # by bucket
    if not sum(counts):
        raise ValueError(f"{shards} holds no held-out clip: convert with --held-out")
    continued = next(bucket for bucket, count in enumerate(counts) if count)
    diffusion = models[""].config.diffusion
    builders = {prefix: input_builders(trained, diffusion, shards) for prefix, trained in models.items()}
    batches: list[Rows] = []
    clips = 0
    loaded = (batch for batch, _ in held_out_batches(shards, sum(counts), clips_at_once(models[""], shards)))
    try:
        for batch in progress(loaded, sum(counts), "evaluate", "clip", lambda batch: len(batch.samples)):
            rows: Rows = {}
            for prefix, trained in models.items():
                inputs = builders[prefix][batch.bucket](batch)
                measured = measure(trained, inputs, batch.samples, rollouts if batch.bucket == continued else None)
                rows |= {(table, prefix + row): ratios for (table, row), ratios in measured.items()
                         if not (prefix and row in BASELINES)}  # fmt: skip
            if not batches and ("features", "truth") in rows:
                check_enough(counts[continued], rows["features", "truth"][0].shape[1])
            batches.append(rows)
            clips += len(batch.samples)
    except KeyboardInterrupt:
        if not batches:
            raise
        return batches, clips, True
    return batches, clips, False


def clips_at_once(trained: TrainedModel, shards: Shards) -> int:
    """As many as VALUES activations allow: on a GPU a roll-out of few takes as long as one of many."""
    model = trained.config.model
    tokens = max(shape.frames * cost.tokens_per_frame(model, shape.height, shape.width) for shape in shards.shapes)
    return min(max(LEAST_CLIPS, VALUES[trained.device.type] // (tokens * model.width)), MOST_CLIPS)


def measure(trained: TrainedModel, inputs: BatchInputs, clips: Sequence[int], rollouts: Rollouts | None) -> Rows:
    """All rows of one model for a batch; without roll-outs their tables are left out."""
    with torch.no_grad():
        velocity = trained.model(inputs.noisy, inputs.t, inputs.condition)
    velocities = {
        "model": velocity,
        "untrained": precondition(inputs.noisy, inputs.t, torch.zeros_like(inputs.x)),
        "mean velocity": torch.zeros_like(inputs.x),  # the mean over noise and normalised data
    }
    rows: Rows = {}
    for name, velocity in velocities.items():
        errors = Loss().per_frame(velocity, inputs.x, inputs.noise)
        rows["loss_by_noise", name] = by_noise(errors, inputs)
        rows["loss_by_position", name] = by_position(errors, inputs)
    if half_of_clip(inputs.x.shape[1], trained.config.model.frames_per_unit)[1]:  # a clip of one unit has no past
        rows |= {("loss_by_context", name): ratios for name, ratios in by_context(trained.model, inputs).items()}
        rows |= continuations(trained, inputs, clips, rollouts) if rollouts else {}
    return rows


# Results ----------------------------------------------------------------------------------------------


def with_differences(rows: Rows) -> Rows:
    """Also the differences of both runs, row by row: paired, as clips and noise are the same."""
    differences = {}
    for (table, row), (sums, counts) in rows.items():
        other = rows.get((table, OTHER_RUN + row))
        if other is not None and " - " not in row and table != "features":
            differences[table, f"{row} - {OTHER_RUN.strip()}"] = (sums - other[0], counts)
    return {**rows, **differences}


def table_of(name: str, rows: Rows) -> Table:
    kind = TABLES[name]
    own = {row: ratios for (table, row), ratios in rows.items() if table == name}
    columns = next(iter(own.values()))[0].shape[1] - 1
    names = {"loss_by_noise": BIN_NAMES, "loss_by_context": [f"{(i + 0.5) / BINS:.1f}" for i in range(BINS)]}
    names_of_columns = names.get(name) or [str(i + 1) for i in range(columns)]
    return Table.of(kind.title, kind.axis, kind.unit, [kind.total, *names_of_columns], own, kind.digits)


def distances(features: dict[str, Tensor]) -> dict[str, float]:
    """Fréchet distance of every kind of video `[clips, K]` to the true ones; none where clips are too few."""
    true = features.pop("truth", None)
    if true is None or len(true) <= true.shape[1]:
        return {}
    return {name: frechet(values, true) for name, values in features.items()}


def report(run: Path, result: dict[str, Any], tables: dict[str, Table]) -> str:
    """The evaluation as text."""
    so_far = " (interrupted: the clips so far)" if result["interrupted"] else ""
    lines = [
        f"{run}, step {result['step']}, {result['weights']} weights; {result['clips']} held-out clips{so_far}, "
        "± is a 95 % interval over clips"
    ]
    if other := result["against"]:
        lines.append(f"against {other['run']}, step {other['step']}: same clips, same noise; differences are paired")
    lines += [f"\n{table.text()}" for table in tables.values()]
    if "psnr_by_horizon" not in tables:
        lines.append("\nclips of a single unit leave nothing to continue: no PSNR")
    if result["frechet"] is not None:
        values = ", ".join(f"{name} {value:.4g}" for name, value in result["frechet"].items())
        lines.append(f"\nFréchet distance to the truth: {values or 'too few clips were continued'}")
    return "\n".join(lines)


def keep(
    run: Path, trained: TrainedModel, step: int | None, result: dict[str, Any], tables: dict[str, Table], text: str
) -> None:
    """Write the files of an evaluation to the run folder, and log it to the MLflow run."""
    contents = {
        "json": json.dumps(result, indent=1).encode(),
        "txt": f"{text}\n".encode(),
        "png": draw(list(tables.values()), f"{run.name}, step {result['step']}"),
    }
    tracker = Tracker(trained.config.metrics)
    tracker.start(run, {}, "", run.name, attach=True)
    for suffix, content in contents.items():
        file = RunFolder(run).evaluation(suffix, step)
        write_atomically(file, content)
        tracker.artifact(file)
    values = {k: value for key, table in tables.items() for k, value in table.metrics(f"quality/{key}/").items()}
    values |= {f"quality/frechet/{row}": value for row, value in (result["frechet"] or {}).items()}
    tracker.log(values, trained.step)
    tracker.finish("FINISHED")
