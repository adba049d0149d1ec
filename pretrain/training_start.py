"""TrainingStart: how a training process starts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .tracking.plan_deviation import PlannedStep

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class TrainingStart:
    """How a training process starts. resume: from the newest checkpoint, if there is one.

    rollback: step or folder of a checkpoint to go back to first, leaving out all clips since. again: also if the run
    last went back to that one already. planned: of `msc plan`; a deviation from it is reported once.
    """

    config: Config
    run: Path
    resume: bool = False
    rollback: str | None = None
    again: bool = False
    planned: PlannedStep | None = None
