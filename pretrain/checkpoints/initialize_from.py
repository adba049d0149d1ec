"""Starting a run from weights that exist: `train.init_from` names a folder of `msc export`, or another run.

What fixes the shapes of the transformer's layers must be the same. Everything else may differ, as no weight depends on
it: resolution, clip length, scales (also one dense scale against many), windows, gate. It is told at the start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.load import read_run
from ..model.config import ModelConfig
from ..model.transformer import MSCTransformer, OnPartBuilt
from . import directory as checkpoint_directory
from . import format as checkpoint_format
from .exported_weights import Shapes, abbreviated, open_exported

FIXED = ("width", "depth", "heads", "hidden", "patch", "channels")
OF_THE_DATA = ("latent_mean", "latent_std", "gate_constants")


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from. opened: while open, reads any of them by name."""

    what: str
    config: ModelConfig
    autoencoder: str
    shapes: Shapes
    opened: Callable[[], AbstractContextManager[Callable[[str], Tensor]]]


def find_weights(place: Path, newest: Path | None = None) -> InitialWeights:
    """Look weights up without loading them; FileNotFoundError or ValueError if there are none that can be used.

    newest: the checkpoint to take of a run; None looks for it, as ranks that are to find the same must not."""
    if (place / "config.yaml").is_file():
        config, space = read_run(place)
        if (path := newest or checkpoint_directory.latest(place)) is None:
            raise FileNotFoundError(f"train.init_from is {place}, a run without a checkpoint yet")
        meta = checkpoint_directory.CheckpointMeta.read(path)
        what = f"the averaged weights of step {meta.step:,} of the run {place}"
        return InitialWeights(
            what, config.model, space.autoencoder, meta.parameters, lambda: checkpoint_format.open_weights(path)
        )
    if not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"train.init_from is {place}, which is neither a run folder (config.yaml) nor an exported one (config.json)"
        )
    exported = open_exported(place)
    facts, model = exported.facts, MSCTransformer.described(exported).config
    what = f"the exported weights of step {facts.get('training', {}).get('step', '?')} in {place}"
    autoencoder = facts.get("data", {}).get("autoencoder", "?")
    return InitialWeights(what, model, autoencoder, exported.shapes, lambda: nullcontext(exported.read))


def describe_differences(start: InitialWeights, config: ModelConfig, autoencoder: str) -> list[str]:
    """What a run with this model takes from `start` and what not, in lines; ValueError if they do not go together."""
    values = [(name, getattr(start.config, name), getattr(config, name)) for name in FIXED]
    if wrong := [f"model.{name} is {here} here and {there} there" for name, there, here in values if there != here]:
        raise ValueError(f"train.init_from: {', '.join(wrong)}; {start.what} can only start a model of the same shape")
    with torch.device("meta"):
        shapes = MSCTransformer(config).shapes()
    kept = taken(start, config, shapes)
    told = [f"starting from {start.what}"]
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(start.config, field.name), getattr(config, field.name)
        if field.name in OF_THE_DATA and there != here:
            told.append(f"{field.name} are those of the new data")
        elif there != here and field.name != "mlp_ratio":
            told.append(f"model.{field.name} is {here} here, and was {there}")
    if start.autoencoder != autoencoder:
        told.append(f"the latents are of {autoencoder}, and were of {start.autoencoder}")
    if new := sorted(shapes.keys() - kept):
        told.append(f"new: {abbreviated(new)}")
    if left := sorted(start.shapes.keys() - kept):
        told.append(f"left behind: {abbreviated(left)}")
    return told


def taken(start: InitialWeights, config: ModelConfig, shapes: Shapes) -> set[str]:
    """Names of the tensors that a model with `shapes` takes over.

    Layers of labels and texts begin anew where there were none or others; the gate's offset of a head where it looked
    at the video on another scale, or through another gate.
    """

    def seen(model: ModelConfig) -> Any:
        return model.gate, [(scale.heads, scale.space, scale.time) for scale in model.scales]

    same = {name for name, shape in shapes.items() if start.shapes.get(name) == shape}
    if seen(start.config) != seen(config):
        same = {name for name in same if not name.endswith(".attention.delta")}
    return same


@contextmanager
def open_initial_weights(
    place: Path, config: ModelConfig, autoencoder: str, newest: Path | None = None
) -> Iterator[tuple[list[str], OnPartBuilt]]:
    """What a new model takes of the weights that `find` finds, in lines; and what copies it into a part of the model,
    given the part's name ("" for all of it). A rank so reads a part at a time."""
    found = find_weights(place, newest)
    told = describe_differences(found, config, autoencoder)
    with torch.device("meta"):
        kept = taken(found, config, MSCTransformer(config).shapes())
    with found.opened() as read:

        @torch.no_grad()
        def fill(name: str, part: nn.Module) -> None:
            for inner, value in part.state_dict(prefix=f"{name}." if name else "").items():
                if inner in kept:
                    value.copy_(read(inner))

        yield told, fill
