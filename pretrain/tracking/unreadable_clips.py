"""Unreadable clips of a run: counted over all ranks, recorded in the run folder, and limited by data.max_bad."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from msc.datasets.errors import DeterministicFailure
from msc.datasets.files import append_jsonl, read_jsonl

from ..run_folder import RunFolder


class UnreadableClips:
    """reasons: sample -> why, of all ranks together, continued where the run ended before. clips: in the training set.
    max_bad: the share that may be unreadable; one clip always may."""

    def __init__(self, run: Path, clips: int, max_bad: float, reasons: dict[int, str]):
        self.path, self.clips, self.reasons = RunFolder(run).unreadable_clips, clips, reasons
        self.limit = max(1, math.floor(max_bad * clips))

    def add(self, step: int, clips: Iterable[tuple[int, str]], write: bool) -> None:
        """Add the (sample, why) of a step over all ranks; one rank has to `write`.

        DeterministicFailure beyond the limit, which one rank alone may never reach.
        """
        new = {sample: why for sample, why in clips if sample not in self.reasons}
        self.reasons |= new
        for sample, why in sorted(new.items()) if write else ():
            append_jsonl(self.path, {"step": step, "sample": sample, "why": why})
        if len(self.reasons) > self.limit:
            raise DeterministicFailure(
                f"{len(self.reasons)} of {self.clips} clips are unreadable, more than data.max_bad allows "
                f"({self.limit}): see {self.path}; check the disk, or run `msc convert` again"
            )


def read_unreadable_clips(run: Path) -> dict[int, str]:
    return {record["sample"]: record["why"] for record in read_jsonl(RunFolder(run).unreadable_clips)}
