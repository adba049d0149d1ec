"""Model card of an exported folder, its model_index.json for diffusers, and its upload to the Hugging Face Hub."""

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
from ..run_folder import RunFolder

OWN_WEIGHTS = [f"{stem}{rest}" for stem in ("model", "ema", "raw")
               for rest in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")]  # fmt: skip
CHECKSUM = "\n<!-- msc export renews this card as long as nothing is changed: {} -->\n"
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
    folder: Path, run: Path, facts: dict[str, Any], config: Config, previous: Path, repository: str | None = None
) -> bool:
    """Write README.md: training facts, the results of the run's evaluation, settings.

    Of this machine it names at most the folder of an autoencoder, as config.json must. A `previous` card that somebody
    has edited is kept instead; returns whether it was. repository: of the Hub, where readers will find the folder.
    """
    text = previous.read_bytes() if previous.is_file() else b""
    if text and with_checksum(text[: -len(with_checksum(b""))]) != text:  # not as this function wrote it
        write_atomically(folder / "README.md", text)
        return True
    data, training, model = facts["data"], facts["training"], config.model
    in_set = f" (the set holds {training['clips_in_set']:,})" if training["clips_in_set"] else ""
    kinds = {"ema": "averaged (ema)", "raw": "as trained last (raw)"}
    conditions = [
        name for name, size in (("class labels", model.classes), ("text embeddings", model.text_width)) if size
    ]
    rows = {
        "steps": f"{training['step']:,}",
        "clips seen": f"{training['clips']:,}{in_set}",
        "clips": f"{data['video_height']} × {data['video_width']} pixels at {data['fps']:g} frames/s; {data['frames']} "
                 f"latent frames of {data['height']} × {data['width']}",
        "autoencoder": data["autoencoder"],
        "weights": f"{' and '.join(kinds[name] for name in facts['weights'])}, in {facts['dtype']}",
        "trained in": training["precision"],
        "conditions": ", ".join(conditions) or "none",
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
        measured="\n\n".join(map(results, evaluations(run, facts))) or "Nothing yet.",
        settings=yaml.safe_dump(settings, sort_keys=False),
    )
    write_atomically(folder / "README.md", with_checksum(card.encode()))
    return False


def with_checksum(card: bytes) -> bytes:
    return card + CHECKSUM.format(hashlib.sha256(card).hexdigest()).encode()


def evaluations(run: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of `msc evaluate` for exactly these weights at this step."""
    step, by_weights = facts["training"]["step"], {}
    for file in (RunFolder(run).evaluation("json", step), RunFolder(run).evaluation("json")):
        result = json.loads(file.read_bytes()) if file.is_file() else {}
        if "tables" in result and result["step"] == step and result["weights"] in facts["weights"]:
            by_weights[result["weights"]] = result
    return list(by_weights.values())


def results(evaluation: dict[str, Any]) -> str:
    """The totals of an evaluation as a Markdown table, without those of another run compared with."""
    title = f"The {evaluation['weights']} weights on {evaluation['clips']} held-out clips"
    lines = [f"{title}, ± a 95 % interval over clips:", "", "| | | |", "| --- | --- | --- |"]
    for table in evaluation["tables"].values():
        for name, row in table["rows"].items():
            mean, half = row["mean"][0], row["half_width"][0]
            if mean is not None and OTHER_RUN.strip() not in name:
                value = f"{mean:.4g}" + (f" ± {half:.2g}" if half is not None else "")
                lines.append(f"| {table['title']}, {table['columns'][0]} ({table['unit']}) | {name} | {value} |")
    return "\n".join(lines)


def write_pipeline(folder: Path, facts: dict[str, Any]) -> None:
    """model_index.json and the one-line module that it names: `DiffusionPipeline.from_pretrained` reads them."""
    index = {
        "_class_name": ["pipeline", "MSCPipeline"],
        "_diffusers_version": "0.35.0",  # the first that it was written for
        "transformer": ["msc.pretrain.export.diffusers_pipeline", "PipelineTransformer"],
        "data": facts["data"],
        "diffusion": facts["diffusion"],
    }
    write_atomically(folder / "model_index.json", json.dumps(index, indent=1).encode())
    write_atomically(folder / "pipeline.py", PIPELINE.encode())


def push(folder: Path, repository: str, title: str) -> str:
    """Upload an exported folder; a repository that does not exist is created, and is private.

    Weights of an earlier export are removed by the same commit; an existing README.md stays. huggingface_hub takes the
    account from HF_TOKEN or `hf auth login`; the token is not read here. ValueError if it is not installed or fails.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from None
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        has_card = api.file_exists(repository, "README.md")
        url = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"msc export of {title}",
            delete_patterns=OWN_WEIGHTS, ignore_patterns=["README.md"] if has_card else None,
        )  # fmt: skip
    except Exception as error:  # of huggingface_hub or of its HTTP library, which has changed twice
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} is written, but not uploaded to {repository}: {reason}") from None
    return f"uploaded to {repository}: {url}" + ("; its README.md was not changed" if has_card else "")
