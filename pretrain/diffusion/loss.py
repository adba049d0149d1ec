"""Training loss: the mean squared error of the velocity over the supervised frames of the global batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """The objective of training, held-out evaluation and benchmarks.

    The model predicts the velocity: preconditioning (`model.output`) is part of the network, as the
    sampler and exported weights need it too. Weighting: all supervised frames weigh the same whatever their noise;
    how often a level is trained is up to its distribution (`DiffusionConfig`), as in Esser et al. 2024.
    """

    def target(self, x_BTCHW: Tensor, noise_BTCHW: Tensor) -> Tensor:
        """The velocity `ε - x` of rectified flow."""
        return noise_BTCHW - x_BTCHW

    def supervised(self, t_BT: Tensor) -> Tensor:
        """Which frames count: clean ones are context only."""
        return t_BT > 0

    def per_frame(self, velocity_BTCHW: Tensor, x_BTCHW: Tensor, noise_BTCHW: Tensor) -> Tensor:
        """Mean squared error of every frame, `[B, T]` float32."""
        return (velocity_BTCHW.float() - self.target(x_BTCHW, noise_BTCHW).float()).square().mean((2, 3, 4))

    def mean(self, errors_BT: Tensor, t_BT: Tensor, frames: Tensor | float | None = None) -> Tensor:
        """These frames' part of the mean over `frames` supervised frames (None: over these only).

        frames: of the global batch, over all ranks and micro-batches, so that the sum of all parts is the loss however
        frames are sharded.
        """
        supervised = self.supervised(t_BT)
        return (errors_BT * supervised).sum() / (supervised.sum() if frames is None else frames)
