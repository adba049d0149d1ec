"""`msc sample --signal NAME=...`: what a user wants to steer by, as values of the frames to generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.conditioning import SignalConfig
from ..model.config import ModelConfig


def read_signals(config: ModelConfig, options: Sequence[str], units: int | None, fps: float) -> dict[str, Tensor]:
    """Raw values `[T, width]` of the frames to generate by signal; all of equal length. units: to generate, if said.

    An option names a file of one row a unit, or with times, in seconds from the first new frame on; or, of a discrete
    signal, values and for how many units each (the last without a number: to the end), as `left:40,forward:80`.
    """
    known = {signal.name: signal for signal in config.signals}
    values: dict[str, Tensor] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"--signal {option}: expected NAME=FILE or NAME=VALUE:UNITS,... and one of "
                f"{', '.join(known) or 'no signal, as the model was trained without'}"
            )
        if name in values:
            raise ValueError(f"--signal {name} is given twice")
        signal = known[name]
        own = _of_schedule(signal, text, units)
        values[name] = own.repeat_interleave(config.frames_per_unit, 0)
    for name, own in values.items():
        length = len(own) // config.frames_per_unit
        if units is None:
            units = length
        if length < units:
            raise ValueError(f"--signal {name} is for {length} units, {units} are to be generated: see --units")
    return {name: own[: (units or 0) * config.frames_per_unit] for name, own in values.items()}


def _of_schedule(signal: SignalConfig, text: str, units: int | None) -> Tensor:
    """Counts `[units, width]` of a discrete signal, one of a value in each of a unit's video frames."""
    if signal.kind == "continuous":
        raise ValueError(f"--signal {signal.name}: {text} is no file, and the values of a continuous signal need one")
    chosen: list[int] = []
    parts = text.split(",")
    for number, part in enumerate(parts, 1):
        value, colon, count = part.strip().rpartition(":") if ":" in part else (part.strip(), "", "")
        if value not in signal.columns:
            raise ValueError(
                f"--signal {signal.name}: {part!r} is neither a file nor one of the values "
                f"{', '.join(signal.columns[:20])}{', ...' * (len(signal.columns) > 20)}"
            )
        if colon and not (count.isdecimal() and int(count)):
            raise ValueError(f"--signal {signal.name}: {part!r}: after the colon stands for how many units, at least 1")
        if not colon and number < len(parts):
            raise ValueError(f"--signal {signal.name}: {part!r} needs a number of units, as {value}:8")
        rest = max(1, (units or 0) - len(chosen))  # the last one goes on to the end
        chosen += [signal.columns.index(value)] * (int(count) if colon else rest)
    return torch.nn.functional.one_hot(torch.tensor(chosen), len(signal.columns)).float().repeat(1, signal.frames)


def read_guidance(config: ModelConfig, options: Sequence[str]) -> dict[str, float]:
    """Scales of guidance by signal, from NAME=SCALE."""
    names, scales = [signal.name for signal in config.signals], {}
    for option in options:
        name, _, scale = option.partition("=")
        if name not in names:
            raise ValueError(f"--signal-guidance {option}: expected NAME=SCALE and one of {', '.join(names) or 'none'}")
        try:
            scales[name] = float(scale)
        except ValueError:
            raise ValueError(f"--signal-guidance {option}: {scale!r} is not a number") from None
    return scales
