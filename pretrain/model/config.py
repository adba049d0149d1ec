"""Configuration of the transformer: everything that fixes the weights' shapes and the function they compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from .noise_gate import Gate, GateConstants, without_correlations
from .output import Prediction
from .scales import Scale, check_scales


@dataclass(frozen=True)
class ModelConfig:
    """width: D, divisible by the number of heads; the heads are those of `scales`, in order.
    patch: side in latents of one token. frames_per_unit: frames of one autoregressive step.
    prediction: what the output layer gives (output.py).
    gate: "logits" adds the noise gate to the logits of past keys, "none" leaves it out (noise_gate.py).
    classes: number of class labels (0: none). text_width: width of text embeddings (0: none).
    The last four are taken from the shards when training starts and travel with the weights: latent
    channels, their mean and standard deviation, and the gate's constants per scale.
    """

    width: int = 128
    depth: int = 6
    scales: tuple[Scale, ...] = (Scale(2, 1, 1, 2, 16), Scale(1, 2, 1, 8), Scale(1, 4, 4, None))
    patch: int = 2
    frames_per_unit: int = 1
    mlp_ratio: float = 4.0
    gate: Gate = "logits"
    prediction: Prediction = "preconditioned"
    rope_theta: float = 10_000.0
    classes: int = 0
    text_width: int = 0
    channels: int = 0
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    gate_constants: tuple[GateConstants, ...] = ()

    def __post_init__(self):
        if not self.scales:
            raise ValueError("model.scales is empty; at least one scale is needed")
        if self.gate not in get_args(Gate):
            raise ValueError(
                f"model.gate is {self.gate!r}; it must be one of {', '.join(get_args(Gate))} "
                "(values, mix and pair, of earlier versions, were no better and are gone)"
            )
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"model.prediction is {self.prediction!r}; it must be one of {', '.join(get_args(Prediction))}"
            )
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} does not divide by the scales' {self.heads} heads")
        if self.head_width < 8 or self.head_width % 2:
            raise ValueError(
                f"model.width {self.width} over {self.heads} heads gives a head width of {self.head_width}; "
                "it must be even and at least 8"
            )
        if self.hidden < 1:
            raise ValueError(f"model.mlp_ratio is {self.mlp_ratio}; it must be positive")
        for name in ("depth", "patch", "frames_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def heads(self) -> int:
        return sum(scale.heads for scale in self.scales)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    @staticmethod
    def from_dict(values: dict) -> ModelConfig:
        """From plain JSON values; ValueError names unknown keys and values that do not fit."""
        values = dict(values)
        if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(ModelConfig)}):
            raise ValueError(f"unknown: {', '.join(unknown)}")
        values["scales"] = tuple(Scale(**scale) for scale in values["scales"])
        for name in ("latent_mean", "latent_std"):
            values[name] = tuple(values[name])
        values["gate_constants"] = tuple(GateConstants(*row) for row in without_correlations(values["gate_constants"]))
        return ModelConfig(**values)


def check_clip(config: ModelConfig, frames: int, height: int, width: int) -> None:
    """Raise ValueError if a clip of `frames × height × width` latents does not fit the model's scales and patches."""
    for name, side in (("height", height), ("width", width)):
        if side % config.patch:
            raise ValueError(f"the latent {name} of {side} does not divide by model.patch {config.patch}")
    check_scales(config.scales, config.heads, (height // config.patch, width // config.patch))
    if frames % config.frames_per_unit:
        raise ValueError(f"{frames} latent frames do not divide into units of {config.frames_per_unit} frames")
