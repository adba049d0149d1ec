"""Output: the velocity that the last layer's numbers stand for, by what the network is made to predict."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["preconditioned", "velocity", "x"]
LEAST_T = 0.05  # the noise level below which a predicted x is not divided by less


def velocity(prediction: Prediction, x_BTCHW: Tensor, t_BT: Tensor, output_BTCHW: Tensor) -> Tensor:
    """Velocity `ε - x` of noisy latents, `[B, T, C, H, W]` in their type.

    "preconditioned": the best linear guess plus the output (`precondition`); "velocity": the output as it is; "x": the
    output is the clean x (Li and He 2025, "Back to basics: let denoising generative models denoise").
    """
    if prediction == "preconditioned":
        return precondition(x_BTCHW, t_BT, output_BTCHW)
    if prediction == "velocity":
        return output_BTCHW.to(x_BTCHW.dtype)
    t = t_BT[:, :, None, None, None].clamp(min=LEAST_T)
    return ((x_BTCHW.to(t.dtype) - output_BTCHW.to(t.dtype)) / t).to(x_BTCHW.dtype)


def precondition(x_BTCHW: Tensor, t_BT: Tensor, residual_BTCHW: Tensor) -> Tensor:
    """Velocity from the network's output: the best linear guess from x_t alone, plus a unit-variance rest.

    The idea of Karras et al. 2022 (EDM) worked out for rectified flow on unit-variance data: with
    `n² = t² + (1-t)²`, `E[v x_t] / E[x_t²] = (2t-1) / n²`, and what remains of v has variance `1 / n²`.
    """
    t = t_BT[:, :, None, None, None]
    variance = t.square() + (1 - t).square()
    velocity = (2 * t - 1) / variance * x_BTCHW + residual_BTCHW.to(t.dtype) * variance.rsqrt()
    return velocity.to(x_BTCHW.dtype)
