"""A training run against its plan: pure comparison of what the meter reads with what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OFF = 1.5  # times the plan; a plan rests on estimates, and is better than that where its rates were measured


@dataclass(frozen=True)
class PlannedStep:
    """Seconds of a step and GiB per GPU that a plan expects, and which plan. factor: beyond it, it is said."""

    step_s: float
    memory_gib: float
    source: str
    factor: float = OFF

    def __post_init__(self):
        if not (self.step_s > 0 and self.memory_gib > 0 and self.factor > 1):
            raise ValueError(
                f"a plan of {self.step_s} s per step and {self.memory_gib} GiB (factor {self.factor}) expects nothing"
            )


def plan_ratios(values: Mapping[str, float], planned: PlannedStep) -> dict[str, float]:
    """Measured over expected, for the curves. values: of `Meter.read`. Memory only of GPUs: a CPU process holds
    more."""
    found = {"plan/step_s": values["step_s"] / planned.step_s}
    if "memory_reserved_gib" in values:
        found["plan/memory"] = values["memory_reserved_gib"] / planned.memory_gib
    return found


def describe_deviation(values: Mapping[str, float], planned: PlannedStep) -> str:
    """What to tell a person where a run is off its plan by more than the factor, or nothing."""
    found = plan_ratios(values, planned)
    told = []
    step, memory = found["plan/step_s"], found.get("plan/memory", 1.0)
    if not 1 / planned.factor <= step <= planned.factor:
        waiting = f", waiting for data {values['data_wait']:.0%} of it" if values.get("data_wait", 0) > 0.1 else ""
        told.append(
            f"a step takes {values['step_s']:.3g} s, {_times(step)} the {planned.step_s:.3g} s planned{waiting}"
        )
    if memory > planned.factor:  # holding less is no trouble
        told.append(
            f"{values['memory_reserved_gib']:.3g} GiB are held, {_times(memory)} the {planned.memory_gib:.3g} planned"
        )
    return f"off its plan ({planned.source}): {'; '.join(told)}" if told else ""


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times"
