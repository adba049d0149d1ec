"""What an exported folder says of itself: a model card for people, model_index.json for diffusers; and its upload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.files import write_atomically

from .config import Config, plain

MEASURED = 40  # figures of evaluation.json that a card shows
CARD = """\
---
library_name: msc
tags: [video, diffusion, causal, multi-scale]
# Yours to fill in, as the data's licences allow:
# license: ...
---

# {name}

A causal video diffusion transformer with multi-scale causal attention: {parameters}. It denoises
latents of `{autoencoder}` frame by frame, each frame at its own noise level and each seeing only the past.

| training | |
| --- | --- |
{training}

**Licence of the weights:** to be filled in. **Data and its licences:** to be filled in.

## Use

```python
from msc.pretrain.model import MSCTransformer

model = MSCTransformer.from_pretrained("{name}")  # needs torch and safetensors only
```

```python
from diffusers import DiffusionPipeline

# `pipeline.py` in this folder imports the pipeline of the installed msc; diffusers asks before it runs such a file
pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
video = pipe(units={units}).frames[0]  # [frames, height, width, 3] in [0, 1]
```

## Measured

{measured}

## Settings

```yaml
{settings}```
"""
PIPELINE = '''\
"""What diffusers needs to find the pipeline of these weights: it is part of msc, which must be installed."""

from msc.pretrain.pipeline import MSCPipeline

__all__ = ["MSCPipeline"]
'''


def write_card(folder: Path, run: Path, facts: dict[str, Any], config: Config) -> None:
    """README.md: training facts, figures of the run's evaluation, settings. Of this machine it names at most the folder
    of an autoencoder, which config.json must name, too."""
    data, training, model = facts["data"], facts["training"], config.model
    rows = {
        "steps": f"{training['step']:,}",
        "clips seen": f"{training['clips']:,}" + (f" (the set holds {training['clips_in_set']:,})"
                                                  if training["clips_in_set"] else ""),
        "clips": f"{data['video_height']} × {data['video_width']} pixels at {data['fps']:g} frames/s; {data['frames']} "
                 f"latent frames of {data['height']} × {data['width']}",
        "autoencoder": data["autoencoder"],
        "weights": " and ".join({"ema": "averaged (ema)", "raw": "as trained last (raw)"}[w] for w in facts["weights"])
                   + f", in {facts['dtype']}",
        "trained in": training["precision"],
        "conditions": ", ".join(what for what, there in (("class labels", model.classes),
                                                         ("text embeddings", model.text_width)) if there) or "none",
    }  # fmt: skip
    settings = {name: plain(asdict(getattr(config, name))) for name in ("model", "diffusion", "optimizer", "train")}
    settings["train"]["init_from"] = Path(settings["train"]["init_from"]).name
    evaluation = run / "evaluation.json"
    text = CARD.format(
        name=run.resolve().name,
        parameters=f"width {model.width}, {model.depth} layers, {model.heads} heads on {len(model.scales)} scales",
        autoencoder=data["autoencoder"],
        training="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        units=max(1, data["frames"] // model.frames_per_unit),
        measured=measured(json.loads(evaluation.read_bytes())) if evaluation.is_file() else "Nothing yet.",
        settings=yaml.safe_dump(settings, sort_keys=False),
    )
    write_atomically(folder / "README.md", text.encode())


def measured(evaluation: dict[str, Any]) -> str:
    """The figures of an evaluation.json as a table."""
    rows = [f"| {name} | {value} |" for name, value in figures(evaluation, "")]
    rest = [f"\n{len(rows) - MEASURED} more are in the run's evaluation.json."] if len(rows) > MEASURED else []
    return "\n".join(["| held-out clips | |", "| --- | --- |", *rows[:MEASURED], *rest])


def figures(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from figures(inner, f"{name}, {key}" if name else str(key))
    elif isinstance(value, list):
        shown = [f"{v:.5g}" for v in value[:8] if isinstance(v, int | float)]
        if shown:
            yield name, ", ".join(shown) + (" …" if len(value) > 8 else "")
    elif isinstance(value, float):
        yield name, f"{value:.5g}"
    elif isinstance(value, int | str):
        yield name, str(value)


def write_pipeline(folder: Path, facts: dict[str, Any]) -> None:
    """model_index.json and the one-line module that it names: `DiffusionPipeline.from_pretrained` looks for them."""
    index = {
        "_class_name": ["pipeline", "MSCPipeline"],
        "_diffusers_version": "0.35.0",  # the first that it was written for
        "transformer": ["msc.pretrain.pipeline", "PipelineTransformer"],
        "data": facts["data"],
        "diffusion": facts["diffusion"],
    }
    write_atomically(folder / "model_index.json", json.dumps(index, indent=1).encode())
    write_atomically(folder / "pipeline.py", PIPELINE.encode())


def push(folder: Path, repository: str, what: str) -> str:
    """Upload an exported folder; a repository that does not exist is made, and is private.

    Whose account it is, huggingface_hub knows (HF_TOKEN, or `hf auth login`); nothing here sees the token.
    ValueError if it is not installed or refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ValueError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from None
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"msc export of {what}")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{folder} is written, but not uploaded to {repository}: {why[0]}") from None
    return f"uploaded to {repository}: {done}"
