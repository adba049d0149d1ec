"""Multi-scale against dense attention at equal wall time, on video with far memory.

    python tests/bench/race.py FOLDER --seconds 120

The data are moving textures in which a disc hides for a third of the clip. Both models have the same width, depth and
learning rate; each trains alone for so many seconds, compiled, and is looked at now and then while its clock stands
still. FOLDER gets race.jsonl (held-out loss by training time), PSNR by horizon of held-out clips continued from
their first half, a plot of both, and a contact sheet of one clip. `--plot` only draws what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msc.datasets.statistics import measure_statistics
from msc.datasets.synthetic import moving_textures
from msc.pretrain.diffusion.loss import Loss
from msc.pretrain.diffusion.rectified_flow import add_noise
from msc.pretrain.diffusion.sampler import Sampling, generate
from msc.pretrain.evaluation.metrics import psnr
from msc.pretrain.inference.contact_sheet import write_contact_sheet
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.noise_gate import gate_constants
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.model.transformer import MSCTransformer

PATCH, HEADS = 2, 4


def levels(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Noise of training: independent per frame, a quarter of the frames clean, `[B, T]`."""
    t = torch.sigmoid(1 + 1.5 * torch.randn(shape, generator=source))
    clean = torch.rand(shape, generator=source) < 0.25
    clean[:, -1] = False
    return t.masked_fill(clean, 0.0)


def losses(model: MSCTransformer, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean over supervised frames."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        velocity = model(add_noise(x, noise, t), t)
    return Loss().mean(Loss().per_frame(velocity, x, noise), t)


@torch.no_grad()
def held_out_loss(model: MSCTransformer, clips: Tensor, batch: int) -> float:
    source, found = torch.Generator().manual_seed(77), []
    for x in clips.split(batch):
        t = levels((x.shape[0], x.shape[1]), source).to(x.device)
        noise = torch.randn(x.shape, generator=source).to(x.device)
        found.append(float(losses(model, x, t, noise)))
    return sum(found) / len(found)


def textures(seed: int, clips: int, size: tuple[int, int, int], part: int = 16) -> Tensor:
    """`moving_textures`, made a few clips at a time by several processes: uint8 `[N, T, 3, H, W]`."""
    parts = [(seed + first, min(part, clips - first), size) for first in range(0, clips, part)]
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1, len(parts)), get_context("spawn")) as workers:
        return torch.cat([torch.from_numpy(made) for made in workers.map(some_textures, parts)])


def some_textures(part: tuple[int, int, tuple[int, int, int]]) -> np.ndarray:
    torch.set_num_threads(1)  # many would wait for each other at every small tensor
    seed, clips, size = part
    return moving_textures(seed, clips, *size).numpy()


def race(
    model: MSCTransformer, train: Tensor, rest: Tensor, mean: Tensor, std: Tensor, args: argparse.Namespace
) -> Iterator[dict]:
    """Train until the time is over; yields what was seen now and then. Compiling is not counted."""
    device, average = rest.device, {name: p.detach().clone() for name, p in model.named_parameters()}
    source = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, (0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda"
    )

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (number + 1) / 100)
        x = train[torch.randint(len(train), (args.batch,), generator=source)].to(device, non_blocking=True)
        x = (x.float() - mean) / std
        t = levels((args.batch, x.shape[1]), source).to(device)
        losses(model, x, t, torch.randn_like(x)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        keep = 0.5 ** (1 / min(args.halflife, 1 + number / 10))
        torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1 - keep)

    def averaged(look: Callable[[], float]) -> float:
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        load(model, average)
        found = look()
        load(model, own)
        return found

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    start_weights, compiling = {name: p.detach().clone() for name, p in model.named_parameters()}, time.perf_counter()
    step(0)  # compiles
    held_out_loss(model, rest[: args.batch], args.batch)
    load(model, start_weights)
    load_into(average, start_weights)
    optimizer.state.clear()
    wait()
    print(f"compiled, tried and set back in {time.perf_counter() - compiling:.0f} s", flush=True)
    number, spent, last = 0, 0.0, 0.0
    began = time.perf_counter()
    while spent < args.seconds:
        step(number)
        number += 1
        if number % 10 == 0:
            wait()
            spent = last + time.perf_counter() - began
            if spent - last >= args.look or spent >= args.seconds:
                loss = averaged(lambda: held_out_loss(model, rest, args.batch))
                yield {"seconds": spent, "steps": number, "loss": loss}
                wait()
                last, began = spent, time.perf_counter()
    load(model, average)


def load(model: MSCTransformer, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def load_into(target: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        target[name].copy_(value)


@torch.no_grad()
def continued(model: MSCTransformer, x: Tensor, steps: int) -> Tensor:
    """Held-out clips from their first half on, normalised: `[B, T, C, H, W]`."""
    weights = model.state_dict()
    model = MSCTransformer(model.config, "sdpa").to(x.device)  # many shapes: not compiled
    model.load_state_dict(weights, assign=True)
    given = x.shape[1] // 2
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        new = list(generate(model, x[:, :given], x.shape[1] - given, Sampling(steps, seed=5)))
    return torch.cat([x[:, :given], *new], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="of training, for each model")
    parser.add_argument("--look", type=float, default=10, help="seconds between looks at the held-out loss")
    parser.add_argument("--models", nargs="+", default=["multi-scale", "dense"])
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--halflife", type=float, default=200, help="of the averaged weights, in steps")
    parser.add_argument("--steps", type=int, default=8, help="of sampling; 0: no clip is continued")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="RESULTS.jsonl", help="draw these into FOLDER and end")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, args.folder / "race.png")
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    began, size = time.perf_counter(), (args.frames, args.side, args.side)
    train, rest = textures(100, args.clips, size), textures(9000, args.held_out, size)
    made = time.perf_counter() - began
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # some thousand small sums a clip
    statistics = measure_statistics(train[:64].float())
    torch.set_num_threads(threads)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (statistics.mean, statistics.std))
    train, rest = (train.pin_memory() if device.type == "cuda" else train), (rest.to(device).float() - mean) / std
    ready = time.perf_counter() - began
    print(f"{args.clips} + {args.held_out} clips made in {made:.0f} s, measured after {ready:.0f}", flush=True)

    given = args.frames // 2

    def pixels(x: Tensor) -> Tensor:  # in [0, 1]
        return ((x.float() * std + mean) / 255).clamp(0, 1).cpu()

    def scores(videos: Tensor) -> list[float]:
        """PSNR by horizon, mean over clips."""
        pairs = zip(videos[:, given:], pixels(rest)[:, given:], strict=True)
        return torch.stack([psnr(video, truth) for video, truth in pairs]).mean(0).tolist()

    results = args.folder / "race.jsonl"
    results.unlink(missing_ok=True)
    rows = [("truth", pixels(rest[0]))]
    for name in args.models:
        scales = (Scale(HEADS),) if name == "dense" else default_scales(HEADS, None)
        torch.manual_seed(0)
        config = ModelConfig(
            width=args.width, depth=args.depth, scales=scales, patch=PATCH, channels=3,
            gate="none" if name == "dense" else "logits", gate_constants=gate_constants(scales, PATCH, statistics),
        )  # fmt: skip
        model = MSCTransformer(config).to(device)
        if args.compile:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile()
        for seen in race(model, train, rest, mean, std, args):
            with results.open("a") as file:
                file.write(json.dumps({"model": name, **seen}) + "\n")
            print(
                f"{name:<12} {seen['seconds']:7.1f} s {seen['steps']:6} steps  held-out loss {seen['loss']:.4f}",
                flush=True,
            )
        if not args.steps:
            continue
        for which, steps in (("mean prediction", 1), ("sample", args.steps)):
            video = continued(model, rest, steps)
            quality = scores(pixels(video))
            with results.open("a") as file:
                file.write(json.dumps({"model": name, "psnr": which, "by_horizon": quality}) + "\n")
            print(f"{name:<12} PSNR of {which}: " + " ".join(f"{quality[h - 1]:.2f}" for h in horizons(len(quality))))
        rows.append((name, pixels(video[0])))
        sheet = [(label, (clip * 255).round().to(torch.uint8)) for label, clip in rows]
        write_contact_sheet(sheet, args.folder / "sheet.png", context=given)
    if args.steps:
        truth = pixels(rest)
        quality = scores(truth[:, given - 1 : given].expand_as(truth))
        with results.open("a") as file:
            file.write(json.dumps({"model": "copy last", "psnr": "copy last", "by_horizon": quality}) + "\n")
        print("copy last    PSNR: " + " ".join(f"{quality[h - 1]:.2f}" for h in horizons(len(quality))))
    plot(results, args.folder / "race.png")


def plot(results: Path, out: Path) -> None:
    """Held-out loss by training time, and PSNR by horizon."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in results.read_text().splitlines()]
    continued = [line for line in lines if "psnr" in line]
    panels = 2 if continued else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4), layout="constrained", squeeze=False)
    left, right = axes[0][0], axes[0][-1]
    for name in dict.fromkeys(line["model"] for line in lines):
        seen = [line for line in lines if line["model"] == name and "loss" in line]
        if seen:
            left.plot([line["seconds"] for line in seen], [line["loss"] for line in seen], ".-", label=name)
    left.set(xlabel="seconds of training", ylabel="held-out loss", yscale="log")
    left.legend()
    for line in continued:
        label = line["psnr"] if line["psnr"] == line["model"] else f"{line['model']}, {line['psnr']}"
        right.plot(range(1, len(line["by_horizon"]) + 1), line["by_horizon"], label=label)
    if continued:
        right.set(xlabel="frames ahead", ylabel="PSNR, dB", xscale="log")
        right.legend()
    figure.savefig(out, dpi=90)


def horizons(count: int) -> list[int]:
    """1, 2, 4, ... up to count."""
    return [2**i for i in range(count.bit_length()) if 2**i <= count]


if __name__ == "__main__":
    main()
