"""Does a bidirectional model help a causal one? A small one is trained in diffusers' class, converted, and adapted.

    python tests/bench/pretrained.py RESULTS.json [--figure FILE.png] [--minutes 6] [--steps 600]

The bidirectional model (WanTransformer3DModel, one noise level a clip, full attention) learns synthetic video for some
minutes. Causal models of the same shape (a noise level a frame) are then trained on other clips: from its weights and
from random ones, dense and multi-scale. Held-out loss of all with the same noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from msc.datasets.synthetic import moving_textures
from msc.pretrain.checkpoints.initialize_from import open_initial_weights
from msc.pretrain.checkpoints.pretrained import open_pretrained
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer

FRAMES, HEIGHT, WIDTH, PATCH, BATCH, EVERY = 6, 16, 24, 4, 8, 25
MULTI_SCALE = (Scale(2, window=2), Scale(1, space=2, window=4), Scale(1))
Velocity = Callable[[Tensor, Tensor], Tensor]  # (noisy clips, noise levels of frames) -> velocity


def clips(seed: int, count: int) -> Tensor:
    video = moving_textures(seed, count, FRAMES, HEIGHT, WIDTH).float()
    return (video - 127.5) / 60  # about unit variance


def loss(velocity: Velocity, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    level = t[:, :, None, None, None]
    return (velocity((1 - level) * x + level * noise, t) - (noise - x)).square().mean()


def levels(count: int, per_frame: bool) -> Tensor:
    """Logit-normal, of every frame its own or of all frames of a clip the same."""
    return torch.randn(count, FRAMES if per_frame else 1).sigmoid().expand(-1, FRAMES)


def train(
    model: nn.Module, velocity: Velocity, data: Tensor, lr: float, per_frame: bool, go_on: Callable[[int], bool]
) -> int:
    optimizer, step = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01), 0
    while go_on(step):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50)
        x = data[torch.randint(len(data), (BATCH,))]
        loss(velocity, x, levels(BATCH, per_frame), torch.randn_like(x)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step


def bidirectional(folder: Path, data: Tensor, minutes: float) -> int:
    """Train diffusers' class and save it; returns the steps."""
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=4, attention_head_dim=32, in_channels=3, out_channels=3,
        text_dim=8, ffn_dim=512, num_layers=4,
    )  # fmt: skip

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model(x.transpose(1, 2), 1000 * t[:, 0], x.new_zeros(len(x), 1, 8)).sample.transpose(1, 2)

    end = time.monotonic() + 60 * minutes
    steps = train(model, velocity, data, 1e-3, False, lambda _: time.monotonic() < end)
    model.save_pretrained(folder)
    return steps


def causal(
    folder: Path, scales: tuple[Scale, ...], start: bool, data: Tensor, held_out: Tensor, steps: int, lr: float
) -> dict[int, float]:
    """Held-out losses of a causal model by step, from the weights in `folder` or from random ones."""
    place = f"diffusers:{folder}"
    config = open_pretrained(place).config
    config = replace(config, scales=scales, layers=replace(config.layers, text_tokens=1))
    torch.manual_seed(1)
    model = MSCTransformer(config)
    if start:
        with open_initial_weights(place, config, "pixels") as (_, fill):
            fill("", model)
    random = torch.Generator().manual_seed(2)
    t = torch.randn(len(held_out), FRAMES, generator=random).sigmoid()
    noise = torch.randn(held_out.shape, generator=random)
    losses: dict[int, float] = {}

    def go_on(step: int) -> bool:
        if step % EVERY == 0:
            with torch.no_grad():
                losses[step] = float(loss(model, held_out, t, noise))
        return step < steps

    train(model, model, data, lr, True, go_on)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    data, held_out = clips(0, 1000), clips(9, 48)
    results: dict = {"runs": {}}
    with tempfile.TemporaryDirectory() as name:
        results["bidirectional steps"] = bidirectional(Path(name), data, args.minutes)
        print(results, flush=True)
        for title, scales, start, lr in (
            ("dense, from the bidirectional model", (Scale(4),), True, 3e-4),
            ("three scales, from the bidirectional model", MULTI_SCALE, True, 3e-4),
            ("dense, from random weights", (Scale(4),), False, 1e-3),
            ("three scales, from random weights", MULTI_SCALE, False, 1e-3),
        ):
            results["runs"][title] = causal(Path(name), scales, start, clips(20, 1000), held_out, args.steps, lr)
            args.results.write_text(json.dumps(results, indent=1))
            print(title, results["runs"][title], flush=True)
    if args.figure:
        plot(results["runs"], args.figure)


def plot(runs: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for title, losses in runs.items():
        style = "-" if "bidirectional" in title else "--"
        colour = "tab:blue" if title.startswith("dense") else "tab:orange"
        axes.plot(list(map(int, losses)), list(losses.values()), style, color=colour, label=title)
    axes.set(xlabel="step of causal training", ylabel="held-out loss", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
