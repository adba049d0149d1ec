"""Configuration of the noise that training draws; an export carries it, and needs nothing else of `diffusion`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DiffusionConfig:
    """How training draws noise levels.

    mean, std: of the logit-normal distribution of t (Esser et al. 2024).
    shift: t -> shift·t / (1 + (shift-1)·t); null: sqrt(latents of a frame / 4096), as larger frames need
        more noise for the same loss of information (Esser et al. 2024; 4,096 latents are their 512² pixels).
    clean: share of units that stay clean context (t = 0, out of the loss).
    prefix: share of clips that instead begin with a clean prefix, uniform in length, and are noisy from there on, as
        in generation: it makes a model learn to look far back.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float | None = None
    clean: float = 0.25
    prefix: float = 0.0

    def __post_init__(self):
        if not 0 <= self.clean < 1:
            raise ValueError(f"diffusion.clean is {self.clean}; it must lie in [0, 1), or nothing is left to learn")
        if not 0 <= self.prefix <= 1:
            raise ValueError(f"diffusion.prefix is {self.prefix}; it is a share of the clips, from 0 to 1")
        if not 0 < self.std < math.inf or not (self.shift is None or 0 < self.shift < math.inf):
            raise ValueError(f"diffusion.std ({self.std}) and diffusion.shift ({self.shift}) must be positive, finite")
        if not math.isfinite(self.mean):
            raise ValueError(f"diffusion.mean is {self.mean}; it must be finite")
