"""How closely generated video follows new actions: a run on steered dots, such as that of `make demo`.

    python tests/bench/steering.py demo_run/run

Held-out clips are continued under random actions that nobody recorded; where they must lead is known. Prints, for every
unit, how far the generated dot is from there, and how far a dot that stands still would be: medians in pixels.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from msc.datasets.loading.held_out import held_out_clip
from msc.datasets.loading.mixture import open_shards
from msc.datasets.synthetic import MOVES
from msc.datasets.text_table import text_table
from msc.pretrain.batch_inputs import condition_of, latents_of
from msc.pretrain.diffusion.rectified_flow import frame_shift
from msc.pretrain.diffusion.sampler import Sampling, generate
from msc.pretrain.inference.load import open_run
from msc.pretrain.model.conditioning import Condition

SPEED = 2  # pixels a step, the default of steered_dots
HELD = 0.6  # probability that an action goes on


def centre(pixels_BTCHW: Tensor) -> Tensor:
    """Row and column of the brightest spot `[B, T, 2]`, a circular mean: the picture has no edges."""
    light = pixels_BTCHW.mean(2)
    light = (light - light.flatten(2).median(-1).values[..., None, None] - 0.15).clamp(min=0)
    places = []
    for other in (3, 2):  # summed over columns, then over rows
        line = light.sum(other)
        phase = 2 * math.pi * torch.arange(line.shape[-1], device=line.device) / line.shape[-1]
        angle = torch.atan2((line * phase.sin()).sum(-1), (line * phase.cos()).sum(-1))
        places.append(angle * line.shape[-1] / (2 * math.pi))
    return torch.stack(places, -1)


def distance(a_BT2: Tensor, b_BT2: Tensor, size: Tensor) -> Tensor:
    """Pixels between places of a picture without edges, `[B, T]`."""
    return ((a_BT2 - b_BT2 + size / 2) % size - size / 2).square().sum(-1).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--context", type=int, default=6)
    parser.add_argument("--units", type=int, default=18)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    trained = open_run(args.run)
    model, shards = trained.model, open_shards(trained.config.data)
    columns = next(signal.columns for signal in model.config.signals if signal.name == "actions")
    batches = [held_out_clip(shards, clip) for clip in range(args.clips)]
    latents = torch.cat([latents_of(batch, trained.autoencoder, trained.device) for batch in batches])
    x = model.normalise(latents)[:, : args.context]
    known = torch.cat([condition_of(batch, model).signals["actions"] for batch in batches])[:, : args.context]

    source = torch.Generator().manual_seed(7)
    chosen = torch.randint(len(columns), (args.clips, args.units), generator=source)
    goes_on = torch.rand(args.clips, args.units, generator=source) < HELD
    for unit in range(1, args.units):
        chosen[:, unit] = torch.where(goes_on[:, unit], chosen[:, unit - 1], chosen[:, unit])
    actions = torch.nn.functional.one_hot(chosen, len(columns)).float()
    condition = Condition(signals={"actions": torch.cat((known, actions), 1)}).to(trained.device)
    sampling = Sampling(args.steps, 1, frame_shift(trained.config.diffusion, *x.shape[-2:]))
    made = torch.cat(list(generate(model, x, args.units, sampling, condition)), 1)

    def places(x_BTCHW: Tensor) -> Tensor:
        return centre((model.denormalise(x_BTCHW) / 2 + 0.5).clamp(0, 1)).cpu()

    start, size = places(x[:, -1:]), torch.tensor(x.shape[-2:])
    moves = SPEED * torch.tensor([MOVES[name] for name in columns])[chosen]
    expected = start + moves.cumsum(1)
    off, still = (distance(place, expected, size).median(0).values.tolist() for place in (places(made), start))
    rows = [(str(unit + 1), f"{off[unit]:.2f}", f"{still[unit]:.2f}") for unit in range(args.units)]
    print(text_table(rows, ("unit", "generated, pixels off", "standing still")))


if __name__ == "__main__":
    main()
