"""The clips that a run could not read and left out: `broken.jsonl` in its folder, a line for each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from msc.datasets.errors import DeterministicFailure
from msc.datasets.files import append_jsonl, read_jsonl


class UnreadableClips:
    """Those found so far by all ranks together, `found`: sample -> why. Continues where the run ended before."""

    def __init__(self, run: Path, clips: int, max_bad: float, found: dict[int, str]):
        self.path, self.clips, self.found = run / "broken.jsonl", clips, found
        self.most = max(1, math.floor(max_bad * clips))

    def note(self, step: int, met: Iterable[tuple[int, str]], writing: bool) -> None:
        """Add what was met in a step, the same on every rank, of which one is `writing`.

        DeterministicFailure once more than `most` are known: one rank alone may never meet that many.
        """
        new = {sample: why for sample, why in met if sample not in self.found}
        self.found |= new
        for sample, why in sorted(new.items()) if writing else ():
            append_jsonl(self.path, {"step": step, "sample": sample, "why": why})
        if len(self.found) > self.most:
            raise DeterministicFailure(
                f"{len(self.found)} of {self.clips} clips are broken, more than data.max_bad allows ({self.most}): see "
                f"{self.path}; check the disk, or run `msc convert` again"
            )


def read_unreadable_clips(run: Path) -> dict[int, str]:
    return {line["sample"]: line["why"] for line in read_jsonl(run / "broken.jsonl")}
