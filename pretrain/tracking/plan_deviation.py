"""Plan deviation: compares the measured time and memory of a step with those of `msc plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LIMIT = 1.5  # times the plan; a plan rests on estimates, and is better than that where its rates were measured


@dataclass(frozen=True)
class PlannedStep:
    """Seconds of a step and GiB per GPU of a plan. source: which plan. factor: deviations beyond it are reported."""

    step_s: float
    memory_gib: float
    source: str
    factor: float = LIMIT

    def __post_init__(self):
        if not (self.step_s > 0 and self.memory_gib > 0 and self.factor > 1):
            raise ValueError(
                f"a plan of {self.step_s} s per step and {self.memory_gib} GiB (factor {self.factor}) is not valid: "
                "time and memory must be positive, the factor more than 1"
            )


def plan_ratios(values: Mapping[str, float], planned: PlannedStep) -> dict[str, float]:
    """Measured over planned. values: of `Meter.read`. Memory only of GPUs: a CPU process holds more."""
    ratios = {"plan/step_s": values["step_s"] / planned.step_s}
    if "memory_reserved_gib" in values:
        ratios["plan/memory"] = values["memory_reserved_gib"] / planned.memory_gib
    return ratios


def describe_deviation(values: Mapping[str, float], planned: PlannedStep) -> str:
    """The deviations beyond the factor as a line; empty if there are none."""
    ratios, problems = plan_ratios(values, planned), []
    step, memory = ratios["plan/step_s"], ratios.get("plan/memory", 1.0)
    if not 1 / planned.factor <= step <= planned.factor:
        waiting = f", waiting for data {values['data_wait']:.0%} of it" if values.get("data_wait", 0) > 0.1 else ""
        measured = f"a step takes {values['step_s']:.3g} s"
        problems.append(f"{measured}, {step:.2g} times the {planned.step_s:.3g} s planned{waiting}")
    if memory > planned.factor:  # holding less is no trouble
        measured = f"{values['memory_reserved_gib']:.3g} GiB are held"
        problems.append(f"{measured}, {memory:.2g} times the {planned.memory_gib:.3g} planned")
    return f"off its plan ({planned.source}): {'; '.join(problems)}" if problems else ""
