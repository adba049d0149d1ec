"""Spike guard: which optimizer steps are skipped, decided from their loss and gradient norm.

A skipped step changes no weight, moment or average, and the sample clock still advances. Every rank decides for itself
from numbers that all of them share, so they agree without communication.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

# The largest gradient norm of a step that is taken, at every ZeRO stage. Stages 0 to 2 sum squares in fp32, where a
# norm above 1.8e19 overflows; stage 3 would take it.
MAX_NORM = 1e19


@dataclass(frozen=True)
class GuardConfig:
    """A step whose loss or gradient norm is not finite, or whose norm is above MAX_NORM, is always skipped. sigma: so
    is one whose loss or norm lies more than that many standard deviations above the mean of the last `window` steps
    taken (0: no such rule). stop_after: skipped steps in a row after which the run stops and names their clips."""

    sigma: float = 0.0
    window: int = 128
    stop_after: int = 10

    def __post_init__(self):
        if self.sigma < 0 or 0 < self.sigma < 2:
            raise ValueError(f"guard.sigma is {self.sigma}; it must be 0 (no rule) or at least 2, or good steps go too")
        if self.window < 16 or self.stop_after < 1:
            raise ValueError(
                f"guard.window ({self.window}) must be at least 16 and guard.stop_after ({self.stop_after}) at least 1"
            )


@dataclass(frozen=True)
class History:
    """losses, norms: of the last steps taken. skipped: steps so far; in_a_row: of them up to now."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    skipped: int = 0
    in_a_row: int = 0

    @staticmethod
    def read(saved: dict[str, Any] | None) -> History:
        """From `dataclasses.asdict` of one; a new history where nothing was saved."""
        if saved is None:
            return History()
        return History(tuple(saved["losses"]), tuple(saved["norms"]), saved["skipped"], saved["in_a_row"])


def skip_reason(config: GuardConfig, history: History, loss: float, norm: float) -> str:
    """Why a step with this loss and gradient norm is skipped; empty if it is taken."""
    for name, value, recent in (("loss", loss, history.losses), ("gradient norm", norm, history.norms)):
        if not math.isfinite(value):
            return f"{name} {value}"
        if name == "gradient norm" and value > MAX_NORM:
            return f"{name} {value:.4g}, above {MAX_NORM:g}"
        if config.sigma and len(recent) >= config.window // 2:
            mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
            if value > mean + config.sigma * deviation:
                return f"{name} {value:.4g}, of late {mean:.4g} ± {deviation:.2g}"
    return ""


def updated_history(config: GuardConfig, history: History, loss: float, norm: float, reason: str) -> History:
    """The history with one more step. reason: why it was skipped, or empty."""
    if reason:
        return History(history.losses, history.norms, history.skipped + 1, history.in_a_row + 1)
    losses, norms = (*history.losses, loss), (*history.norms, norm)
    return History(losses[-config.window :], norms[-config.window :], history.skipped, 0)
