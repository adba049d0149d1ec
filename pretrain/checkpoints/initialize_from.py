"""Initialisation from existing weights: `train.init_from` names a folder of `msc export`, another run, or
"diffusers:FOLDER", a published model (pretrained.py).

What fixes the shapes of the transformer's layers must be the same. Everything else may differ and is logged:
resolution, clip length, scales (also one dense scale against many), windows, gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..model.config import LayerConfig, ModelConfig
from ..model.exported_weights import ExportedWeights, Shapes, abbreviated, open_exported
from ..model.transformer import MSCTransformer, OnPartBuilt
from ..run_folder import RunFolder
from ..typed_values import read
from .directory import CheckpointMeta, latest
from .format import ParameterReader
from .pretrained import Pretrained, is_pretrained, open_pretrained

FIXED = ("width", "depth", "heads", "hidden", "patch", "channels")
FIXED_LAYERS = tuple(
    field.name
    for field in dataclasses.fields(LayerConfig)
    if field.name not in ("rope_steps", "text_tokens", "image_width")
)
OF_THE_DATA = ("latent_mean", "latent_std", "gate_constants", "signals")


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from. open: a context whose value reads any of them by name."""

    what: str
    config: ModelConfig
    autoencoder: str
    shapes: Shapes
    open: Callable[[], AbstractContextManager[ParameterReader | ExportedWeights | Pretrained]]

    def transferable(self, config: ModelConfig, shapes: Shapes) -> set[str]:
        """Names of the tensors that a new model with `shapes` takes: those of the same shape, but a head's gate offset
        only if it has the same scale and gate, and signals' only if all signals are the same."""

        def gate(model: ModelConfig) -> Any:
            return model.gate, [(scale.heads, scale.space, scale.time) for scale in model.scales]

        def signals(model: ModelConfig) -> list[Any]:
            return [(signal.name, signal.kind, signal.columns, signal.frames) for signal in model.signals]

        same_gate, same_signals = gate(self.config) == gate(config), signals(self.config) == signals(config)
        return {
            name
            for name, shape in shapes.items()
            if self.shapes.get(name) == shape
            and (same_gate or not name.endswith(".attention.delta"))
            and (same_signals or not name.startswith("signals."))
        }


def find_weights(place: str | Path, newest: Path | None = None) -> InitialWeights:
    """Open a run or an export without loading its weights; FileNotFoundError or ValueError if they cannot be used.

    newest: the checkpoint to take of a run, which must be the same on all ranks; None: its latest."""
    if is_pretrained(str(place)):
        pretrained = open_pretrained(str(place))
        what = f"the published weights in {pretrained.folder}"
        autoencoder = pretrained.autoencoder
        return InitialWeights(what, pretrained.config, autoencoder, pretrained.shapes, lambda: nullcontext(pretrained))
    place = Path(place)
    folder = RunFolder(place)
    if folder.exists():
        settings = yaml.safe_load(folder.config.read_text())
        settings = settings.get("model", {}) if isinstance(settings, dict) else settings
        model = read(ModelConfig, settings, "model", folder.config)
        autoencoder = folder.read_latent_space().autoencoder
        if (path := newest or latest(place)) is None:
            raise FileNotFoundError(f"train.init_from is {place}, a run without a checkpoint yet")
        meta = CheckpointMeta.read(path)
        what = f"the averaged weights of step {meta.step:,} of the run {place}"
        return InitialWeights(what, model, autoencoder, meta.parameters, lambda: ParameterReader(path))
    if not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"train.init_from is {place}, which is neither a run folder (config.yaml) nor an exported one (config.json)"
        )
    exported = open_exported(place)
    model = MSCTransformer.described(exported).config
    what = f"the exported weights of step {exported.config.training.get('step', '?')} in {place}"
    autoencoder = exported.config.data.autoencoder
    return InitialWeights(what, model, autoencoder, exported.shapes, lambda: nullcontext(exported))


def describe_differences(weights: InitialWeights, config: ModelConfig, autoencoder: str) -> list[str]:
    """What a run with this model takes from `weights` and what not, in lines; ValueError if they do not fit."""
    values = [(name, getattr(weights.config, name), getattr(config, name)) for name in FIXED]
    there, here = weights.config.layers, config.layers
    values += [(f"layers.{name}", getattr(there, name), getattr(here, name)) for name in FIXED_LAYERS]
    if wrong := [f"model.{name} is {here} here and {there} there" for name, there, here in values if there != here]:
        raise ValueError(
            f"train.init_from: {', '.join(wrong)}; {weights.what} can only start a model of the same shape"
        )
    shapes = _shapes(config)
    taken = weights.transferable(config, shapes)
    lines = [f"starting from {weights.what}"]
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(weights.config, field.name), getattr(config, field.name)
        if field.name in OF_THE_DATA and there != here:
            lines.append(f"{field.name} are those of the new data")
        elif there != here and field.name != "mlp_ratio":  # of which `hidden` follows
            lines.append(f"model.{field.name} is {here} here, and was {there}")
    if weights.autoencoder != autoencoder:
        lines.append(f"the latents are of {autoencoder}, and were of {weights.autoencoder}")
    if new := sorted(shapes.keys() - taken):
        lines.append(f"newly initialised: {abbreviated(new)}")
    if unused := sorted(weights.shapes.keys() - taken):
        lines.append(f"not used: {abbreviated(unused)}")
    return lines


def _shapes(config: ModelConfig) -> Shapes:
    with torch.device("meta"):
        return MSCTransformer(config).shapes()


@contextmanager
def open_initial_weights(
    place: str | Path, config: ModelConfig, autoencoder: str, newest: Path | None = None
) -> Iterator[tuple[list[str], OnPartBuilt]]:
    """The lines of `describe_differences`, and a function that copies the weights into a part of a new model, given
    the part's name ("" for all of it): a rank reads one part at a time."""
    weights = find_weights(place, newest)
    lines, taken = describe_differences(weights, config, autoencoder), weights.transferable(config, _shapes(config))
    with weights.open() as reader:

        @torch.no_grad()
        def fill(name: str, part: nn.Module) -> None:
            for inner, value in part.state_dict(prefix=f"{name}." if name else "").items():
                if inner in taken:
                    value.copy_(reader.tensor(inner))

        yield lines, fill
