"""Conditions of a video: text, a class, and per-frame signals such as actions or camera motion.

Text is attended to by every block, a class and signals are added to the embedding of a frame's noise level (adding was
published as good as modulating and better than attending: 23.1, 23.2, 20.8 dB). A frame sees its own signals and,
through the past, earlier ones; never a later one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_COLUMNS = 1024
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Condition:
    """What the frames given to the model are conditioned on; whatever is left out is unknown.

    text: embeddings `[B, L, E]`, zeros where dropped or padded. labels: class numbers `[B]`, `classes` meaning none.
    signals: by name, normalised (`MSCTransformer.normalise_signals`), `[B, T, video frames per frame * columns]`; NaN
    in frames where a signal is unknown. Of models with `layers.given_channels` and `layers.image_width` also given:
    mask and latents `[B, T, given channels, H, W]` (default: the frames without noise), and image: embeddings
    `[B, L, E]`.
    """

    text: Tensor | None = None
    labels: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    given: Tensor | None = None
    image: Tensor | None = None

    def __bool__(self) -> bool:
        values = self.text, self.labels, self.given, self.image
        return any(value is not None for value in values) or bool(self.signals)

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """With every tensor changed."""
        values = self.text, self.labels, self.given, self.image
        text, labels, given, image = (None if value is None else change(value) for value in values)
        return Condition(text, labels, {name: change(value) for name, value in self.signals.items()}, given, image)

    def to(self, device: torch.device | str) -> Condition:
        return self.map(lambda value: value.to(device, non_blocking=True))

    def of_frames(self, frames: slice) -> Condition:
        """For some of the frames."""
        given = None if self.given is None else self.given[:, frames]
        return replace(self, signals={name: value[:, frames] for name, value in self.signals.items()}, given=given)

    def without_text(self, classes: int) -> Condition:
        """With text and class unknown."""
        text = None if self.text is None else torch.zeros_like(self.text)
        return replace(self, text=text, labels=None if self.labels is None else torch.full_like(self.labels, classes))

    def without_signal(self, name: str) -> Condition:
        """With one signal unknown."""
        return replace(self, signals={**self.signals, name: torch.full_like(self.signals[name], math.nan)})


def concatenated(conditions: Sequence[Condition]) -> Condition:
    """Conditions of the same kinds as one of all their rows."""
    first = conditions[0]
    text, labels = (
        None if getattr(first, name) is None else torch.cat([getattr(condition, name) for condition in conditions])
        for name in ("text", "labels")
    )
    signals = {name: torch.cat([condition.signals[name] for condition in conditions]) for name in first.signals}
    return Condition(text, labels, signals)


def padded(condition: Condition, frames: int) -> Condition:
    """With signals of `frames` frames, unknown where there are fewer."""
    signals = {name: F.pad(value, (0, 0, 0, frames - value.shape[1]), value=math.nan) for name, value in
               condition.signals.items()}  # fmt: skip
    return replace(condition, signals=signals)


@dataclass(frozen=True)
class SignalConfig:
    """A per-frame signal that the model takes. frames: video frames that a latent frame stands for, all of whose values
    it gets, one after another.

    discrete: `columns` are the values, each frame counts how often each occurred. continuous: `columns` are numbers;
    their mean and standard deviation over the training set travel with the weights.
    """

    name: str
    kind: Literal["discrete", "continuous"]
    columns: tuple[str, ...]
    frames: int = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a signal is named {self.name[:80]!r}; it must be letters, digits, _ and -, at most 64")
        if not 1 <= len(self.columns) <= MAX_COLUMNS or not 1 <= self.frames <= MAX_COLUMNS:
            raise ValueError(
                f"signal {self.name} has {len(self.columns)} columns and {self.frames} frames; each must be at least 1 "
                f"and at most {MAX_COLUMNS:,}"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (0, len(self.columns)) or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"signal {self.name}: {name} is {values}; it needs a finite number for each of its "
                    f"{len(self.columns)} columns"
                )
        if any(std <= 0 for std in self.std):
            raise ValueError(f"signal {self.name}: std is {self.std}; all must be positive")

    @property
    def width(self) -> int:
        """Numbers of a latent frame."""
        return self.frames * len(self.columns)

    def normalise(self, values: Tensor) -> Tensor:
        """Raw values `[..., width]` with zero mean and unit variance; counts stay counts."""
        if not self.mean:
            return values
        mean, std = (values.new_tensor(moment * self.frames) for moment in (self.mean, self.std))
        return (values - mean) / std


class SignalEmbedding(nn.Module):
    """Embedding of a signal, `[B, T, width] -> [B, T, D]`: a table of discrete values, two linear layers for numbers;
    a vector of its own where it is unknown. Zero at the start, so that a model trained without goes on unchanged."""

    def __init__(self, config: SignalConfig, width: int):
        super().__init__()
        hidden = width if config.kind == "continuous" else config.width
        self.inner = nn.Linear(config.width, width) if config.kind == "continuous" else None
        self.outer = nn.Linear(hidden, width, bias=False)
        self.unknown = nn.Parameter(torch.zeros(width))

    def forward(self, value_BTW: Tensor) -> Tensor:
        known = ~value_BTW.isnan().any(-1, keepdim=True)
        hidden = value_BTW.where(known, 0).to(self.outer.weight.dtype)
        if self.inner is not None:
            hidden = F.silu(self.inner(hidden))
        return torch.where(known, self.outer(hidden), self.unknown)
