"""How good a model is: continuations against the truth while it trains, and `msc evaluate` (docs/evaluation.md)."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from msc.datasets.files import write_atomically
from msc.datasets.loading.held_out import held_out_batches, parts_of
from msc.datasets.loading.mixture import Shards, open_shards

from ..batch_inputs import Feed, Inputs
from ..diffusion.rectified_flow import DiffusionConfig, frame_losses, frame_shift
from ..inference.load import TrainedModel, open_run
from ..inference.preview import half_of_clip
from ..model.transformer import check_clip, precondition
from ..requests import EvaluateConfig
from ..tracking.tracker import Tracker
from .confidence import OTHER_RUN, Table, draw, concatenate
from .frechet import check_enough, frechet, open_features
from .held_out_loss import (
    BINS,
    HELD_OUT_SEED,
    bin_names,
    by_context,
    by_noise,
    by_position,
)
from .rollouts import Rollouts, Rows, continuations

EACH = 4  # clips in a batch of `msc evaluate`


# msc evaluate ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a table is about; first: its first column, which sums up the others."""

    title: str
    axis: str
    unit: str
    digits: int
    first: str = "mean"


TABLES = {
    "loss_by_noise": Kind("held-out loss by noise level", "noise level t", "squared velocity error", 4),
    "loss_by_position": Kind("held-out loss by position", "latent frame", "squared velocity error", 4),
    "loss_by_context": Kind("last unit, clean past: loss, and what hiding the past adds", "noise level t", "loss", 4),
    "psnr_by_horizon": Kind("continuations: PSNR", "frames ahead", "dB", 2),
    "ssim_by_horizon": Kind("continuations: SSIM", "frames ahead", "1: identical", 3),
    "drift": Kind("continuations: drift", "frames ahead", "sample / truth; slope: per frame", 3, "slope"),
}
BASELINES = ("untrained", "mean velocity", "copy last", "truth")  # rows that no trained model has a part in


def evaluate(run: Path, request: EvaluateConfig) -> str:
    """Measure a run on its first held-out clips: the report as text, also kept in the run folder.

    Files of a chosen checkpoint carry its step. After Ctrl-C the figures are those of the clips so far.
    """
    # Who is measured, and on what
    trained = open_run(run, request.weights, request.checkpoint)
    shards = open_shards(trained.config.data)
    each = [sum(some) for some in parts_of(shards, min(request.clips, shards.samples("held_out")))]  # of every bucket
    if not (clips := sum(each)):
        raise ValueError(f"{shards} holds no held-out clip: convert with --held-out")
    continued = next(bucket for bucket, some in enumerate(each) if some)  # clips of others have other horizons
    subjects = {"": trained}
    if request.against is not None:
        subjects[OTHER_RUN] = open_run(request.against, request.weights)
        check_comparable(trained, subjects[OTHER_RUN], shards)
    network = None if request.features is None else open_features(request.features, trained.device)
    rollouts = Rollouts(request.steps, request.samples, network)
    feeds = {who: feeds_of(one, trained.config.diffusion, shards) for who, one in subjects.items()}

    # Clip by clip
    found: list[Rows] = []  # of every batch
    done, interrupted, told = 0, False, time.monotonic()
    with tqdm(total=clips, desc="evaluate", unit="clip", disable=None) as bar:
        try:
            for batch, _ in held_out_batches(shards, clips, EACH):
                rows: Rows = {}
                for who, one in subjects.items():
                    inputs, seed = feeds[who][batch.bucket](batch), HELD_OUT_SEED + batch.samples[0]
                    own = measure(one, inputs, seed, rollouts if batch.bucket == continued else None)
                    rows |= {(table, who + row): part for (table, row), part in own.items()
                             if not (who and row in BASELINES)}  # fmt: skip
                if not done and ("features", "truth") in rows:
                    check_enough(each[continued], rows["features", "truth"][0].shape[1])
                found.append(rows)
                done += len(batch.samples)
                bar.update(len(batch.samples))
                if bar.disable and time.monotonic() - told > 30:  # no terminal: a line in a job's log now and then
                    print(f"evaluate: {done} of {clips} clips", file=sys.stderr, flush=True)
                    told = time.monotonic()
        except KeyboardInterrupt:
            if not found:
                raise
            interrupted = True

    # Figures
    keys = dict.fromkeys(key for rows in found for key in rows)
    parts = with_differences({key: concatenate([rows[key] for rows in found if key in rows]) for key in keys})
    tables = {name: table_of(name, parts) for name in TABLES if name in {table for table, _ in parts}}
    seen = {row: values for (table, row), (values, _) in parts.items() if table == "features"}
    result = {
        "step": trained.step,
        "clock": trained.clock,
        "weights": request.weights,
        "clips": done,
        "interrupted": interrupted,
        "sampling_steps": request.steps,
        "samples": request.samples,
        "against": None if request.against is None else {"run": str(request.against), "step": subjects[OTHER_RUN].step},
        "loss": {name: row["mean"][0] for name, row in tables["loss_by_noise"].json()["rows"].items()},
        "frechet": distances(seen) if request.features else None,
        "tables": {name: table.json() for name, table in tables.items()},
    }
    text = report(run, result, tables)
    keep(
        run,
        "evaluation" if request.checkpoint is None else f"evaluation-{trained.step:08d}",
        trained,
        result,
        tables,
        text,
    )
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


def feeds_of(one: TrainedModel, diffusion: DiffusionConfig, shards: Shards) -> list[Feed]:
    """How clips of every bucket become inputs: noise and levels do not depend on the model."""
    return [
        Feed(
            model=one.model,
            autoencoder=one.autoencoder,
            diffusion=diffusion,
            shift=frame_shift(diffusion, shape.height, shape.width),
            seed=HELD_OUT_SEED,
            units=range(shape.frames // one.config.model.frames_per_unit),
            all_units=shape.frames // one.config.model.frames_per_unit,
            text_dropout=0.0,
            device=one.device,
        )
        for shape in shards.shapes
    ]


# One model, one batch ---------------------------------------------------------------------------------


def measure(one: TrainedModel, inputs: Inputs, seed: int, rollouts: Rollouts | None) -> Rows:
    """All rows of one model for a batch; without roll-outs their tables are left out."""
    with torch.no_grad():
        velocity = one.model(inputs.noisy, inputs.t, inputs.text, inputs.labels)
    guesses = {
        "model": velocity,
        "untrained": precondition(inputs.noisy, inputs.t, torch.zeros_like(inputs.x)),
        "mean velocity": torch.zeros_like(inputs.x),  # the mean over noise and normalised data
    }
    rows: Rows = {}
    for name, guess in guesses.items():
        errors = frame_losses(guess, inputs.x, inputs.noise)
        rows["loss_by_noise", name] = by_noise(errors, inputs)
        rows["loss_by_position", name] = by_position(errors, inputs)
    if half_of_clip(inputs.x.shape[1], one.config.model.frames_per_unit)[1]:  # a clip of a single unit has no past
        rows |= {("loss_by_context", name): part for name, part in by_context(one.model, inputs).items()}
        rows |= continuations(one, inputs, seed, rollouts) if rollouts else {}
    return rows


# Figures ----------------------------------------------------------------------------------------------


def with_differences(parts: Rows) -> Rows:
    """Also the differences of both runs, row by row: paired, as clips and noise are the same."""
    found = dict(parts)
    for (table, row), (sums, counts) in parts.items():
        other = parts.get((table, OTHER_RUN + row))
        if other is not None and " - " not in row and table != "features":
            found[table, f"{row} - {OTHER_RUN.strip()}"] = (sums - other[0], counts)
    return found


def table_of(name: str, parts: Rows) -> Table:
    kind = TABLES[name]
    rows = {row: part for (table, row), part in parts.items() if table == name}
    columns = next(iter(rows.values()))[0].shape[1] - 1
    names = {"loss_by_noise": bin_names(), "loss_by_context": [f"{(i + 0.5) / BINS:.1f}" for i in range(BINS)]}
    along = names.get(name) or [str(i + 1) for i in range(columns)]
    return Table.of(kind.title, kind.axis, kind.unit, [kind.first, *along], rows, kind.digits)


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
        found = ", ".join(f"{name} {value:.4g}" for name, value in result["frechet"].items())
        lines.append(f"\nFréchet distance to the truth: {found or 'too few clips were continued'}")
    return "\n".join(lines)


def keep(
    run: Path, name: str, trained: TrainedModel, result: dict[str, Any], tables: dict[str, Table], text: str
) -> None:
    """In the run folder and in its MLflow run."""
    files = {
        f"{name}.json": json.dumps(result, indent=1).encode(),
        f"{name}.txt": f"{text}\n".encode(),
        f"{name}.png": draw(list(tables.values()), f"{run.name}, step {result['step']}"),
    }
    tracker = Tracker(trained.config.metrics)
    tracker.start(run, {}, "", run.name, attach=True)
    for file, content in files.items():
        write_atomically(run / file, content)
        tracker.artifact(run / file)
    values = {k: value for key, table in tables.items() for k, value in table.metrics(f"quality/{key}/").items()}
    values |= {f"quality/frechet/{row}": value for row, value in (result["frechet"] or {}).items()}
    tracker.log(values, trained.step)
    tracker.finish("FINISHED")
