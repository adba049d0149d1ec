"""Latent space of a model: what an export and a run keep of the shards that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msc.datasets.shards.index import Index


@dataclass(frozen=True)
class LatentSpace:
    """What must be known of the latents to turn the model's output into video."""

    autoencoder: str
    frames: int
    height: int
    width: int
    video_height: int
    video_width: int
    fps: float

    def __post_init__(self):
        largest = {"frames": 1 << 20, "height": 1 << 16, "width": 1 << 16, "video_height": 1 << 16,
                   "video_width": 1 << 16}  # fmt: skip
        for name, most in largest.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least 1 and at most {most:,}")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"data.fps is {self.fps}; it must be above 0 and at most 1000")

    @staticmethod
    def of(index: Index) -> LatentSpace:
        return LatentSpace(
            index.autoencoder, index.frames, index.height, index.width, index.video_height, index.video_width, index.fps
        )
