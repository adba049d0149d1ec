"""Published models: weights of diffusers' video transformers as weights of ours, and back.

Wan 2.1 and 2.2 (WanTransformer3DModel) and LTX-Video (LTXVideoTransformer3DModel). Which tensors of theirs make up one
of ours is a table of names; a row of ours is a row of theirs, so that the way back is the same table read backwards.
Two orders differ. Rotary embedding: ours turns channels i and d/2 + i of a head together, theirs 2i and 2i + 1. The
last layer: ours gives a patch channel by channel, theirs pixel by pixel. Only safetensors are read, a tensor at a
time; diffusers itself is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.config import LayerConfig, ModelConfig
from ..model.exported_weights import Shapes, abbreviated, open_safetensors
from ..model.scales import Scale
from ..typed_values import read_json

WAN_LAYERS = LayerConfig(
    bias=True, qk_norm="width", text_hidden=True, text_tokens=512, final_table=True, rope="wan"
)  # fmt: skip
LTX_LAYERS = LayerConfig(  # of 25 frames a second, latents of 8 frames by 32 × 32 pixels
    bias=True, norm="rms", cross_norm=False, qk_norm="width", qk_eps=1e-5, text_hidden=True, final_table=True,
    rope="ltx", rope_steps=(8 / 25, 32.0, 32.0),
)  # fmt: skip
PREFIX = "diffusers:"
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Part:
    """A tensor of theirs that makes up rows of one of ours. rows: which of theirs is each of ours (None: the same)."""

    name: str
    shape: tuple[int, ...]
    rows: Tensor | None = None


Parts = dict[str, tuple[Part, ...]]  # of every tensor of ours, theirs, one after another


def is_pretrained(place: str) -> bool:
    """Whether `train.init_from` names a folder of diffusers."""
    return place.startswith(PREFIX)


def absolute(place: str) -> str:
    """A value of `train.init_from` by its absolute path."""
    if is_pretrained(place):
        return f"{PREFIX}{Path(place.removeprefix(PREFIX)).expanduser().absolute()}"
    return str(Path(place).absolute()) if place else place


@dataclass(frozen=True)
class Pretrained:
    """A transformer in a folder of diffusers, whose files' headers have been read.

    config: the model of ours that computes the same where a unit is a whole clip. files: where each of theirs is.
    """

    folder: Path
    config: ModelConfig
    parts: Parts
    files: Mapping[str, Path]

    @property
    def autoencoder(self) -> str:
        """Of the latents, as `msc convert` names it, if the folder is a pipeline's."""
        return f"{PREFIX}{self.folder.parent}" if (self.folder.parent / "vae").is_dir() else "unknown"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of our tensors."""
        return {name: joined_shape(parts) for name, parts in self.parts.items()}

    def tensor(self, name: str) -> Tensor:
        """One of our tensors, in fp32."""
        made = []
        for part in self.parts[name]:
            with open_safetensors(self.files[part.name]) as opened:
                rows = opened.get_tensor(part.name).float().reshape(-1, *joined_shape((part,))[1:])
            made.append(rows if part.rows is None else rows[part.rows])
        return made[0] if len(made) == 1 else torch.cat(made)


def open_pretrained(place: str) -> Pretrained:
    """Open "diffusers:FOLDER", a transformer's folder or that of a pipeline which has one.

    FileNotFoundError where files are missing; ValueError for another class, for settings that ours cannot express, and
    for tensors that are missing, left over or of another shape, by name.
    """
    folder = Path(place.removeprefix(PREFIX)).expanduser()
    if not (folder / "config.json").is_file() and (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not a transformer saved by diffusers")
    settings = read_json(folder / "config.json")
    kind = settings.get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{folder} holds {kind!r}; only {' and '.join(FAMILIES)} can be taken")
    config_of, parts_of = FAMILIES[kind]
    try:
        config = config_of(settings)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a {kind}: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    files, shapes = tensor_files(folder)
    parts = parts_of(config)
    expected = {part.name: part.shape for group in parts.values() for part in group}
    wrong = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "left over": sorted(shapes.keys() - expected.keys()),
        "of another shape": sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]),
    }
    if any(wrong.values()):
        text = "; ".join(f"{what}: {abbreviated(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{folder} does not hold the weights of the {kind} that its config.json describes: {text}")
    return Pretrained(folder, config, parts, files)


def tensor_files(folder: Path) -> tuple[dict[str, Path], Shapes]:
    """Where each tensor of a folder of diffusers is, and its shape, from the files' headers."""
    index, names = folder / f"{STEM}.safetensors.index.json", [f"{STEM}.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map of files beside it")
        names = sorted(set(map(str, weight_map.values())))
    files, shapes = {}, {}
    for name in names:
        path = folder / Path(name).name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not whole: {path.name} is missing (weights must be safetensors)")
        with open_safetensors(path) as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                if "norm_added_q" not in key:  # in files of some versions, used by none: diffusers ignores it as well
                    files[key], shapes[key] = path, tuple(opened.get_slice(key).get_shape())
    return files, shapes


def joined_shape(parts: tuple[Part, ...]) -> tuple[int, ...]:
    """Shape of our tensor: their rows one after another, each flattened, and of a table `[1, rows, D]` its own."""
    shape = parts[0].shape[1:] if parts[0].shape[0] == 1 else parts[0].shape
    rows = len(parts) * shape[0]
    return (rows, math.prod(shape[1:])) if len(shape) > 1 else (rows,)


def unsupported(config: ModelConfig) -> str:
    """Why a model of ours is none that diffusers' classes can hold ("": it is)."""
    return "" if config.layers.rope in KINDS else f"model.layers.rope is {config.layers.rope!r}, not that of {KINDS}"


@dataclass(frozen=True)
class Source:
    """Rows of one of our tensors that make up one of theirs."""

    name: str
    first: int
    part: Part

    def of(self, ours: Tensor) -> Tensor:
        """Their tensor."""
        value = ours[self.first : self.first + joined_shape((self.part,))[0]]
        if self.part.rows is not None:
            value = value[self.part.rows.argsort()]
        return value.reshape(self.part.shape).contiguous()


def sources(config: ModelConfig) -> dict[str, Source]:
    """Of each of their tensors, where it lies in ours."""
    by_name = {}
    for name, parts in FAMILIES[KINDS[config.layers.rope]][1](config).items():
        for number, part in enumerate(parts):
            by_name[part.name] = Source(name, number * joined_shape((part,))[0], part)
    return by_name


# The families: our configuration of theirs, and the parts of our tensors ------------------------------------------


def require(settings: Mapping[str, Any], **supported: Any) -> None:
    """ValueError where a setting is another than the one that our layers can express."""
    for name, value in supported.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name} is {settings[name]!r}; only {value!r} can be taken")


def wan_config(settings: Mapping[str, Any]) -> ModelConfig:
    patch = settings["patch_size"]
    require(
        settings, patch_size=[1, patch[1], patch[1]], freq_dim=256, cross_attn_norm=True, eps=1e-6,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    images = settings.get("image_dim") or 0
    require(settings, pos_embed_seq_len=None, added_kv_proj_dim=width if images else None)
    channels = settings.get("out_channels") or settings["in_channels"]
    layers = replace(WAN_LAYERS, given_channels=settings["in_channels"] - channels, image_width=images)
    return dense_config(settings, layers, settings["ffn_dim"], settings["text_dim"], channels, patch[1])


def ltx_config(settings: Mapping[str, Any]) -> ModelConfig:
    require(
        settings, patch_size=1, patch_size_t=1, activation_fn="gelu-approximate", qk_norm="rms_norm_across_heads",
        norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True, attention_out_bias=True,
    )  # fmt: skip
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    require(settings, cross_attention_dim=width, out_channels=settings["in_channels"])
    return dense_config(settings, LTX_LAYERS, 4 * width, settings["caption_channels"], settings["in_channels"], 1)


def dense_config(
    settings: Mapping[str, Any], layers: LayerConfig, hidden: int, text_width: int, channels: int, patch: int
) -> ModelConfig:
    heads = settings["num_attention_heads"]
    width = heads * settings["attention_head_dim"]
    return ModelConfig(
        width=width, depth=settings["num_layers"], scales=(Scale(heads),), patch=patch, mlp_ratio=hidden / width,
        gate="none", prediction="velocity", text_width=text_width, layers=layers, channels=channels,
        latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels,
    )  # fmt: skip


def wan_parts(config: ModelConfig) -> Parts:
    width, patch = config.width, config.patch
    embedding = Part("patch_embedding.weight", (width, config.patch_values // patch**2, 1, patch, patch))
    return {
        "embed.weight": (embedding,),
        "embed.bias": (Part("patch_embedding.bias", (width,)),),
        **common_parts(
            config, "condition_embedder.time_embedder", "condition_embedder.time_proj",
            "condition_embedder.text_embedder", "blocks", "ffn", (1,),
        ),
        **(image_parts(config) if config.layers.image_width else {}),
    }  # fmt: skip


def image_parts(config: ModelConfig) -> Parts:
    """Of Wan 2.1's image to video."""
    width, images, theirs = config.width, config.layers.image_width, "condition_embedder.image_embedder"
    parts = {
        **norm("image.norm_in", f"{theirs}.norm1", images),
        **linear("image.up", f"{theirs}.ff.net.0.proj", images, images),
        **linear("image.down", f"{theirs}.ff.net.2", width, images),
        **norm("image.norm_out", f"{theirs}.norm2", width),
    }
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.cross_attention", f"blocks.{layer}.attn2"
        both = (linear("", f"{theirs}.add_{name}_proj", width, width) for name in ("k", "v"))
        parts |= joined(f"{ours}.image_kv", *both)
        parts[f"{ours}.image_k_norm.weight"] = (Part(f"{theirs}.norm_added_k.weight", (width,)),)
    return parts


def ltx_parts(config: ModelConfig) -> Parts:
    return {
        **linear("embed", "proj_in", config.width, config.channels),
        **common_parts(
            config, "time_embed.emb.timestep_embedder", "time_embed.linear", "caption_projection",
            "transformer_blocks", "ff", (),
        ),
    }  # fmt: skip


def common_parts(
    config: ModelConfig, time: str, modulation: str, text: str, blocks: str, feed_forward: str, batch: tuple[int, ...]
) -> Parts:
    """What both families have, by their names of it. batch: the dimension that a table of modulations begins with."""
    width, heads = config.width, head_rows(config)
    pixels = torch.arange(config.channels * config.patch**2).unflatten(0, (-1, config.channels)).T.flatten()
    parts = {
        **linear("noise.inner", f"{time}.linear_1", width, 256),
        **linear("noise.outer", f"{time}.linear_2", width, width),
        **linear("modulate", modulation, 6 * width, width),
        **linear("text.up", f"{text}.linear_1", width, config.text_width),
        **linear("text.down", f"{text}.linear_2", width, width),
        "final_modulate.weight": (Part("scale_shift_table", (*batch, 2, width)),),
        **linear("final", "proj_out", len(pixels), width, pixels),
    }
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}", f"{blocks}.{layer}"
        own, cross = f"{theirs}.attn1", f"{theirs}.attn2"
        parts |= {
            f"{ours}.modulation": (Part(f"{theirs}.scale_shift_table", (*batch, 6, width)),),
            **joined(
                f"{ours}.attention.qkv",
                linear("", f"{own}.to_q", width, width, heads),
                linear("", f"{own}.to_k", width, width, heads),
                linear("", f"{own}.to_v", width, width),
            ),
            **linear(f"{ours}.attention.out", f"{own}.to_out.0", width, width),
            f"{ours}.attention.q_gain": (Part(f"{own}.norm_q.weight", (width,), heads),),
            f"{ours}.attention.k_gain": (Part(f"{own}.norm_k.weight", (width,), heads),),
            **linear(f"{ours}.cross_attention.q", f"{cross}.to_q", width, width),
            **joined(
                f"{ours}.cross_attention.kv",
                linear("", f"{cross}.to_k", width, width),
                linear("", f"{cross}.to_v", width, width),
            ),
            **linear(f"{ours}.cross_attention.out", f"{cross}.to_out.0", width, width),
            f"{ours}.cross_attention.q_norm.weight": (Part(f"{cross}.norm_q.weight", (width,)),),
            f"{ours}.cross_attention.k_norm.weight": (Part(f"{cross}.norm_k.weight", (width,)),),
            **linear(f"{ours}.feed_forward.up", f"{theirs}.{feed_forward}.net.0.proj", config.hidden, width),
            **linear(f"{ours}.feed_forward.down", f"{theirs}.{feed_forward}.net.2", width, config.hidden),
        }
        if config.layers.cross_norm:
            parts |= norm(f"{ours}.cross_attention.norm", f"{theirs}.norm2", width)
    return parts


def linear(ours: str, theirs: str, out: int, width: int, rows: Tensor | None = None) -> Parts:
    return {
        f"{ours}.weight": (Part(f"{theirs}.weight", (out, width), rows),),
        f"{ours}.bias": (Part(f"{theirs}.bias", (out,), rows),),
    }


def norm(ours: str, theirs: str, width: int) -> Parts:
    return {f"{ours}.{name}": (Part(f"{theirs}.{name}", (width,)),) for name in ("weight", "bias")}


def joined(ours: str, *layers: Parts) -> Parts:
    """Layers of theirs that are one of ours."""
    return {f"{ours}.{name}": tuple(layer[f".{name}"][0] for layer in layers) for name in ("weight", "bias")}


def head_rows(config: ModelConfig) -> Tensor:
    """Which of their channels is each of ours, of queries and keys of all heads `[D]`.

    Wan's first pairs are those of time; ours has the slowest of them last, where a gate takes its place."""
    pairs = torch.arange(config.head_width // 2)
    if config.layers.rope == "wan":
        time = len(pairs) - 2 * (config.head_width // 6)
        pairs = torch.cat((pairs[: time - 1], pairs[time:], pairs[time - 1 : time]))
    head = torch.cat((2 * pairs, 2 * pairs + 1))
    return (torch.arange(config.heads)[:, None] * config.head_width + head).flatten()


FAMILIES: dict[str, tuple[Callable[[Mapping[str, Any]], ModelConfig], Callable[[ModelConfig], Parts]]] = {
    "WanTransformer3DModel": (wan_config, wan_parts),
    "LTXVideoTransformer3DModel": (ltx_config, ltx_parts),
}
KINDS = {"wan": "WanTransformer3DModel", "ltx": "LTXVideoTransformer3DModel"}  # by model.layers.rope


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model of ours, as diffusers reads it."""
    same = {
        "_class_name": KINDS[config.layers.rope], "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width, "out_channels": config.channels, "num_layers": config.depth,
        "in_channels": config.channels + config.layers.given_channels,
    }  # fmt: skip
    if config.layers.rope == "ltx":
        return {**same, "cross_attention_dim": config.width, "caption_channels": config.text_width}
    return {**same, "patch_size": [1, config.patch, config.patch], "text_dim": config.text_width,
            "ffn_dim": config.hidden, "image_dim": config.layers.image_width or None,
            "added_kv_proj_dim": config.width if config.layers.image_width else None}  # fmt: skip
