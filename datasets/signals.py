"""Per-frame signals: numbers that go with every frame of a video, such as actions, controls or poses of a camera."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_SIGNALS, MAX_COLUMNS, MAX_NAME = 16, 1024, 100
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")  # part of the names of files and tensors
Kind = Literal["discrete", "continuous"]
TAKES = {"discrete": ("last", "count"), "continuous": ("last", "mean")}


@dataclass(frozen=True)
class Signal:
    """A signal of a set of clips; a video frame's value is a vector of `width` numbers.

    discrete: `columns` are the values (words, or whole numbers as text), a frame holds how often each of them occurs:
    at most once for take "last". continuous: `columns` are the file's, a frame holds raw numbers; `mean` and `std` are
    over the frames of the training clips. known: share of the training clips that have the signal.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    take: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    known: float = 1.0

    @property
    def width(self) -> int:
        return len(self.columns)

    @property
    def problem(self) -> str:
        """What is wrong with values from an index, whose types are right; "" if nothing is."""
        if not NAME.fullmatch(self.name):
            return f"signals: {self.name[:MAX_NAME]!r} is no name"
        place, columns = f"signals.{self.name}", self.columns
        if not 1 <= len(columns) <= MAX_COLUMNS or len(set(columns)) < len(columns):
            return f"{place} has {len(columns)} columns, expected 1 to {MAX_COLUMNS} different ones"
        if unsafe := next((x for x in columns if not 0 < len(x) <= MAX_NAME or not x.isprintable()), None):
            return f"{place} has a column {unsafe[:MAX_NAME]!r}, expected at most {MAX_NAME} printable characters"
        if self.take not in TAKES[self.kind]:
            return f"{place}: take is {self.take[:MAX_NAME]!r}, expected one of {', '.join(TAKES[self.kind])}"
        numbers = 0 if self.kind == "discrete" else self.width
        if not len(self.mean) == len(self.std) == numbers:
            return f"{place} has {len(self.mean)} means and {len(self.std)} deviations, expected {numbers}"
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std, default=1.0) <= 0:
            return f"{place}: mean and std must be finite, std above 0"
        return "" if 0 <= self.known <= 1 else f"{place}: known is {self.known}, expected 0 to 1"


def rows_of_latent_frames(values: Tensor, frames: int, temporal_factor: int, kind: Kind) -> Tensor:
    """The signal of every latent frame, float32 [T, k W], from that of the video frames, [Tv, W]: the rows of the k
    (`temporal_factor`) video frames that it stands for, in order.

    Where `frames` · k are more than Tv, as with autoencoders whose first latent frame is a single video frame, the
    slots that the first latent frame lacks come first: zeros if discrete, the first value if continuous.
    """
    missing = frames * temporal_factor - len(values)
    if not 0 <= missing < temporal_factor:
        raise ValueError(f"a signal of {len(values)} video frames, expected {frames} x {temporal_factor} or less")
    first = values[:1].float().expand(missing, -1)
    rows = torch.cat((first if kind == "continuous" else torch.zeros_like(first), values.float()))
    return rows.reshape(frames, temporal_factor * values.shape[1])


def mix_signals(sets: Sequence[tuple[str, float, tuple[Signal, ...]]]) -> tuple[Signal, ...]:
    """The signals of a mixture, from (name, weight, signals) of its sets, matched by name: mean and deviation are those
    of the mixture. ValueError, naming both sets, where kind or columns differ, and for too many.
    """
    owners: dict[str, list[tuple[str, float, Signal]]] = {}
    for place, weight, signals in sets:
        for signal in signals:
            own = owners.setdefault(signal.name, [])
            own.append((place, weight, signal))
            for field in ("kind", "columns"):
                a, b = getattr(own[0][2], field), getattr(signal, field)
                if a != b:
                    raise ValueError(
                        f"data.shards: {own[0][0]} and {place} differ in {field} of signal {signal.name}: {a} and {b}: "
                        "convert them together"
                    )
    if len(owners) > MAX_SIGNALS:
        raise ValueError(f"data.shards: the sets have {len(owners)} signals, at most {MAX_SIGNALS} are read")
    total = sum(weight for _, weight, _ in sets)
    mixed = []
    for own in owners.values():
        signal = own[0][2]
        known = sum(weight * one.known for _, weight, one in own)
        if len(own) > 1 and signal.mean:
            weights = torch.tensor(
                [[weight * one.known / known] if known else [1 / len(own)] for _, weight, one in own]
            )
            means, stds = (torch.tensor([getattr(one, x) for _, _, one in own]).double() for x in ("mean", "std"))
            mean = (weights * means).sum(0)
            std = (weights * (stds.square() + (means - mean).square())).sum(0).sqrt()
            signal = dataclasses.replace(signal, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
        mixed.append(dataclasses.replace(signal, known=known / total))
    return tuple(mixed)
