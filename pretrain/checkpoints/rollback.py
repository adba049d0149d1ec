"""The steps that were not taken, going back before them, and the clips that are left out from then on.

    run/skipped.jsonl     the steps that the guard did not take, with their clips
    run/left_out.json     ranges [start, stop) of the sample clock that are passed over without training, and the
                          checkpoint that the run last went back to

The order of clips is fixed, so what is left out is named by the sample clock; every later resume reads the same.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msc.datasets.files import append_jsonl, read_jsonl, write_atomically
from msc.datasets.loading.dataloader import Batch

from . import directory as checkpoint_directory

Range = tuple[int, int]
Suspect = tuple[int, str, float]  # sample, key, mean error


# Steps that were not taken --------------------------------------------------------------------------------


def clip_losses(clips: Batch, errors: Sequence[Tensor]) -> list[Suspect]:
    """(sample, key, mean error) of this rank's clips in a step; NaN or infinite for those that spoiled it."""
    means = torch.cat([part.float().mean(1) for part in errors]).tolist()
    return list(zip(clips.samples, clips.keys, means, strict=True))


def record_skipped_step(run: Path, step: int, clock: int, batch: int, why: str, found: Sequence[list[Suspect]]) -> None:
    """Write a step that was not taken to skipped.jsonl, and say it, its worst clips first."""
    worst: dict[tuple[int, str], float] = {}
    for sample, key, error in (clip for clips in found for clip in clips):
        # ranks along time share a clip; a NaN must win over any number
        worst[sample, key] = max(worst.get((sample, key), -1.0), error if math.isfinite(error) else math.inf)
    ranked = sorted(worst.items(), key=lambda item: -item[1])
    clips = [{"sample": s, "key": key, "error": e if e < math.inf else None} for (s, key), e in ranked]
    append_jsonl(run / "skipped.jsonl", {"step": step, "clock": clock, "batch": batch, "why": why, "clips": clips})
    bad = [clip for clip in clips if clip["error"] is None] or clips
    names = ", ".join(f"{clip['sample']} ({clip['key']})" for clip in bad[:8]) + (" ..." if len(bad) > 8 else "")
    print(f"msc: step {step} is not taken: {why}; clips {names}", file=sys.stderr, flush=True)


def too_many_skipped_message(run: Path, step: int, count: int, why: str) -> str:
    lines = [line for line in read_jsonl(run / "skipped.jsonl") if line["step"] > step - count]
    names = ", ".join(str(clip["sample"]) for line in lines for clip in line["clips"])
    there = [path.name for path in checkpoint_directory.resume_candidates(run)]
    steps = ", ".join(str(int(name.removeprefix("step-"))) for name in there[:8])
    again = " (--again for the one gone back to before)" if read_state(run)[1] in there else ""
    back = f"msc train --run {run} --rollback N, N one of {steps}{again}" if there else "a new run"
    return (
        f"{count} steps in a row were not taken, the last for its {why}; weights are as before them. Samples: {names}. "
        "Look at these clips and at the loss: what spoiled the run may lie well before them, also before the newest "
        f"checkpoint. Go back to where it was still sound, without all clips since: {back}"
    )


# Clips that are left out ----------------------------------------------------------------------------------


def is_excluded(ranges: Sequence[Range], clock: int, batch: int) -> bool:
    """Whether a step over the clips [clock, clock + batch) holds any that are left out."""
    return any(start < clock + batch and clock < stop for start, stop in ranges)


def merge_ranges(ranges: Sequence[Range]) -> list[Range]:
    """The same clips in as few ranges as there can be, in order."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def reached(run: Path) -> int:
    """The sample clock that the run is known to have come to: its reports, refused steps and newest checkpoint."""
    clocks = [line["clock"] for line in read_jsonl(run / "log.jsonl")]
    clocks += [line["clock"] + line["batch"] for line in read_jsonl(run / "skipped.jsonl")]
    newest = checkpoint_directory.newest_meta(run)
    return max([*clocks, newest.clock if newest else 0])


def is_already_rolled_back(run: Path, wanted: str) -> bool:
    """Whether that checkpoint is the one that the run last went back to: a command that is repeated, by a scheduler or
    because of its exit code, must not undo what was trained since."""
    return read_state(run)[1] == checkpoint_directory.named(wanted)


def roll_back(run: Path, wanted: str, again: bool = False) -> None:
    """Make a checkpoint, named by step or folder, the one that the run goes on from, and leave out all clips since.

    Not only those of steps that were refused: what spoiled the weights may have been finite, and would do it again.
    Later checkpoints are renamed to `undone-step-…`. Nothing happens if this was `done` before, unless `again`; that
    is noted last, so that after a crash in between the same command does the rest.
    """
    if is_already_rolled_back(run, wanted) and not again:
        text = f"msc: {run} has gone back to {checkpoint_directory.named(wanted)} before: "
        print(text + "goes on from the newest checkpoint; --again goes back again", file=sys.stderr, flush=True)
        return
    target = checkpoint_directory.find(run, wanted)
    meta, until, (before, last) = checkpoint_directory.CheckpointMeta.read(target), reached(run), read_state(run)
    ranges = [(meta.clock, until)] if until > meta.clock else []
    _write_state(run, merge_ranges([*before, *ranges]), last)
    checkpoint_directory.set_latest(run, target)
    later = [
        path for path in checkpoint_directory.list_checkpoints(run) if checkpoint_directory.step_of(path) > meta.step
    ]
    for path in later:
        checkpoint_directory.rename_aside(path, "undone")
    _write_state(run, merge_ranges([*before, *ranges]), target.name)
    clips = ", ".join(f"{start}-{stop - 1}" for start, stop in ranges) or "none"
    undone = f"; {len(later)} later checkpoints renamed to undone-…, remove them when you like" if later else ""
    text = f"msc: back to step {meta.step}; clips left out from now on, by sample clock: {clips}{undone}"
    print(text, file=sys.stderr, flush=True)


# What is kept of it ---------------------------------------------------------------------------------------


def read_excluded_ranges(run: Path) -> list[Range]:
    return read_state(run)[0]


def read_state(run: Path) -> tuple[list[Range], str]:
    """Ranges that are left out, and the name of the checkpoint last gone back to ("": none)."""
    file = run / "left_out.json"
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"clips": [], "back_to": ""}
    return [(start, stop) for start, stop in state["clips"]], state["back_to"]


def _write_state(run: Path, ranges: list[Range], back_to: str) -> None:
    write_atomically(run / "left_out.json", json.dumps({"clips": ranges, "back_to": back_to}).encode())


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file beyond the checkpoint that the run goes on from: those steps are taken again."""
    if path.is_file():
        kept = [line for line in read_jsonl(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
