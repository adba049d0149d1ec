"""Which recipe makes the best video: noise levels, prediction and scales compared on small pixel models, on one GPU.

    python tests/bench/recipe.py RESULTS.jsonl --videos FOLDER --variants demo velocity prefix --seconds 500
    python tests/bench/recipe.py RESULTS.jsonl --mazes 8000 --frames 128 --size 48 48 --batch 8 \
        --variants memory-dense memory-window memory-pooled memory-routed --samplings mean sample
    python tests/bench/recipe.py RESULTS.jsonl --videos FOLDER --run RUN --context 16 --units 128

FOLDER holds videos already of the size to train on (multiples of 16 pixels), and for recipes that take actions a file
NAME.actions.csv beside each: a header, and the action that led to every frame. With --mazes, so many ray-cast mazes, a
new one for every clip: half of the walks turn round in the middle and come back, and all that are held out. These are
continued from the turn on: what is seen h frames later was last seen 2 h frames ago. Every run trains one model,
continues held-out clips, and appends a line to RESULTS.jsonl; runs found there are not repeated, and none is started
that would not end within --seconds. With --run, a pixel model that `msc train` trained is examined, on videos that it
did not see.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msc.datasets.maze import ACTIONS, Walks, ray_cast_maze
from msc.pretrain import cost
from msc.pretrain.diffusion.loss import Loss
from msc.pretrain.diffusion.rectified_flow import DiffusionConfig, add_noise, noise_levels
from msc.pretrain.diffusion.sampler import Sampling, generate
from msc.pretrain.inference.load import open_run
from msc.pretrain.model.conditioning import Condition, SignalConfig
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer

HORIZONS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)  # of the frame after a clean past
FINE, MIDDLE = Scale(2, 1, 1, 2, 8), Scale(1, 2, 1, 8)
SCALES: dict[str, tuple[Scale, ...]] = {
    "pooled": (FINE, MIDDLE, Scale(1, 4, 4)),
    "routed": (FINE, MIDDLE, Scale(1, top=4)),
    "routed tiles": (FINE, MIDDLE, Scale(1, patch_window=8, top=8)),
    "dense": (Scale(4),),
    "local": (Scale(4, window=2),),
    "window": (Scale(4, window=32),),
    "routed blocks": (FINE, MIDDLE, Scale(1, patch_window=3, top=32)),
}


DIFFUSION = DiffusionConfig(std=2.0, shift=4.0, clean=0.5)
PREFIX = replace(DIFFUSION, prefix=0.5)


@dataclass(frozen=True)
class Recipe:
    """One change each from these defaults, those of the preset `demo`."""

    scales: str = "pooled"
    actions: bool = False
    diffusion: DiffusionConfig = DIFFUSION
    model: dict[str, Any] = field(default_factory=dict)
    lr: float = 2e-3


VARIANTS: dict[str, Recipe] = {
    "demo": Recipe(),
    "velocity": Recipe(model={"prediction": "velocity"}),
    "x": Recipe(model={"prediction": "x"}),
    "std 1, shift 2, clean 0.25": Recipe(diffusion=DiffusionConfig(std=1.0, shift=2.0, clean=0.25)),
    "std 1": Recipe(diffusion=replace(DIFFUSION, std=1.0)),
    "shift 2": Recipe(diffusion=replace(DIFFUSION, shift=2.0)),
    "shift 8": Recipe(diffusion=replace(DIFFUSION, shift=8.0)),
    "prefix": Recipe(diffusion=PREFIX),
    "no gate": Recipe(model={"gate": "none"}),
    "routed": Recipe("routed", diffusion=PREFIX),
    "routed tiles": Recipe("routed tiles", diffusion=PREFIX),
    "dense": Recipe("dense", diffusion=PREFIX, model={"gate": "none"}),
    "local": Recipe("local", diffusion=PREFIX),
    "actions": Recipe(actions=True),
    "actions, x": Recipe(actions=True, model={"prediction": "x"}),
    "actions, prefix": Recipe(actions=True, diffusion=PREFIX),
    "actions, routed tiles": Recipe("routed tiles", True, PREFIX),
    **{f"memory-{name.split()[0]}": Recipe(name, True, PREFIX, {"prediction": "x"})
       for name in ("pooled", "routed blocks", "dense", "window", "local")},
}  # fmt: skip
# of the continuations: the mean (a single step), more or fewer steps, more of them at high noise, a noisy past
SAMPLINGS = {
    "mean": Sampling(1), "sample": Sampling(16), "4 steps": Sampling(4), "late": Sampling(16, shift=3.0),
    "past at 0.1": Sampling(16, context_level=0.1),
}  # fmt: skip

OTHERS = "others' actions"


def read_video(path: Path) -> Tensor:
    """All frames, uint8 `[T, 3, H, W]`."""
    try:
        import av

        frames = [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
    except ImportError:
        import cv2

        capture, frames = cv2.VideoCapture(str(path)), []
        while (read := capture.read())[0]:
            frames.append(read[1][:, :, ::-1])
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def read_actions(paths: list[Path]) -> tuple[list[Tensor], tuple[str, ...]]:
    """Of every video, one-hot `[T, actions]`; and their names. Nothing where a file is missing."""
    files = [path.with_suffix(".actions.csv") for path in paths]
    if not all(file.is_file() for file in files):
        return [], ()
    rows = [[row[0] for row in csv.reader(file.open())][1:] for file in files]
    names = tuple(sorted({action for own in rows for action in own}))
    return [torch.eye(len(names))[[names.index(action) for action in own]] for own in rows], names


class Clips:
    """Windows of `frames` consecutive frames of videos on the device, with their actions."""

    def __init__(self, videos: list[Tensor], actions: list[Tensor], frames: int, device: torch.device):
        self.pixels = torch.cat(videos).to(device)
        self.actions = torch.cat(actions).to(device) if actions else torch.zeros(len(self.pixels), 0, device=device)
        offsets = np.cumsum([0, *map(len, videos)])
        self.starts = torch.cat([
            torch.arange(a, b - frames + 1) for a, b in zip(offsets, offsets[1:], strict=False) if b - a >= frames
        ])  # fmt: skip
        self.window = torch.arange(frames, device=device)

    def __call__(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Clips `[B, T, 3, H, W]` in [-1, 1], actions `[B, T, actions]`."""
        frames = starts.to(self.window.device)[:, None] + self.window
        return self.pixels[frames].float() / 127.5 - 1, self.actions[frames]


@dataclass
class Data:
    train: Clips
    held_out: Tensor  # clips [B, T, C, H, W] in [-1, 1]
    held_out_actions: Tensor
    actions: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(folder: Path, frames: int, held_frames: int, held_out: int, device: torch.device) -> Data:
    """Many videos: the last fifth is held out; few: the last third of every one."""
    paths = sorted(folder.glob("*.mp4"))
    videos, (actions, names) = [read_video(path) for path in paths], read_actions(paths)
    if len(videos) >= 8:
        count = len(videos) // 5
        train, rest, own, others = videos[:-count], videos[-count:], actions[:-count], actions[-count:]
    else:
        own = [action[: len(video) * 2 // 3] for action, video in zip(actions, videos, strict=False)]
        others = [action[len(video) * 2 // 3 :] for action, video in zip(actions, videos, strict=False)]
        train = [video[: len(video) * 2 // 3] for video in videos]
        rest = [video[len(video) * 2 // 3 :] for video in videos]
    clips = Clips(train, own, frames, device)
    held = Clips(rest, others, min(held_frames, min(map(len, rest))), device)
    chosen = held.starts[torch.linspace(0, len(held.starts) - 1, held_out).long()]
    values = clips.pixels[:: max(1, len(clips.pixels) // 2000)].float() / 127.5 - 1
    mean, std = (tuple(x.tolist()) for x in (values.mean((0, 2, 3)), values.std((0, 2, 3))))
    return Data(clips, *held(chosen), names, mean, std)


def walks(seed: int, clips: int, frames: int, size: tuple[int, int], out_and_back: float) -> Walks:
    torch.set_num_threads(1)
    return ray_cast_maze(seed, clips, frames, *size, out_and_back=out_and_back, texels=4)


def load_mazes(clips: int, frames: int, size: tuple[int, int], held_out: int, device: torch.device) -> Data:
    """As many clips, in parts made side by side; those that are held out are other mazes."""
    each = 50
    parts = [(seed, each, frames, size, 0.5) for seed in range(-(-clips // each))]
    with torch.multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        made = pool.starmap(walks, [*parts, (10**6, held_out, frames, size, 1.0)], chunksize=1)
    actions = [torch.eye(len(ACTIONS))[part.actions] for part in made]
    train = Clips([part.video.flatten(0, 1) for part in made[:-1]], [part.flatten(0, 1) for part in actions[:-1]],
                  frames, device)  # fmt: skip
    train.starts = torch.arange(len(parts) * each) * frames
    held = made[-1].video.to(device).float() / 127.5 - 1
    mean, std = (tuple(x.tolist()) for x in (held.mean((0, 1, 3, 4)), held.std((0, 1, 3, 4))))
    return Data(train, held, actions[-1].to(device), ACTIONS, mean, std)


def train(model: MSCTransformer, recipe: Recipe, data: Data, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains in place; returns the average of the weights, and how it went."""
    device = data.held_out.device
    for block in model.blocks if args.compile else ():
        block.compile()
    average = copy.deepcopy(dict(model.named_parameters()))
    parameters: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda")
    chosen = torch.Generator().manual_seed(seed)
    steps, began = args.steps, 0.0
    losses: list[tuple[int, float, float]] = []
    looks: dict[int, list[float]] = {}
    for step in range(steps):
        if step == 20:
            synchronize(device)
            began = time.perf_counter()
        starts = data.train.starts[torch.randint(len(data.train.starts), (args.batch,), generator=chosen)]
        pixels, actions = data.train(starts)
        x = model.normalise(pixels)
        kept = torch.rand(args.batch, 1, 1, generator=chosen) >= 0.1
        condition = Condition(signals={"actions": actions.where(kept.to(device), torch.nan)})
        t = torch.stack([
            noise_levels(recipe.diffusion, recipe.diffusion.shift or 1.0, seed, step * args.batch + i, 0, x.shape[1], 1)
            for i in range(args.batch)
        ]).to(device, non_blocking=True)  # fmt: skip
        noise = torch.randn_like(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = model(add_noise(x, noise, t), t, condition)
        loss = Loss().mean(Loss().per_frame(velocity, x, noise), t)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        spent = (time.perf_counter() - began) / args.train_seconds if step > 20 else 0.0
        done = max(step / steps, spent)
        rate = min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        optimizer.param_groups[0]["lr"] = recipe.lr * rate
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), parameters, 1 - min(0.999, (step + 1) / (step + 10)))
        ends = done >= 1 or step == steps - 1
        if step % 100 == 0 or ends:
            losses.append((step, round(float(loss.detach()), 4), round(float(norm), 3)))
        if step in args.look_at:
            synchronize(device)
            paused = time.perf_counter()
            looks[step] = look(model, average, data, args)
            print(step, f"{paused - began:.0f} s", losses[-1], looks[step], flush=True)
            synchronize(device)
            began += time.perf_counter() - paused
        if ends:
            break
    synchronize(device)
    seconds = time.perf_counter() - began
    model.load_state_dict(average, strict=False)
    return {"losses": losses, "looks": looks, "steps": step + 1, "train_seconds": round(seconds, 1),
            "ms_per_step": round(1000 * seconds / max(1, step - 19), 2)}  # fmt: skip


@torch.no_grad()
def look(model: MSCTransformer, average: dict[str, Tensor], data: Data, args: argparse.Namespace) -> list[float]:
    """PSNR of the mean prediction by horizon, of the average as it is now, on a few held-out clips."""
    fresh = MSCTransformer(model.config, "sdpa").to(data.held_out.device).eval()
    fresh.load_state_dict(average, strict=False)
    return continued(fresh, data, args, Sampling(1), Condition(signals={"actions": data.held_out_actions[:16]}))[1]


def continued(
    model: MSCTransformer, data: Data, args: argparse.Namespace, sampling: Sampling, condition: Condition
) -> tuple[Tensor, list[float]]:
    """What follows on the first frames of held-out clips, as pixels `[B, T, C, H, W]`, and its PSNR by horizon."""
    x = model.normalise(data.held_out[: len(condition.signals["actions"])])
    units = x.shape[1] - args.context
    made = to_pixels(model, torch.cat(list(generate(model, x[:, : args.context], units, sampling, condition)), 1))
    psnr = -10 * (made - to_pixels(model, x[:, args.context :])).square().mean((2, 3, 4)).clamp(min=1e-7).log10()
    return made, [round(float(psnr[:, h - 1].mean()), 2) for h in HORIZONS if h <= units]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def examine(model: MSCTransformer, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Velocity error of one frame after a clean past, and continuations against the truth and the last frame."""
    x, context = model.normalise(data.held_out), args.context
    source = torch.Generator(x.device).manual_seed(1)
    errors, condition = {}, Condition(signals={"actions": data.held_out_actions})
    part, first = x[:, : context + 1], condition.of_frames(slice(context + 1))
    for level in LEVELS:
        t = torch.zeros(part.shape[:2], device=x.device)
        t[:, -1] = level
        noise = torch.randn(part.shape, generator=source, device=x.device)
        errors[str(level)] = round(
            float(Loss().per_frame(model(add_noise(part, noise, t), t, first), part, noise)[:, -1].mean()), 4
        )
    units = x.shape[1] - context
    results: dict[str, Any] = {"velocity_error": errors}
    truth = to_pixels(model, x[:, context:])
    horizons = [h for h in HORIZONS if h <= units]
    began = time.perf_counter()
    others = data.held_out_actions.clone()
    others[:, context:] = others[:, context:].roll(1, 0)  # the actions of another clip
    swapped = {OTHERS: Condition(signals={"actions": others})} if model.config.signals else {}
    for name in [name for name in (*SAMPLINGS, *swapped) if name in args.samplings]:
        sampling, under = SAMPLINGS.get(name, SAMPLINGS["sample"]), swapped.get(name, condition)
        made, psnr = continued(model, data, args, sampling, under)
        results[name] = {
            "psnr": psnr,
            "contrast": [round(ratio(made, truth, h, lambda z: z), 2) for h in horizons],
            "sharpness": [round(ratio(made, truth, h, detail), 2) for h in horizons],
        }
        results[f"pictures {name}"] = sheet(truth, made, horizons)
    last = to_pixels(model, x[:, context - 1 : context])
    psnr = -10 * (last - truth).square().mean((2, 3, 4)).clamp(min=1e-7).log10()
    results["copy last"] = [round(float(psnr[:, h - 1].mean()), 2) for h in horizons]
    results["examined_s"] = round(time.perf_counter() - began, 1)
    return results


def to_pixels(model: MSCTransformer, x: Tensor) -> Tensor:
    return (model.denormalise(x) / 2 + 0.5).clamp(0, 1)


def detail(x: Tensor) -> Tensor:
    """What a mean over 2 × 2 pixels loses."""
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    return x - pooled.repeat_interleave(2, -1).repeat_interleave(2, -2)


def ratio(made: Tensor, truth: Tensor, horizon: int, of: Any) -> float:
    """Standard deviation of something in generated frames, as a share of the true ones'."""
    a, b = (of(x[:, horizon - 1]).std((1, 2, 3)).mean() for x in (made, truth))
    return float(a / b)


def sheet(truth: Tensor, made: Tensor, horizons: list[int]) -> Tensor:
    """Truth above what was made, of four clips: uint8 `[H, W, 3]`."""
    picked = [h - 1 for h in horizons]
    rows = [
        torch.cat(list(x[i, picked]), -1) for i in range(0, len(truth), max(1, len(truth) // 4)) for x in (truth, made)
    ]
    return (torch.cat(rows, -2).permute(1, 2, 0) * 255).byte().cpu()


def run(name: str, data: Data, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    recipe, device = VARIANTS[name], data.held_out.device
    heads = max(4, args.width // 64)
    scales = tuple(replace(scale, heads=scale.heads * heads // 4) for scale in SCALES[recipe.scales])
    config = ModelConfig(
        width=args.width, depth=args.depth, scales=scales, patch=4, channels=3,
        latent_mean=data.mean, latent_std=data.std,
        signals=(SignalConfig("actions", "discrete", data.actions),) if recipe.actions else (), **recipe.model,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = MSCTransformer(config, "auto" if device.type == "cuda" else "sdpa").to(device)
    began = time.perf_counter()
    trained = train(model, recipe, data, seed, args)
    fresh = MSCTransformer(config, "sdpa").to(device).eval()
    fresh.load_state_dict(model.state_dict())
    size = data.held_out.shape[-2:]
    if args.save:
        weights = {key: value.half().cpu() for key, value in fresh.state_dict().items()}
        torch.save({"config": fresh.config_dict(), "weights": weights}, args.save / f"{name.replace(' ', '_')}.pt")
    return {
        "videos": "mazes" if args.mazes else args.videos.name, "variant": name, "seed": seed, "batch": args.batch,
        "frames": args.frames, "width": args.width, "depth": args.depth,
        "tflop_per_step": args.batch * cost.step_flops(config, args.frames, *size) / 1e12, **trained,
        **examine(fresh, data, args), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def run_of(folder: Path, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """A trained run, examined."""
    began = time.perf_counter()
    model = open_run(folder).model
    columns = model.config.signals[0].columns if model.config.signals else ()
    if columns and columns != data.actions:
        raise SystemExit(f"the run's actions are {columns}, those of the videos {data.actions}")
    return {"videos": args.videos.name, "variant": str(folder), "seed": 0, "losses": [None], "ms_per_step": 0,
            **examine(model, data, args), "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--videos", type=Path)
    made.add_argument("--mazes", type=int, metavar="CLIPS")
    parser.add_argument("--size", type=int, nargs=2, default=(48, 48), metavar=("H", "W"), help="of mazes")
    parser.add_argument("--run", type=Path, help="examine this one")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--train-seconds", type=float, default=1e9, help="end earlier, with the schedule")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the averaged weights, in fp16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--context", type=int, default=8)
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--samplings", nargs="+", default=[*SAMPLINGS, OTHERS], choices=[*SAMPLINGS, OTHERS])
    parser.add_argument(
        "--look-at", type=int, nargs="*", default=(), metavar="STEP", help="the mean's PSNR after these"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()
    if args.mazes:
        args.context = args.frames // 2
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done = set()
    if args.results.is_file():
        lines = [json.loads(line) for line in args.results.read_text().splitlines()]
        done = {(line["videos"], line["variant"], line["seed"]) for line in lines}
    if args.mazes:
        data = load_mazes(args.mazes, args.frames, tuple(args.size), args.held_out, device)
    else:
        data = load(args.videos, args.frames, args.context + args.units, args.held_out, device)
    source = "mazes" if args.mazes else args.videos.name
    last = 0.0
    for seed in args.seeds:
        for name in [str(args.run)] if args.run else args.variants:
            if (source, name, seed) in done or time.monotonic() - began + last > args.seconds:
                continue
            result = run_of(args.run, data, args) if args.run else run(name, data, seed, args)
            last = result["seconds"]
            from PIL import Image

            for key in [key for key in result if key.startswith("pictures")]:
                file_name = f"{source}-{Path(name).name}-{seed}{key.removeprefix('pictures')}.png"
                Image.fromarray(result.pop(key).numpy()).save(args.results.parent / file_name.replace(" ", "_"))
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(name, seed, result["losses"][-1], result["ms_per_step"], "ms", result["velocity_error"],
                  "copy last", result["copy last"], f"{result['seconds']} s")  # fmt: skip
            for key in [key for key in result if isinstance(result[key], dict) and "psnr" in result[key]]:
                print(f"  {key:16}", *(f"{measure} {result[key][measure]}" for measure in result[key]), flush=True)


if __name__ == "__main__":
    main()
