"""A `diffusers` pipeline of exported weights, for tools that work with pipelines.

    MSCPipeline.from_pretrained(folder)                                   runs nothing that lies in the folder
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)     runs its pipeline.py, which imports this one

These are the two ways to load a pipeline from outside diffusers. Sampling is in diffusion/sampler.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from ..diffusion.autoencoder import open_autoencoder, to_float
from ..diffusion.rectified_flow import DiffusionConfig, frame_shift
from ..diffusion.sampler import Sampling, generate
from ..model.conditioning import Condition
from ..model.config import check_clip
from ..model.exported_weights import read_export_config
from ..model.transformer import MSCTransformer
from ..typed_values import read


class PipelineTransformer(MSCTransformer, ModelMixin):
    """The model with the interface of a pipeline's component: its device, dtype and loading."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, weights: str | None = None, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> MSCTransformer:
        return super().from_pretrained(folder, weights, torch_dtype)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise ValueError("a pipeline of msc is not saved from here: copy the folder that `msc export` wrote")


@dataclass
class VideoOutput(BaseOutput):
    """frames: video `[B, T, H, W, 3]` in [0, 1] ("np"), `[B, T, 3, H, W]` in [0, 1] ("pt") or normalised latents."""

    frames: Any


class MSCPipeline(DiffusionPipeline):
    """Continues videos, or generates them without context.

    data, diffusion: sections of the folder's config.json. autoencoder: instead of the one that it names, such as
    "diffusers:FOLDER" where that folder has moved.
    """

    def __init__(
        self,
        transformer: MSCTransformer,
        data: dict[str, Any] | None = None,  # diffusers takes what has no default for a module
        diffusion: dict[str, Any] | None = None,
        autoencoder: str | None = None,
    ):
        super().__init__()
        if data is None or diffusion is None:
            raise ValueError("data and diffusion are missing: they are sections of the exported folder's config.json")
        self.register_modules(transformer=transformer)
        self.register_to_config(data=data, diffusion=diffusion, autoencoder=autoencoder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        weights: str | None = None,
        dtype: torch.dtype | None = None,
        autoencoder: str | None = None,
    ) -> MSCPipeline:
        """From a folder that `msc export` wrote; arguments and errors are those of `MSCTransformer.from_pretrained`."""
        facts = read_export_config(Path(folder))
        transformer = PipelineTransformer.from_pretrained(folder, weights, dtype)
        return cls(transformer, asdict(facts.data), asdict(facts.diffusion), autoencoder)

    @torch.no_grad()
    def __call__(
        self,
        units: int,
        video: Tensor | None = None,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        signals: Mapping[str, Tensor] | None = None,
        num_inference_steps: int = 16,
        seed: int = 0,
        output_type: Literal["np", "pt", "latent"] = "np",
        **sampling: Any,
    ) -> VideoOutput:
        """Generate `units` units after `video`, or `batch` videos without context; the output begins with the context.

        video: `[B, T, 3, H, W]`, uint8 or float in [-1, 1], at the fps the model was trained at; as many frames as make
        whole units. size: height and width in pixels (default: the training clips'). text: embeddings `[B, L, E]`;
        labels: `[B]`. signals: by name, `[B, T, width]` for the context's frames and the new ones, as in the shards.
        sampling: further settings of `sampler.Sampling`. ValueError where something does not fit.
        """
        model, space = self.transformer, self.config["data"]
        device, dtype = self.device, torch.float32  # frames stay in fp32 where weights are not
        autoencoder = open_autoencoder(self.config["autoencoder"] or space["autoencoder"], device)
        if video is not None:
            context = model.normalise(autoencoder.encode(to_float(video)).to(device, dtype))
        else:
            height, width = size or (space["video_height"], space["video_width"])
            factor = autoencoder.spatial_factor
            autoencoder.check(autoencoder.video_frames(1), height, width)
            context = torch.zeros(batch, 0, model.config.channels, height // factor, width // factor, device=device)
        check_clip(model.config, *(context.shape[i] for i in (1, 3, 4)))
        diffusion = read(DiffusionConfig, self.config["diffusion"], "diffusion", "the pipeline's configuration")
        shift = frame_shift(diffusion, *context.shape[-2:])
        condition = Condition(text, labels, model.normalise_signals(signals or {})).to(device)
        how = Sampling(num_inference_steps, seed, shift, **sampling)
        new = generate(model, context, units, how, condition)
        x = torch.cat([context, *self.progress_bar(new, total=None)], 1)
        if output_type == "latent":
            return VideoOutput(x)
        frames = (autoencoder.decode(model.denormalise(x)).clamp(-1, 1) + 1) / 2
        return VideoOutput(frames if output_type == "pt" else frames.permute(0, 1, 3, 4, 2).cpu().numpy())
