"""Run folders made by hand, their checkpoints cut as different ZeRO stages and numbers of ranks would cut them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from msc.datasets.statistics import Statistics
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.checkpoints import format as checkpoint_format
from msc.pretrain.checkpoints.async_writer import write_slices
from msc.pretrain.config import Config, dump, flat
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.latent_space import LatentSpace
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.presets import PRESETS
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.validation import ASSUMED_INDEX, resolve

SCALES = (Scale(2, 1, 1, 2, 3), Scale(1, 2, 1, 3), Scale(1, 2, 2, None))


def configured(**model) -> tuple[Config, LatentSpace]:
    """A small configuration of pixels, 6 frames of 16 × 24."""
    base = PRESETS["demo"]()
    made = {"width": 32, "depth": 2, "patch": 2, "scales": SCALES, **model}
    index = replace(
        ASSUMED_INDEX, autoencoder="pixels", channels=3, frames=6, height=16, width=24, video_frames=6, video_height=16,
        video_width=24, fps=12.0, statistics=Statistics.default(3), classes=made.get("classes", 0),
        has_text=made.get("text_width", 0) or None,
    )  # fmt: skip
    return resolve(replace(base, model=replace(base.model, **made)), index), LatentSpace.of(index)


def random_model(config: ModelConfig, seed: int = 0) -> MSCTransformer:
    """With values everywhere: the layers that start at zero would hide mistakes."""
    torch.manual_seed(seed)
    model = MSCTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_run(run: Path, ranks: int = 1, cut: str = "even", step: int = 40, **model) -> dict[str, MSCTransformer]:
    """A run folder with a checkpoint; returns its models. cut: "even" as stages 0 and 3 cut every parameter, "flat" as
    stages 1 and 2 cut the row of all of them."""
    config, space = configured(**model)
    models = {"ema": random_model(config.model, step), "weight": random_model(config.model, step + 1)}
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump(config))
    RunFolder(run).write_latent_space(space)
    write_checkpoint(run, config, models, ranks, cut, step)
    return {"ema": models["ema"], "raw": models["weight"]}


def write_checkpoint(
    run: Path, config: Config, models: dict[str, torch.nn.Module], ranks: int, cut: str, step: int
) -> None:  # fmt: skip
    folder = RunFolder(run).checkpoints / checkpoint_directory.checkpoint_name(step)
    folder.mkdir(parents=True)
    values = {key: dict(model.named_parameters()) for key, model in models.items()}
    shapes = {name: tuple(p.shape) for name, p in values["ema"].items() if p.requires_grad}
    total = sum(values["ema"][name].numel() for name in shapes)
    files, sizes = {}, {}
    for rank in range(ranks):
        parts, at = {}, 0
        for name in shapes:
            numel = values["ema"][name].numel()
            first, last = 0, numel
            edges = (numel * rank // ranks, numel * (rank + 1) // ranks)
            if cut == "flat":
                edges = (total * rank // ranks - at, total * (rank + 1) // ranks - at)
            first, last = (min(max(edge, 0), numel) for edge in edges)
            for key in models if first < last else ():
                parts[f"{name}|{first}|{key}"] = values[key][name].detach().flatten()[first:last]
            at += numel
        layout, start = {}, 0
        for name, part in parts.items():
            layout[name] = (start, start + part.numel())
            start += part.numel()
        file = f"rank-{rank:05d}.safetensors"
        sizes[file], files[file] = write_slices(folder / file, torch.cat(list(parts.values())), layout)
    meta = checkpoint_directory.CheckpointMeta(
        step=step, clock=8 * step, clips=99, adam_steps=step, world=ranks, parameters=shapes, config=flat(config),
        versions=checkpoint_format.library_versions(), files=files, bytes=sizes,
    )  # fmt: skip
    meta.write(folder)
    checkpoint_directory.set_latest(run, folder)


def model_with(model: MSCTransformer, values: dict[str, torch.Tensor]) -> MSCTransformer:
    """A model of the same configuration with these values, in fp32."""
    other = MSCTransformer(model.config)
    other.load_state_dict(values)
    return other.eval()
