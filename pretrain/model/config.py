"""Configuration of the transformer: everything that fixes the weights' shapes and the function they compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

from .conditioning import SignalConfig
from .noise_gate import Gate, GateConstants, without_correlations
from .output import Prediction
from .scales import Scale, check_scales

MAX_SIGNALS = 16
RopeKind = Literal["msc", "wan", "ltx"]
LARGEST = 1 << 20  # of any size: far beyond models that can be trained, and small enough for a clear error


@dataclass(frozen=True)
class LayerConfig:
    """Where the layers of published models differ from ours, whose are the defaults (checkpoints/pretrained.py).

    bias: whether the projections of both attentions have one.
    norm: of what enters self-attention and feed-forward.
    cross_norm: whether what attends to text is normalised.
    qk_norm: of queries and keys: "head", every head by itself, after pooling; "width", all heads together, before.
    qk_eps: added to the mean square of that (to that of single heads of self-attention 1e-6).
    text_hidden: whether two layers embed text, not one.
    text_tokens: how many tokens of a text are attended to, zeros past its end included (0: its own).
    given_channels: further channels of the input: a mask, then the latents that are given (Wan's image to video).
    image_width: of image embeddings that are attended to beside the text (0: none).
    final_table: whether the last modulation is the frame's embedding plus a table, not a linear layer of it.
    rope: how channels share positions out (rope.py).
    rope_steps: seconds, rows and columns of pixels from a latent to the next, for "ltx".
    """

    bias: bool = False
    norm: Literal["layer", "rms"] = "layer"
    cross_norm: bool = True
    qk_norm: Literal["head", "width"] = "head"
    qk_eps: float = 1e-6
    text_hidden: bool = False
    text_tokens: int = 0
    given_channels: int = 0
    image_width: int = 0
    final_table: bool = False
    rope: RopeKind = "msc"
    rope_steps: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        allowed = {"norm": ("layer", "rms"), "qk_norm": ("head", "width"), "rope": get_args(RopeKind)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"model.layers.{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}"
                )
        for name in ("text_tokens", "given_channels", "image_width"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise ValueError(
                    f"model.layers.{name} is {getattr(self, name)}; it must be at least 0 and at most {LARGEST:,}"
                )
        if not 0 < self.qk_eps < 1 or not all(0 < step < math.inf for step in self.rope_steps):
            raise ValueError("model.layers.qk_eps must lie between 0 and 1, rope_steps be positive and finite")


@dataclass(frozen=True)
class ModelConfig:
    """width: D, divisible by the number of heads; the heads are those of `scales`, in order.
    patch: side in latents of one token. frames_per_unit: frames of one autoregressive step.
    prediction: what the output layer gives (output.py).
    gate: "logits" adds the noise gate to the logits of past keys, "none" leaves it out (noise_gate.py).
    classes: number of class labels (0: none). text_width: width of text embeddings (0: none).
    layers: where its layers are those of a published model, to start from its weights (train.init_from).
    The last five are taken from the shards when training starts and travel with the weights: latent channels, their
    mean and standard deviation, the gate's constants per scale, and the per-frame signals.
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
    layers: LayerConfig = field(default_factory=LayerConfig)
    channels: int = 0
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    gate_constants: tuple[GateConstants, ...] = ()
    signals: tuple[SignalConfig, ...] = ()

    def __post_init__(self):
        if not self.scales:
            raise ValueError("model.scales is empty; at least one scale is needed")
        if self.gate not in get_args(Gate):
            raise ValueError(
                f"model.gate is {self.gate!r}; it must be one of {', '.join(get_args(Gate))} "
                "(values, mix and pair, of earlier versions, were no better and are gone)"
            )
        sizes = {"width": 1, "depth": 1, "patch": 1, "frames_per_unit": 1, "classes": 0, "text_width": 0, "channels": 0}
        for name, least in sizes.items():
            if not least <= getattr(self, name) <= LARGEST:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}; it must be at least {least} and at most {LARGEST:,}"
                )
        if not 0 < self.mlp_ratio <= LARGEST or self.hidden < 1:
            raise ValueError(f"model.mlp_ratio is {self.mlp_ratio}; it must be positive and at most {LARGEST:,}")
        if not 1 <= self.rope_theta < math.inf:
            raise ValueError(f"model.rope_theta is {self.rope_theta}; it must be at least 1 and finite")
        for scale in self.scales:
            for name, value in vars(scale).items():
                if value is not None and value > LARGEST:
                    raise ValueError(f"scale {name} is {value}; it must be at most {LARGEST:,}")
        for name in ("latent_mean", "latent_std", "gate_constants"):
            values = getattr(self, name)
            if not all(map(math.isfinite, chain(*values) if name == "gate_constants" else values)):
                raise ValueError(f"model.{name} holds a number that is not finite: {values}")
        if any(std <= 0 for std in self.latent_std):
            raise ValueError(f"model.latent_std is {self.latent_std}; all must be positive")
        if len({signal.name for signal in self.signals}) < len(self.signals) or len(self.signals) > MAX_SIGNALS:
            names = ", ".join(signal.name for signal in self.signals)[:200]
            raise ValueError(f"model.signals are {names}; their names must differ, and there may be {MAX_SIGNALS}")
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"model.prediction is {self.prediction!r}; it must be one of {', '.join(get_args(Prediction))}"
            )
        if self.channels and 0 < self.layers.given_channels < self.channels:
            raise ValueError(
                f"model.layers.given_channels is {self.layers.given_channels}; it holds latents of {self.channels}"
            )
        if self.layers.image_width and not self.text_width:
            raise ValueError("model.layers.image_width needs text (model.text_width), which it is attended to beside")
        if self.layers.rope == "ltx" and self.gate != "none":
            raise ValueError("model.layers.rope is 'ltx', which leaves no channels for a gate: set model.gate=none")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} does not divide by the scales' {self.heads} heads")
        if self.head_width < 8 or self.head_width % 2:
            raise ValueError(
                f"model.width {self.width} over {self.heads} heads gives a head width of {self.head_width}; "
                "it must be even and at least 8"
            )

    @property
    def heads(self) -> int:
        return sum(scale.heads for scale in self.scales)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def patch_values(self) -> int:
        """Numbers of the input that make up one token."""
        return (self.channels + self.layers.given_channels) * self.patch**2

    @staticmethod
    def from_earlier_version(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The plain values of a file as this version writes them."""
        if "gate_constants" not in values:
            return values
        return {**values, "gate_constants": without_correlations(values["gate_constants"])}


def check_complete(config: ModelConfig) -> None:
    """Raise ValueError unless all that is taken from the shards is there, and is of this model."""
    if config.channels < 1:
        raise ValueError("model.channels is 0; it is taken from the shards' index when training starts")
    lengths = {"latent_mean": config.channels, "latent_std": config.channels, "gate_constants": len(config.scales)}
    for name, length in lengths.items():
        if len(getattr(config, name)) not in (0, length):
            per = "scale" if name == "gate_constants" else "channel"
            raise ValueError(f"model.{name} has {len(getattr(config, name))} entries; it needs {length}, one a {per}")


def check_clip(config: ModelConfig, frames: int, height: int, width: int) -> None:
    """Raise ValueError if a clip of `frames × height × width` latents does not fit the model's scales and patches."""
    for name, side in (("height", height), ("width", width)):
        if side % config.patch:
            raise ValueError(f"the latent {name} of {side} does not divide by model.patch {config.patch}")
    check_scales(config.scales, config.heads, (height // config.patch, width // config.patch))
    if frames % config.frames_per_unit:
        raise ValueError(f"{frames} latent frames do not divide into units of {config.frames_per_unit} frames")
