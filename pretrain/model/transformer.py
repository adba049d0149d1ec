"""The causal video diffusion transformer: noisy latents and their noise levels in, velocity out.

One forward pass denoises every frame of a video at once, each at its own noise level, each seeing only
its own unit and earlier ones; the same weights generate frame by frame (sampler.py). Needs torch, and
safetensors to load an exported folder; nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..kernels.dispatch import Kernel
from .attention_inputs import AttentionInputs
from .conditioning import Condition, SignalEmbedding
from .config import ModelConfig
from .exported_weights import ExportedWeights, open_exported
from .layers import Block, FeedForward, ImageEmbedding, ModulationTable, NoiseEmbedding, Text
from .output import velocity
from .past_context import Layer, PastContext, WholeVideo
from .recomputation import Recompute, recompute_all

M = TypeVar("M", bound=nn.Module)
OnPartBuilt = Callable[[str, nn.Module], None]  # called with the name and the module of a part of the model


class MSCTransformer(nn.Module):
    """Multi-scale causal video diffusion transformer."""

    def __init__(
        self,
        config: ModelConfig,
        kernel: Kernel = "auto",
        recompute: Recompute = "none",
        on_part_built: OnPartBuilt | None = None,
    ):
        """kernel: which computes attention (kernels/dispatch.py). recompute: what blocks do not keep
        (recomputation.py).
        on_part_built: called with the name and module of every block, and of every layer outside of blocks, as soon as
        it has its first weights: what takes them from elsewhere, or keeps only a rank's share of them, does it there.
        """
        super().__init__()
        if config.channels < 1:
            raise ValueError("model.channels is 0; it is taken from the shards' index when training starts")
        self.config, self.kernel, self.recompute = config, kernel, recompute
        width = config.width

        def new(name: str, module: M, zero: bool = False) -> M:
            init_weights(module, config.depth)
            if zero:
                nn.init.zeros_(module.get_parameter("weight"))
            if on_part_built is not None:
                on_part_built(name, module)
            return module

        self.embed = new("embed", nn.Linear(config.patch_values, width))
        self.noise = new("noise", NoiseEmbedding(width))
        self.modulate = new("modulate", nn.Linear(width, 6 * width), zero=True)
        self.label = None
        if config.classes:  # its own first weights would import the compiler where the device is "meta"
            table = torch.empty(config.classes + 1, width)
            self.label = new("label", nn.Embedding.from_pretrained(table, freeze=False))
        self.signals = nn.ModuleList()
        for number, signal in enumerate(config.signals):
            self.signals.append(new(f"signals.{number}", SignalEmbedding(signal, width)))
        self.text = None
        if config.text_width:
            hidden = config.layers.text_hidden
            text = FeedForward(config.text_width, width, width) if hidden else nn.Linear(config.text_width, width)
            self.text = new("text", text)
        images = config.layers.image_width
        self.image = new("image", ImageEmbedding(images, width)) if images else None
        self.blocks = nn.ModuleList()
        for layer in range(config.depth):
            self.blocks.append(new(f"blocks.{layer}", Block(config, bool(layer % 2), recompute)))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        final_modulate = ModulationTable(width) if config.layers.final_table else nn.Linear(width, 2 * width)
        self.final_modulate = new("final_modulate", final_modulate, zero=True)
        self.final = new("final", nn.Linear(width, config.channels * config.patch**2), zero=True)

    def forward(
        self,
        x_BTCHW: Tensor,
        t_BT: Tensor,
        condition: Condition | None = None,
        past_context: PastContext | None = None,
        all_t_BT: Tensor | None = None,
    ) -> Tensor:
        """Velocity `ε - x` of every frame, `[B, T, C, H, W]` in the type of x.

        x: noisy normalised latents of the own frames; t: their noise levels in [0, 1]; condition: text, classes and
        signals of these frames (default: all unknown); past_context: where the frames lie in their video and where to
        get the past from (default: the whole video is here); all_t: noise levels of all frames of the video, if they
        are known (default: the past_context brings what is needed).
        """
        config, past_context = self.config, past_context or WholeVideo()
        condition = condition or Condition()
        kind = self.embed.weight.dtype
        given = (self._given(x_BTCHW, t_BT, condition),) if config.layers.given_channels else ()
        tokens = self.embed(patchify(torch.cat((x_BTCHW, *given), 2) if given else x_BTCHW, config.patch).to(kind))
        inputs = self.attention_inputs.prepare(t_BT, (tokens.shape[2], tokens.shape[3]), past_context, all_t_BT)
        embedding = self._frame_embedding(t_BT, condition)
        text = None if self.text is None else self._text(condition, x_BTCHW)
        modulation = self.modulate(torch.nn.functional.silu(embedding)).unflatten(-1, (6, -1))
        for number, block in enumerate(self.blocks):
            arguments = (tokens, modulation, text, inputs, Layer(number))
            if self.recompute == "full" and torch.is_grad_enabled():
                tokens = recompute_all(block, *arguments)
            elif past_context.grows:
                tokens = block._call_impl(*arguments)  # as it is, compiled or not
            else:
                tokens = block(*arguments)
        shift, scale = self.final_modulate(embedding)[:, :, None, None].chunk(2, -1)
        output = self.final(self.final_norm(tokens) * (1 + scale) + shift)
        return velocity(config.prediction, x_BTCHW, t_BT, unpatchify(output, config.patch, config.channels))

    def _given(self, x_BTCHW: Tensor, t_BT: Tensor, condition: Condition) -> Tensor:
        """Mask and latents of what is given of every frame: all of a frame without noise, nothing of others."""
        if condition.given is not None:
            return condition.given.to(x_BTCHW.dtype)
        clean = (t_BT == 0)[:, :, None, None, None].to(x_BTCHW.dtype)
        masks = self.config.layers.given_channels - self.config.channels
        return torch.cat((clean.expand(-1, -1, masks, *x_BTCHW.shape[3:]), clean * x_BTCHW), 2)

    def _text(self, condition: Condition, x_BTCHW: Tensor) -> Text:
        """What videos x attend to; a zero token where it is unknown."""
        assert self.text is not None

        def known(value_BLE: Tensor | None, width: int) -> Tensor:
            value_BLE = x_BTCHW.new_zeros(x_BTCHW.shape[0], 1, width) if value_BLE is None else value_BLE
            return value_BLE.to(self.embed.weight.dtype)

        text_BLE, tokens = known(condition.text, self.config.text_width), self.config.layers.text_tokens
        image = None if self.image is None else self.image(known(condition.image, self.config.layers.image_width))
        if tokens:
            if text_BLE.shape[1] > tokens:
                raise ValueError(f"a text has {text_BLE.shape[1]} tokens; model.layers.text_tokens is {tokens}")
            text_BLE = torch.nn.functional.pad(text_BLE, (0, 0, 0, tokens - text_BLE.shape[1]))
            return Text(self.text(text_BLE), None, image)
        # Clips' texts differ in length and are padded with zeros. A dropped text is a single zero token,
        # however long its row, so that it is the same in every batch.
        seen_BL = (text_BLE != 0).any(-1)
        seen_BL = torch.cat((torch.ones_like(seen_BL[:, :1]), seen_BL[:, 1:]), 1)
        return Text(self.text(text_BLE), seen_BL, image)

    def _frame_embedding(self, t_BT: Tensor, condition: Condition) -> Tensor:
        """What modulates a frame, `[B, T, D]`: its noise level, the class of its clip, its signals."""
        embedding = self.noise(t_BT)
        if self.label is not None:
            none = torch.full((len(t_BT),), self.config.classes, device=t_BT.device)
            embedding = embedding + self.label(none if condition.labels is None else condition.labels)[:, None]
        for signal, module in zip(self.config.signals, self.signals, strict=True):
            value = condition.signals.get(signal.name)
            if value is None:
                value = t_BT.new_full((*t_BT.shape, signal.width), torch.nan)
            embedding = embedding + module(value)
        return embedding

    @property
    def attention_inputs(self) -> AttentionInputs:
        return AttentionInputs(self.config, self.kernel)

    # Latents as the autoencoder gives them <-> zero mean, unit variance per channel ---------------------

    def normalise(self, latents_TCHW: Tensor) -> Tensor:
        mean, std = self._moments(latents_TCHW)
        return (latents_TCHW - mean) / std

    def denormalise(self, x_TCHW: Tensor) -> Tensor:
        mean, std = self._moments(x_TCHW)
        return x_TCHW * std + mean

    def normalise_signals(self, signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw values `[B, T, width]` of the signals that the model knows, as `Condition` holds them."""
        known = {signal.name: signal for signal in self.config.signals}
        return {name: known[name].normalise(value) for name, value in signals.items() if name in known}

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config.channels
        mean = self.config.latent_mean or (0.0,) * channels
        std = self.config.latent_std or (1.0,) * channels
        return like.new_tensor(mean)[:, None, None], like.new_tensor(std)[:, None, None]

    # Exported weights ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, weights: str | None = None, dtype: torch.dtype | None = None
    ) -> MSCTransformer:
        """Load a folder that `msc export` wrote, for computing with it.

        weights: "ema" (averaged) or "raw" (None: the first that the folder has). dtype: None as stored.
        Raises FileNotFoundError where files are missing, ValueError where they are damaged or do not match.
        """
        exported = open_exported(Path(folder), weights)
        model = cls.described(exported)
        model.load_state_dict(dict(exported.tensors(dtype)), assign=True)
        return model.eval()

    @classmethod
    def described(cls, exported: ExportedWeights) -> MSCTransformer:
        """The model of an exported folder, without its weights; ValueError if config.json does not describe them."""
        with torch.device("meta"):
            model = cls(exported.config.model)
        exported.check(model.shapes())
        return model

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that must be kept of the model."""
        return {name: tuple(value.shape) for name, value in self.state_dict().items()}

    def config_dict(self) -> dict:
        return dataclasses.asdict(self.config)


def init_weights(part: nn.Module, depth: int) -> None:
    """Normal weights of variance 1/fan-in, residual branches scaled by the model's depth (Peebles & Xie 2022)."""
    if next(part.parameters()).is_meta:  # a shape alone; to fill it would import the compiler, a second or more
        return
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    if isinstance(part, SignalEmbedding):
        nn.init.zeros_(part.outer.weight)
    if isinstance(part, Block):
        # Normalised q and k of few channels cannot single out one of a thousand keys: start sharper.
        for gain in (part.attention.q_gain, part.attention.k_gain):
            nn.init.constant_(gain, 2.0)
        for layer in (part.attention.out, part.feed_forward.down):
            nn.init.normal_(layer.weight, std=(layer.in_features * 2 * depth) ** -0.5)
        if part.cross_attention is not None:
            nn.init.zeros_(part.cross_attention.out.weight)
        with torch.no_grad():
            part.modulation[2].fill_(1.0)
            part.modulation[5].fill_(1.0)


def patchify(x_BTCHW: Tensor, patch: int) -> Tensor:
    """`[B, T, C, H·p, W·p] -> [B, T, H, W, C·p·p]`."""
    x = x_BTCHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


def unpatchify(x_BTHWD: Tensor, patch: int, channels: int) -> Tensor:
    """Inverse of `patchify`."""
    x = x_BTHWD.unflatten(4, (channels, patch, patch)).permute(0, 1, 4, 2, 5, 3, 6)
    return x.flatten(5, 6).flatten(3, 4)
