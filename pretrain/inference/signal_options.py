"""`msc sample --signal NAME=...`: what a user wants to steer by, as values of the frames to generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from msc.datasets.signal_files import read_signal

from ..model.conditioning import SignalConfig
from ..model.config import ModelConfig


def read_signals(config: ModelConfig, options: Sequence[str], units: int | None) -> dict[str, Tensor]:
    """Raw values `[T, width]` of the frames to generate by signal; all of equal length. units: to generate, if said.

    An option names a file with a row for every unit; or, of a discrete signal, values and for how many units each (the
    last without a number: to the end), as `left:40,forward:80`.
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
        own = _of_file(signal, Path(text)) if Path(text).is_file() else _of_schedule(signal, text, units)
        values[name] = own.repeat_interleave(config.frames_per_unit, 0)
    for name, own in values.items():
        length = len(own) // config.frames_per_unit
        if units is None:
            units = length
        if length < units:
            raise ValueError(f"--signal {name} is for {length} units, {units} are to be generated: see --units")
    return {name: own[: (units or 0) * config.frames_per_unit] for name, own in values.items()}


def _of_file(signal: SignalConfig, path: Path) -> Tensor:
    """The rows of a file `[units, width]`, the same in each of a unit's video frames."""
    table = read_signal(path)
    if table.times is not None:
        raise ValueError(f"{path} has times: here a row stands for a unit, leave them out")
    if signal.kind == "continuous":
        if table.columns != signal.columns and table.columns != tuple(map(str, range(len(signal.columns)))):
            raise ValueError(
                f"{path} has the columns {', '.join(table.columns)}; {signal.name} has {', '.join(signal.columns)}"
            )
        return torch.from_numpy(table.numbers()).float().repeat(1, signal.frames)
    if not table.is_discrete or (unknown := sorted(set(table.values.tolist()) - set(signal.columns))):
        other = repr(unknown[0]) if table.is_discrete else "fractions or several columns"
        raise ValueError(f"{path} holds {other}; {signal.name} is one of {', '.join(signal.columns[:20])}")
    return _counts(signal, [signal.columns.index(value) for value in table.values.tolist()])


def _counts(signal: SignalConfig, values: Sequence[int]) -> Tensor:
    """Of a discrete signal with one value a unit."""
    return torch.nn.functional.one_hot(torch.tensor(values), len(signal.columns)).float().repeat(1, signal.frames)


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
    return _counts(signal, chosen)


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
