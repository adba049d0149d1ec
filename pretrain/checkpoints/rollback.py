"""Skipped steps, rollback to an earlier checkpoint, and the clips that a rollback excludes from training.

    run/skipped.jsonl     the steps that the spike guard skipped, with their clips
    run/left_out.json     excluded ranges [start, stop) of the sample clock, and the checkpoint last rolled back to

The order of clips is fixed, so the sample clock names clips; every later resume reads the same ranges.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msc.datasets.files import append_jsonl, finite_or_none, read_jsonl, write_atomically
from msc.datasets.loading.dataloader import Batch

from ..run_folder import RunFolder
from . import directory as checkpoint_directory
from .directory import CheckpointMeta

log = logging.getLogger(__name__)

Range = tuple[int, int]
ClipLoss = tuple[int, str, float]  # sample, key, mean error


# Skipped steps --------------------------------------------------------------------------------------------


def clip_losses(clips: Batch, errors: Sequence[Tensor]) -> list[ClipLoss]:
    """(sample, key, mean error) of this rank's clips in a step; NaN or infinite for those that made it so."""
    means = torch.cat([part.float().mean(1) for part in errors]).tolist()
    return list(zip(clips.samples, clips.keys, means, strict=True))


def record_skipped_step(
    run: Path, step: int, clock: int, batch: int, why: str, losses_of_ranks: Sequence[list[ClipLoss]]
) -> None:
    """Append a skipped step to skipped.jsonl, its worst clips first, and log it."""
    worst: dict[tuple[int, str], float] = {}
    for sample, key, error in (clip for clips in losses_of_ranks for clip in clips):
        # ranks along time share a clip; a NaN must win over any number
        worst[sample, key] = max(worst.get((sample, key), -1.0), error if math.isfinite(error) else math.inf)
    ranked = sorted(worst.items(), key=lambda item: -item[1])
    clips = [{"sample": s, "key": key, "error": e if e < math.inf else None} for (s, key), e in ranked]
    record = {"step": step, "clock": clock, "batch": batch, "why": why, "clips": clips}
    append_jsonl(RunFolder(run).skipped_steps, record)
    bad = [clip for clip in clips if clip["error"] is None] or clips
    names = ", ".join(f"{clip['sample']} ({clip['key']})" for clip in bad[:8]) + (" ..." if len(bad) > 8 else "")
    log.warning("step %d is skipped: %s; clips %s", step, why, names)


def too_many_skipped_message(run: Path, step: int, count: int, why: str) -> str:
    skipped = [record for record in read_jsonl(RunFolder(run).skipped_steps) if record["step"] > step - count]
    samples = ", ".join(str(clip["sample"]) for record in skipped for clip in record["clips"])
    candidates = checkpoint_directory.resume_candidates(run)
    remedy = "start a new run"
    if candidates:
        steps = ", ".join(str(checkpoint_directory.step_of(path)) for path in candidates[:8])
        again = read_state(run)[1] in [path.name for path in candidates]
        remedy = f"msc train --run {run} --rollback N, N one of {steps}"
        remedy += " (--again for the one rolled back to before)" if again else ""
    return (
        f"{count} steps in a row were skipped, the last for its {why}; weights are as before them. Samples: {samples}. "
        "Look at these clips and at the loss: the cause may lie well before them, also before the newest checkpoint. "
        f"Roll back to where the loss was still good, which excludes all clips since: {remedy}"
    )


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the records after the checkpoint that the run resumes from: those steps are taken again."""
    if path.is_file():
        records = [record for record in read_jsonl(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(finite_or_none(record)) + "\n" for record in records).encode())


# Rollback -------------------------------------------------------------------------------------------------


def is_already_rolled_back(run: Path, requested: str) -> bool:
    """Whether the run was last rolled back to this checkpoint: a command that is repeated, by a scheduler or because of
    its exit code, must not undo what was trained since."""
    return read_state(run)[1] == checkpoint_directory.requested_name(requested)


def roll_back(run: Path, requested: str, again: bool = False) -> None:
    """Let the run resume from a checkpoint, given by step or folder, and exclude all clips since.

    Not only those of skipped steps: the clip that ruined the weights may have had a finite loss, and would do it again.
    Later checkpoints are renamed to `undone-step-…`. Does nothing if `is_already_rolled_back`, unless `again`; that is
    recorded last, so that after a crash the same command completes the rollback.
    """
    if is_already_rolled_back(run, requested) and not again:
        name = checkpoint_directory.requested_name(requested)
        log.info("%s was rolled back to %s before: resuming from the newest; --again rolls back again", run, name)
        return
    target = checkpoint_directory.find(run, requested)
    meta, newest = CheckpointMeta.read(target), checkpoint_directory.newest_meta(run)
    before, last = read_state(run)
    # How far the run had come is known from its reports, skipped steps and newest checkpoint.
    clocks = [record["clock"] for record in read_jsonl(RunFolder(run).log)]
    clocks += [record["clock"] + record["batch"] for record in read_jsonl(RunFolder(run).skipped_steps)]
    until = max([*clocks, newest.clock if newest else 0])
    ranges = merge_ranges([*before, (meta.clock, until)] if until > meta.clock else before)
    _write_state(run, ranges, last)
    checkpoint_directory.set_latest(run, target)
    later = [p for p in checkpoint_directory.list_checkpoints(run) if checkpoint_directory.step_of(p) > meta.step]
    for path in later:
        checkpoint_directory.rename_aside(path, "undone")
    _write_state(run, ranges, target.name)
    clips = f"{meta.clock}-{until - 1}" if until > meta.clock else "none"
    undone = f"; {len(later)} later checkpoints renamed to undone-…, delete them when you like" if later else ""
    log.info("rolled back to step %d; excluded clips, by sample clock: %s%s", meta.step, clips, undone)


def is_excluded(ranges: Sequence[Range], clock: int, batch: int) -> bool:
    """Whether a step over the clips [clock, clock + batch) has any excluded one."""
    return any(start < clock + batch and clock < stop for start, stop in ranges)


def merge_ranges(ranges: Sequence[Range]) -> list[Range]:
    """The same clips in as few ranges as possible, in order."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def read_excluded_ranges(run: Path) -> list[Range]:
    return read_state(run)[0]


def read_state(run: Path) -> tuple[list[Range], str]:
    """Excluded ranges, and the name of the checkpoint last rolled back to ("": none)."""
    file = RunFolder(run).excluded_ranges
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"clips": [], "back_to": ""}
    return [(start, stop) for start, stop in state["clips"]], state["back_to"]


def _write_state(run: Path, ranges: list[Range], name: str) -> None:
    state = {"clips": ranges, "back_to": name}
    write_atomically(RunFolder(run).excluded_ranges, json.dumps(state).encode())
