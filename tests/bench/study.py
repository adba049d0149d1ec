"""Which attention learns best: dense, local and multi-scale causal, with the noise gate in every place.

    python tests/bench/study.py RESULTS.jsonl --tasks fields textures curtains camera
    python tests/bench/study.py RESULTS.jsonl --tasks real --shards FOLDER
    python tests/bench/study_report.py RESULTS.jsonl

Each run trains one small model and appends a line to RESULTS.jsonl; runs found there are not repeated. All
variants have the same parameters but for the gate's few, and see the same clips and noise. "dense" trains for
as many steps as the others, "dense=" for as many FLOPs as multi-scale. On a GPU a step is one CUDA graph, and the
seeds of a variant train side by side.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.shards.index import read_index
from msc.datasets.statistics import Statistics, measure_statistics
from msc.datasets.synthetic import curtains, gaussian_fields, moving_textures, turning_camera
from msc.pretrain import cost
from msc.pretrain.diffusion.loss import Loss
from msc.pretrain.diffusion.rectified_flow import add_noise, shift_levels
from msc.pretrain.diffusion.sampler import Sampling, generate
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.layers import Block
from msc.pretrain.model.noise_gate import Gate, gate_constants
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.model.transformer import MSCTransformer

TASKS = ("fields", "textures", "real", "curtains", "camera")
SIDE, PATCH, HEADS = 24, 2, 4  # 12 x 12 tokens per frame
# The camera's full turn in frames, its columns per frame, and a frame of its first turn whose new columns no earlier
# frame shows. What leaves the picture comes back 18 frames later.
TURN, SPEED, FIRST = 24, 4, 14
SHOWN, HIDDEN = 2, 16  # frames in which the curtains' picture is seen and is not; it returns at SHOWN + HIDDEN
QUERY = (0.3, 0.6, 0.8, 0.95)  # noise of the frame asked for
CONTEXT = (0.0, 0.3, 0.6, 0.9)  # noise of all frames before it
LEVELS = (0.0, 0.2)  # noise at which a roll-out looks at its past
BINS = 5

MULTI = default_scales(HEADS, patch_window=8)
NEAR = MULTI[:2]


@dataclass(frozen=True)
class Variant:
    """learned: is the gate's δ. same_flops: as many steps as multi-scale's FLOPs. prefix: share of clips that begin
    with a clean prefix."""

    scales: tuple[Scale, ...]
    gate: Gate = "none"
    learned: bool = False
    same_flops: bool = False
    prefix: float = 0.0


VARIANTS = {
    "dense": Variant((Scale(HEADS),)),
    "dense=": Variant((Scale(HEADS),), same_flops=True),
    "local": Variant((Scale(HEADS, window=2),)),
    "none": Variant(MULTI),
    "fixed": Variant(MULTI, "logits"),
    "logits": Variant(MULTI, "logits", learned=True),
    "unpooled": Variant((*NEAR, Scale(1, 4, 1)), "logits", learned=True),  # the coarse scale keeps every frame
    # long-range memory: what the far-seeing quarter of the heads is
    "dense prefix": Variant((Scale(HEADS),), prefix=0.5),
    "pooled prefix": Variant(MULTI, prefix=0.5),
    "far prefix": Variant((*NEAR, Scale(1)), prefix=0.5),
    "routed": Variant((*NEAR, Scale(1, top=4))),
    "routed prefix": Variant((*NEAR, Scale(1, top=4)), prefix=0.5),
    "routed prefix 0.9": Variant((*NEAR, Scale(1, top=4)), prefix=0.9),
    "routed 8 prefix": Variant((*NEAR, Scale(1, top=8)), prefix=0.5),
    "routed tiles prefix": Variant((*NEAR, Scale(1, patch_window=6, top=8)), prefix=0.5),
    "routed tiles prefix 0.9": Variant((*NEAR, Scale(1, patch_window=6, top=8)), prefix=0.9),
    "routed small tiles prefix": Variant((*NEAR, Scale(1, patch_window=3, top=32)), prefix=0.5),
    "routed small tiles prefix 0.9": Variant((*NEAR, Scale(1, patch_window=3, top=32)), prefix=0.9),
    "routed gate prefix": Variant((*NEAR, Scale(1, top=4)), "logits", True, prefix=0.5),
    "two routed prefix": Variant((Scale(1, window=2, patch_window=8), NEAR[1], Scale(2, top=4)), prefix=0.5),
    "local prefix": Variant((Scale(HEADS, window=2),), prefix=0.5),
}


@dataclass
class Task:
    """Normalised clips [N, T, C, SIDE, SIDE] and their statistics."""

    train: Callable[[Tensor], Tensor]  # indices [B] -> clips
    clips: int
    held_out: Tensor
    statistics: Statistics
    frames: int


# Data -----------------------------------------------------------------------------------------------------


def made(video: Callable[[int, int], Tensor], clips: int, held_out: int, device: torch.device) -> Task:
    """A task of clips that are made up: `video(seed, clips)`. Floats already have mean 0 and variance 1."""
    train, rest = video(10, clips), video(11, held_out)
    statistics = measure_statistics(train[:256].float())
    if not train.is_floating_point():
        mean, std = (torch.tensor(x)[:, None, None] for x in (statistics.mean, statistics.std))
        train, rest = ((x - mean) / std for x in (train, rest))
    train, rest = train.to(device), rest.to(device)
    return Task(lambda chosen: train[chosen], clips, rest, statistics, train.shape[1])


def real(folder: Path, held_out: int, device: torch.device) -> Task:
    """Random crops of SIDE x SIDE pixels, mirrored or not, from the videos of a folder of shards."""
    index = read_index(folder)

    def videos(split: str) -> Tensor:
        samples = ShardReader(folder, index, split)
        return torch.stack([samples.read(i)[1] for i in range(len(samples))]).float()

    def crop(video: Tensor, numbers: list[int]) -> Tensor:
        source = torch.Generator().manual_seed(numbers[0])
        cut = []
        for number in numbers:
            y, x, mirrored = (
                int(torch.randint(n, (), generator=source)) for n in (video.shape[3] - SIDE, video.shape[4] - SIDE, 2)
            )
            clip = video[number % len(video), :, :, y : y + SIDE, x : x + SIDE]
            cut.append(clip.flip(-1) if mirrored else clip)
        return torch.stack(cut)

    train, rest = videos("train"), videos("held_out")
    clips = 1 << 20  # crops of the same clip are counted as different
    statistics = measure_statistics(crop(train, list(range(512))))
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (statistics.mean, statistics.std))
    train = train.to(device)
    return Task(
        lambda chosen: (crop(train, chosen.tolist()) - mean) / std,
        clips,
        (crop(rest, list(range(held_out))).to(device) - mean) / std,
        statistics,
        index.frames,
    )


def load(name: str, clips: int, held_out: int, shards: Path | None, device: torch.device) -> Task:
    if name == "fields":
        return made(lambda seed, n: gaussian_fields(seed, n, 16, SIDE, SIDE), clips, held_out, device)
    if name == "textures":
        return made(lambda seed, n: moving_textures(seed, n, 16, SIDE, SIDE), clips, held_out, device)
    if name == "curtains":
        return made(
            lambda seed, n: curtains(seed, n, 2 * (SHOWN + HIDDEN) + SHOWN, SIDE, SIDE, SHOWN, HIDDEN),
            clips, held_out, device,
        )  # fmt: skip
    if name == "camera":
        return made(
            lambda seed, n: turning_camera(seed, n, TURN + 12, SIDE, SIDE, SPEED, TURN), clips, held_out, device
        )
    if shards is None:
        raise SystemExit("the task 'real' needs --shards FOLDER, as `msc convert` writes it")
    return real(shards, held_out, device)


def levels(shape: tuple[int, int], source: torch.Generator, prefix: float = 0.0) -> Tensor:
    """Noise of training: independent per frame, a quarter of the frames clean, or a clean prefix, `[B, T]`."""
    t = torch.sigmoid(1.5 * torch.randn(shape, generator=source))
    t = torch.from_numpy(shift_levels(t.numpy(), 1.5))
    clean = torch.rand(shape, generator=source) < 0.25
    if prefix:
        length = torch.randint(shape[1], (shape[0], 1), generator=source)
        begins_clean = torch.rand((shape[0], 1), generator=source) < prefix
        clean = torch.where(begins_clean, torch.arange(shape[1]) < length, clean)
    clean[:, -1] = False
    return t.masked_fill(clean, 0.0)


# Training -------------------------------------------------------------------------------------------------


def train(models: dict[int, MSCTransformer], task: Task, steps: int, args: argparse.Namespace, prefix: float) -> float:
    """Train the models, by seed, in place and side by side; the wall time of the steps in seconds."""
    trainers = [trainer(model, task, steps, seed, args, prefix) for seed, model in models.items()]
    start = time.perf_counter()
    for number in range(steps):
        for step in trainers:
            step(number)
    if task.held_out.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def trainer(
    model: MSCTransformer, task: Task, steps: int, seed: int, args: argparse.Namespace, prefix: float
) -> Callable[[int], None]:
    """What makes step `number`; on a GPU it only starts it, on a stream of its own."""
    device, batch = task.held_out.device, args.batch
    on_gpu = device.type == "cuda"
    chosen, drawn = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    shape = (batch, *task.held_out.shape[1:])
    x, noise, t = torch.zeros(shape, device=device), torch.zeros(shape, device=device), torch.ones(shape[:2])
    t = t.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr_now = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=lr_now, betas=(0.9, 0.95), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            velocity = model(add_noise(x, noise, t), t)
        Loss().mean(Loss().per_frame(velocity, x, noise), t).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def feed(number: int) -> None:
        x.copy_(task.train(torch.randint(task.clips, (batch,), generator=chosen)))
        noise.normal_(generator=drawn)
        t.copy_(levels(shape[:2], chosen, prefix))
        # By way of the optimizer, so that its state, which the graph writes to, lives as long as this function.
        optimizer.param_groups[0]["lr"].fill_(args.lr * min((number + 1) / 50, max(0.02, 1 - number / steps)))

    def at_once(number: int) -> None:
        feed(number)
        step()

    if not on_gpu or args.eager:
        return at_once
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # with a learning rate of 0
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def start(number: int) -> None:
        with torch.cuda.stream(stream):
            feed(number)
            graph.replay()

    return start


# What the trained model can do ------------------------------------------------------------------------------


def noised(x: Tensor, t: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return add_noise(x, noise, t), noise


@torch.no_grad()
def held_out_loss(model: MSCTransformer, x: Tensor, each: int = 128) -> tuple[float, list[float]]:
    """Loss as in training, over all supervised frames and by range of the frame's noise."""
    source = torch.Generator().manual_seed(77)
    sums, counts = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    for draw in range(4):
        for i, part in enumerate(x.split(each)):
            t = levels((part.shape[0], part.shape[1]), source).to(x.device)
            seen, noise = noised(part, t, 1000 * draw + i)
            losses = Loss().per_frame(model(seen, t), part, noise)[t > 0].double().cpu()
            bins = (t[t > 0] * BINS).long().clamp(max=BINS - 1).cpu()
            sums.index_add_(0, bins, losses)
            counts.index_add_(0, bins, torch.ones_like(losses))
    return float(sums.sum() / counts.sum()), (sums / counts).tolist()


@torch.no_grad()
def asked(model: MSCTransformer, x: Tensor, frame: int, t_q: float, t_c: float, each: int = 128) -> Tensor:
    """Mean squared velocity error of one frame at noise t_q, all earlier ones at t_c; `[H, W]`."""
    total = torch.zeros(x.shape[-2:], dtype=torch.float64)
    for i, part in enumerate(x.split(each)):
        t = torch.full(part.shape[:2], t_c, device=x.device)
        t[:, frame:] = t_q
        seen, noise = noised(part, t, i)
        wrong = model(seen, t)[:, frame] - (noise - part)[:, frame]
        total += wrong.square().mean(1).sum(0).double().cpu()
    return total / len(x)


@torch.no_grad()
def roll_out(model: MSCTransformer, x: Tensor, units: int, level: float) -> dict[str, list[float]]:
    """Error of generated frames by horizon, and their variance as a share of the true frames'."""
    context = x.shape[1] - units
    frames = list(generate(model, x[:, :context], units, Sampling(4, 1, context_level=level)))
    generated, truth = torch.cat(frames, 1), x[:, context:]
    return {
        "error": (generated - truth).square().mean((0, 2, 3, 4)).tolist(),
        "variance": (generated.var((0, 2, 3, 4)) / truth.var((0, 2, 3, 4))).tolist(),
    }


def build(task: Task, variant: str, seed: int, args: argparse.Namespace) -> MSCTransformer:
    learned = VARIANTS[variant].learned
    torch.manual_seed(seed)
    model = MSCTransformer(configure(task, VARIANTS[variant], args), args.backend).to(task.held_out.device)
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.attention.delta is not None:
            block.attention.delta.requires_grad_(learned)
    if args.compile:
        for block in model.blocks:
            block.compile()
    return model


def configure(task: Task, variant: Variant, args: argparse.Namespace) -> ModelConfig:
    scales = variant.scales
    return ModelConfig(
        width=args.width, depth=args.depth, scales=scales, patch=PATCH, gate=variant.gate,
        channels=task.held_out.shape[2], gate_constants=gate_constants(scales, PATCH, task.statistics),
    )  # fmt: skip


def run(name: str, task: Task, variant: str, seeds: list[int], args: argparse.Namespace) -> list[dict]:
    """Train and examine one variant; a result for each seed."""
    flops, reference = (
        cost.step_flops(configure(task, VARIANTS[name], args), task.frames, SIDE, SIDE) for name in (variant, "logits")
    )
    steps = round(args.steps * reference / flops) if VARIANTS[variant].same_flops else args.steps
    models = {seed: build(task, variant, seed, args) for seed in seeds}
    seconds = train(models, task, steps, args, VARIANTS[variant].prefix)
    results = []
    for seed, model in models.items():
        weights = model.state_dict()
        model = MSCTransformer(model.config, "sdpa").to(task.held_out.device)  # evaluation has many shapes to compile
        model.load_state_dict(weights)
        results.append({
            "task": name, "variant": variant, "seed": seed, "steps": steps, "batch": args.batch, "width": args.width,
            "depth": args.depth, "flops": flops * args.batch * steps, "seconds": seconds, **examine(name, task, model),
        })  # fmt: skip
    return results


def examine(name: str, task: Task, model: MSCTransformer) -> dict:
    """What a trained model can do."""
    model.eval()
    mean, by_noise = held_out_loss(model, task.held_out)
    last = task.frames - 1
    found = {
        "loss": mean,
        "by_noise": by_noise,
        "grid": [[float(asked(model, task.held_out, last, q, c).mean()) for c in CONTEXT] for q in QUERY],
        "roll_out": {str(level): roll_out(model, task.held_out[:64], 4, level) for level in LEVELS},
    }
    if name == "camera":  # the columns that enter: never seen in the first turn, seen a full turn ago in the second
        found["far"] = {
            turn: {str(q): float(asked(model, task.held_out, frame, q, 0.0)[:, -SPEED:].mean()) for q in QUERY}
            for turn, frame in (("first", FIRST), ("second", last))
        }
    if name == "curtains":  # the first frame of the picture and of its return
        found["far"] = {
            turn: {str(q): float(asked(model, task.held_out, frame, q, 0.0).mean()) for q in QUERY}
            for turn, frame in (("first", 0), ("second", SHOWN + HIDDEN))
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["fields"], choices=TASKS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clips", type=int, default=4096, help="in the training set")
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--backend", default="sdpa", help="kernel of training")
    parser.add_argument("--compile", action="store_true", help="torch.compile while training")
    parser.add_argument("--bf16", action="store_true", help="products of training in bf16")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time")
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done = set()
    if args.results.is_file():
        lines = [json.loads(line) for line in args.results.read_text().splitlines()]
        done = {(line["task"], line["variant"], line["seed"]) for line in lines}
    for name in args.tasks:
        task = None
        for variant in args.variants:
            seeds = [seed for seed in args.seeds if (name, variant, seed) not in done]
            if not seeds or (time.monotonic() - began) / 60 > args.minutes:
                continue
            task = task or load(name, args.clips, args.held_out, args.shards, device)
            start = time.monotonic()
            results = run(name, task, variant, seeds, args)
            with args.results.open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in results)
            losses = ", ".join(f"{result['loss']:.4f}" for result in results)
            far = [[round(x, 3) for x in result.get("far", {}).get("second", {}).values()] for result in results]
            print(
                f"{name} {variant}, far {far}, seeds {seeds}: loss {losses}, {results[0]['steps']} steps in "
                f"{results[0]['seconds']:.0f} s, {time.monotonic() - start:.0f} s in all",
                flush=True,
            )


if __name__ == "__main__":
    main()
