"""Rectified flow with a noise level per frame: noise, training loss and sampling steps, as pure functions.

`x_t = (1-t) x + t ε`, target velocity `ε - x`. Noise and t of a frame are functions of (seed, sample,
epoch, frame) alone, so that they do not depend on ranks, workers, accumulation or resumption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..noise_config import DiffusionConfig

_LEVELS, _NOISE, _TEXT, _SIGNALS = 0, 1, 2, 3  # streams of random numbers


def frame_shift(config: DiffusionConfig, height: int, width: int) -> float:
    return config.shift if config.shift is not None else (height * width / 4096) ** 0.5


def shift_levels(t: np.ndarray, shift: float) -> np.ndarray:
    """Move noise levels towards 1 (shift > 1) or 0 (shift < 1), keeping both ends."""
    return shift * t / (1 + (shift - 1) * t)


def _generator(seed: int, sample: int, epoch: int, frame: int, stream: int) -> np.random.Generator:
    # Philox is counter based: the drawing itself only moves the counter's lowest word.
    return np.random.Generator(np.random.Philox(key=[seed, sample], counter=[0, frame, epoch, stream]))


def noise_levels(
    config: DiffusionConfig,
    shift: float,
    seed: int,
    sample: int,
    epoch: int,
    units: int,
    frames_per_unit: int,
) -> Tensor:
    """Noise level of every frame of a clip, `[T]` float32: one draw per unit; 0 for clean context.

    Drawn for a clip as a whole, so that any share of its frames gets the same.
    """
    random = _generator(seed, sample, epoch, 0, _LEVELS)
    logits = config.mean + config.std * random.standard_normal(units)
    t = shift_levels(1 / (1 + np.exp(-logits)), shift)
    clean = random.random(units) < config.clean
    if config.prefix and random.random() < config.prefix:
        clean = np.arange(units) < random.integers(units)
    if clean.all():
        clean[-1] = False  # a clip without a single noisy unit would teach nothing
    t = np.where(clean, 0.0, t)
    return torch.from_numpy(np.repeat(t, frames_per_unit).astype(np.float32))


def frame_noise(seed: int, sample: int, epoch: int, frames: range, shape: Sequence[int]) -> Tensor:
    """Unit normal noise of some frames of a clip, `[len(frames), *shape]` float32."""
    rows = [_generator(seed, sample, epoch, f, _NOISE).standard_normal(shape, np.float32) for f in frames]
    return torch.from_numpy(np.stack(rows))


def keep_condition(dropped: float, seed: int, clips: Sequence[tuple[int, int]], signal: int | None = None) -> Tensor:
    """Which clips, named (sample, epoch), keep their text and label (or a signal, by its number): `[B]`."""
    place = (0, _TEXT) if signal is None else (signal, _SIGNALS)
    return torch.tensor([_generator(seed, *clip, *place).random() >= dropped for clip in clips])


def add_noise(x_BTCHW: Tensor, noise_BTCHW: Tensor, t_BT: Tensor) -> Tensor:
    t = t_BT[:, :, None, None, None]
    return (1 - t) * x_BTCHW + t * noise_BTCHW


def sampling_levels(steps: int, shift: float = 1.0) -> list[float]:
    """`steps + 1` noise levels from 1 down to 0."""
    return shift_levels(1 - np.arange(steps + 1) / steps, shift).tolist()
