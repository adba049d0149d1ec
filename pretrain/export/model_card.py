"""What an exported folder says of itself: a model card for people, model_index.json for diffusers; and its upload."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.files import write_atomically

from ..config import Config, plain
from ..evaluation.confidence import OTHER_RUN

OWN_WEIGHTS = [f"{stem}{rest}" for stem in ("model", "ema", "raw")
               for rest in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")]  # fmt: skip
SEAL = "\n<!-- msc export renews this card as long as nothing is changed: {} -->\n"
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
{where}
```

```python
from msc.pretrain.model.transformer import MSCTransformer

model = MSCTransformer.from_pretrained(folder)  # needs torch and safetensors only
```

```python
from diffusers import DiffusionPipeline

# `pipeline.py` in this folder imports the pipeline of the installed msc; diffusers asks before it runs such a file
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
video = pipe(units={units}).frames[0]  # [frames, height, width, 3] in [0, 1]
```

## Measured

{measured}

## Settings

```yaml
{settings}```
"""
FROM_HUB = """\
from huggingface_hub import snapshot_download

folder = snapshot_download("{}")  # of a private repository after `hf auth login`"""
PIPELINE = '''\
"""What diffusers needs to find the pipeline of these weights: it is part of msc, which must be installed."""

from msc.pretrain.export.diffusers_pipeline import MSCPipeline

__all__ = ["MSCPipeline"]
'''


def write_card(
    folder: Path, run: Path, facts: dict[str, Any], config: Config, before: Path, repository: str | None = None
) -> bool:
    """README.md: training facts, figures of the run's evaluation, settings. Of this machine it names at most the folder
    of an autoencoder, which config.json must name, too. A card `before` that somebody has edited is kept instead;
    returns whether it was. repository: of the Hub, where readers will find the folder."""
    if before.is_file() and edited(text := before.read_bytes()):
        write_atomically(folder / "README.md", text)
        return True
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
    card = CARD.format(
        name=run.resolve().name,
        where=FROM_HUB.format(repository) if repository else 'folder = "."  # where this file lies',
        parameters=f"width {model.width}, {model.depth} layers, {model.heads} heads on {len(model.scales)} scales",
        autoencoder=data["autoencoder"],
        training="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        units=max(1, data["frames"] // model.frames_per_unit),
        measured="\n\n".join(map(measured, evaluations(run, facts))) or "Nothing yet.",
        settings=yaml.safe_dump(settings, sort_keys=False),
    )
    write_atomically(folder / "README.md", sealed(card.encode()))
    return False


def sealed(card: bytes) -> bytes:
    return card + SEAL.format(hashlib.sha256(card).hexdigest()).encode()


def edited(card: bytes) -> bool:
    """Whether this is another card than `write_card` wrote."""
    return sealed(card[: -len(sealed(b""))]) != card


def evaluations(run: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What `msc evaluate` found of just these weights at this step."""
    step, found = facts["training"]["step"], {}
    for file in (run / f"evaluation-{step:08d}.json", run / "evaluation.json"):
        one = json.loads(file.read_bytes()) if file.is_file() else {}
        if "tables" in one and one["step"] == step and one["weights"] in facts["weights"]:
            found[one["weights"]] = one
    return list(found.values())


def measured(evaluation: dict[str, Any]) -> str:
    """The figures of an evaluation that sum up others, as a table; those of a run beside it are left out."""
    what = f"The {evaluation['weights']} weights on {evaluation['clips']} held-out clips"
    lines = [f"{what}, ± a 95 % interval over clips:", "", "| | | |", "| --- | --- | --- |"]
    for table in evaluation["tables"].values():
        for name, row in table["rows"].items():
            mean, half = row["mean"][0], row["half_width"][0]
            if mean is not None and OTHER_RUN.strip() not in name:
                value = f"{mean:.4g}" + (f" ± {half:.2g}" if half is not None else "")
                lines.append(f"| {table['title']}, {table['columns'][0]} ({table['unit']}) | {name} | {value} |")
    return "\n".join(lines)


def write_pipeline(folder: Path, facts: dict[str, Any]) -> None:
    """model_index.json and the one-line module that it names: `DiffusionPipeline.from_pretrained` looks for them."""
    index = {
        "_class_name": ["pipeline", "MSCPipeline"],
        "_diffusers_version": "0.35.0",  # the first that it was written for
        "transformer": ["msc.pretrain.export.diffusers_pipeline", "PipelineTransformer"],
        "data": facts["data"],
        "diffusion": facts["diffusion"],
    }
    write_atomically(folder / "model_index.json", json.dumps(index, indent=1).encode())
    write_atomically(folder / "pipeline.py", PIPELINE.encode())


def push(folder: Path, repository: str, what: str) -> str:
    """Upload an exported folder; a repository that does not exist is made, and is private.

    Weights of an export before are removed by the same commit; a README.md that is there stays. Whose account it is,
    huggingface_hub knows (HF_TOKEN, or `hf auth login`); nothing here sees the token. ValueError if it is not installed
    or does not succeed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from None
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        card = api.file_exists(repository, "README.md")
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"msc export of {what}",
            delete_patterns=OWN_WEIGHTS, ignore_patterns=["README.md"] if card else None,
        )  # fmt: skip
    except Exception as error:  # of huggingface_hub or of its HTTP library, which has changed twice
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{folder} is written, but not uploaded to {repository}: {why[0]}") from None
    return f"uploaded to {repository}: {done}" + "; its README.md is as it was" * card
