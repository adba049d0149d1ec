"""One video over several GPUs: weak and strong scaling of multi-scale and dense attention, by layout along time.

    python tests/bench/several_gpus.py --preset base --frames 256 --video 512
    python tests/bench/several_gpus.py --preset base --longest                 # a million tokens, trained
    python tests/bench/several_gpus.py --device cpu --preset demo --side 16 --frames 4 --video 8 --ranks 1 2

Weak: `--frames` for each GPU, so that the video grows with them; strong: one video of `--video` frames. Both are
compared with one GPU in the same run, if it is among `--ranks`; GPUs differ by some per cent, so with `--each` a row
says how long the slowest of them takes where each has a clip of its own. Steps are forward and backward passes of one
clip, of the slowest rank, medians; with `--engine` whole steps by DeepSpeed (ZeRO as in the preset), with gradients
reduced and an update. "Not hidden" is the share of a step that goes when no message along time is sent and receivers
get random numbers instead; such steps and ordinary ones take turns (but for compiled steps, which it would compile
twice). "Of the CPU" are the seconds in which the slowest rank's starts all of a step, waits for room among what is
started included: where it takes much less, no GPU waits for it. "Planned" is what planning/plan.py says of the same
steps
before. Rows come as they are measured; one that runs out of memory or time says so, and the others go on.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from msc.launch.planning import hardware
from msc.launch.planning.plan import make_plan
from msc.launch.processes import launcher
from msc.parallel import collectives, deepspeed_zero, process_group
from msc.parallel.mesh import make_mesh
from msc.parallel.signals import collect_signals
from msc.pretrain import cost
from msc.pretrain.diffusion.loss import Loss
from msc.pretrain.diffusion.rectified_flow import add_noise
from msc.pretrain.kernels.compile_helpers import limit_kept_activations
from msc.pretrain.layout_planner import choose_layouts
from msc.pretrain.model.layers import Block
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.parallelize import build_model, check_parallel, clip_shape, own_past_context, parallelize
from msc.pretrain.presets import PRESETS
from msc.pretrain.validation import ASSUMED_INDEX, resolve

RANK = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import several_gpus; several_gpus.rank()"
COLUMNS = [
    "scaling", "scales", "layout", "GPUs", "tokens", "step, s", "of the CPU", "planned, s", "tokens/s per GPU",
    "of one GPU's", "of one GPU's FLOP/s", "not hidden", "GB",
]  # fmt: skip


def configure(args: argparse.Namespace, job: dict[str, Any]) -> tuple[Any, Any]:
    """(configuration, index) of a job, resolved; ValueError where it cannot be laid out so."""
    base = PRESETS[args.preset]()
    model = replace(base.model, depth=args.depth or base.model.depth)
    if job["scales"] == "dense":
        model = replace(model, scales=(Scale(model.heads),), gate="none")
    parallel = replace(
        base.parallel, sp=job["ranks"], layout=job["layout"], compile=args.compile,
        precision="fp32" if args.device == "cpu" else "bf16",
        recompute="full" if args.longest else args.recompute or base.parallel.recompute,
    )  # fmt: skip
    index = replace(ASSUMED_INDEX, frames=job["frames"], height=args.side, width=args.side)
    config = replace(base, model=model, parallel=parallel, train=replace(base.train, batch=1, micro=1))
    check_parallel(parallel, model, job["ranks"], job["frames"] // model.frames_per_unit)
    return resolve(config, index), index


def layouts_of(args: argparse.Namespace, job: dict[str, Any]) -> str:
    """How the scales are laid out, "halo+halo+ulysses"; one word where all are the same."""
    if job["ranks"] == 1:
        return ""
    config, index = configure(args, job)
    clip = clip_shape(config.model, config.parallel, index.frames, index.height, index.width)
    found = choose_layouts(config.model.scales, clip, job["ranks"], job["layout"], config.parallel.rates)
    return found[0] if len(set(found)) == 1 else "+".join(found)


def jobs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All that is measured, in order: one GPU (where asked for), all of them, then what lies between."""
    if args.longest:
        model = PRESETS[args.preset]().model
        frames = args.longest // cost.tokens_per_frame(model, args.side, args.side)
        job = {"ranks": max(args.ranks), "copies": 1, "scales": args.scales[0], "frames": frames}
        job["layout"] = args.layouts[0]
        return [{**job, "layouts": layouts_of(args, job), "scaling": ["longest"]}]
    jobs: list[dict[str, Any]] = []
    if args.each:
        job = {"ranks": 1, "copies": max(args.ranks), "frames": args.frames, "layout": "auto", "layouts": ""}
        jobs += [{**job, "scales": scales, "scaling": ["each"]} for scales in args.scales]
    for ranks in dict.fromkeys([min(args.ranks), max(args.ranks), *sorted(args.ranks, reverse=True)]):
        for scales, layout in product(args.scales, args.layouts if ranks > 1 else ["auto"]):
            sizes = {"weak": args.frames * ranks, "strong": args.video}
            for scaling, frames in ((name, sizes[name]) for name in args.scaling):
                job = {"ranks": ranks, "copies": 1, "scales": scales, "frames": frames, "layout": layout}
                try:
                    job["layouts"] = layouts_of(args, job)
                except ValueError as error:
                    print(f"Left out: {layout}, {scales}, {frames} frames on {ranks} ranks: {error}", file=sys.stderr)
                    continue
                same = [one for one in jobs if one | {"layout": layout, "scaling": 0} == job | {"scaling": 0}]
                if not same:
                    jobs.append({**job, "scaling": [scaling if ranks > 1 else "one"]})
                elif scaling not in same[0]["scaling"] and ranks > 1:
                    same[0]["scaling"].append(scaling)
    return jobs


# A rank ----------------------------------------------------------------------------------------------------


@contextmanager
def nothing_sent() -> Iterator[None]:
    """Messages along time stay away inside the block: receivers get random numbers at once, of ordinary size."""
    post, wait = collectives.start_all_to_all, collectives.wait_all_to_all
    collectives.start_all_to_all = lambda x, plan: x.new_empty(sum(plan.receive_counts)).uniform_(0.1, 0.9)
    collectives.wait_all_to_all = lambda x, plan: x
    try:
        yield
    finally:
        collectives.start_all_to_all, collectives.wait_all_to_all = post, wait


def awake(name: str, part: torch.nn.Module) -> None:
    """The last layer begins with zeros, and so would all of the backward pass: on zeros a GPU is faster."""
    if name == "final":
        torch.nn.init.normal_(part.get_parameter("weight"), std=0.02)


def training_step(
    args: argparse.Namespace, world: process_group.RankInfo, mesh: Any, job: dict[str, Any]
) -> Callable[[], Any]:
    """A function that takes one step and returns this rank's share of the loss."""
    config, index = configure(args, job)
    device, parallel = world.device, config.parallel
    clip = clip_shape(config.model, parallel, index.frames, index.height, index.width)
    past_context, units = own_past_context(mesh, config.model, parallel, clip)
    torch.manual_seed(0)
    if args.engine:
        model = parallelize(build_model(config.model, parallel, device, awake), parallel, config.optimizer, 1)
    else:
        with device:  # made there at once: on a CPU large ones take minutes
            model = MSCTransformer(config.model, parallel.attention, parallel.block_recompute, awake)
        limit_kept_activations(parallel.kept_share)
        model = model.to(device, torch.float32 if parallel.precision == "fp32" else torch.bfloat16)
        for block in model.blocks:
            assert isinstance(block, Block)
            if parallel.compile:
                block.compile(fullgraph="ring" not in job["layouts"])  # what falls into pieces waits for the CPU
    colour = torch.randn(config.model.channels, 1, 1, device=device)  # of the whole video: something to learn
    torch.manual_seed(1 + world.rank)
    size = 1, len(units) * config.model.frames_per_unit, config.model.channels, index.height, index.width
    x = 0.3 * torch.randn(size, device=device) + colour
    noise, all_t = torch.randn_like(x), torch.rand(1, index.frames, generator=torch.Generator().manual_seed(1))
    all_t, per_unit = all_t.to(device), config.model.frames_per_unit
    t = all_t[:, units[0] * per_unit : (units[-1] + 1) * per_unit]
    noisy = add_noise(x, noise, t)

    def step() -> Any:
        errors = Loss().per_frame(model(noisy, t, None, None, past_context, all_t), x, noise)
        share = errors.sum() / index.frames
        if args.engine:
            deepspeed_zero.backward(model, share * world.world_size)
            deepspeed_zero.step(model, lambda norm: "")
        else:
            share.backward()
            model.zero_grad(set_to_none=True)
        return share.detach()

    return step


def agreed(yes: bool) -> bool:
    """Whether all ranks say so."""
    answer = torch.tensor(float(yes))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def measure(args: argparse.Namespace, world: process_group.RankInfo, mesh: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step, its CPU's and those without messages, memory of the fullest GPU, loss of first and last
    step."""
    on_gpu = world.device.type == "cuda"
    torch._dynamo.reset()
    step = training_step(args, world, mesh, job)
    losses: list[torch.Tensor] = []

    def timed(silent: bool) -> tuple[float, float]:
        """Seconds of a step, and until the CPU has started all of it."""
        dist.all_reduce(torch.zeros(1, device=world.device))  # all start together
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with nothing_sent() if silent else nullcontext():
            share = step()
            started = time.perf_counter() - start
            if on_gpu:
                torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if not silent:
            losses.append(share.cpu())
        return seconds, started

    ways = (False,) if job["ranks"] == 1 or args.longest or args.compile else (False, True)
    for silent in (*ways, *ways):  # the first of each way compiles
        timed(silent)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[list[tuple[float, float]]] = []
    began = time.perf_counter()
    while len(times) < args.runs and agreed(len(times) < 3 or time.perf_counter() - began < args.limit / 4):
        times.append([timed(silent) for silent in ways])
    if args.profile and on_gpu:
        from step import kernels

        layouts, place = job["layouts"].replace("+", "-"), f"rank-{world.rank}-of-{world.world_size}"
        depth = args.depth or PRESETS[args.preset]().model.depth
        shape = f"{depth}-layers-{job['frames']}-frames"
        name = "-".join(filter(None, (job["scales"], layouts, shape, place))) + ".json.gz"
        trace = f"{args.trace}/{name}" if args.trace else None
        listed = kernels(lambda: timed(False), args.profile, trace)
        if world.is_rank_0:
            print(f"Kernels of the first rank:\n{listed}", file=sys.stderr, flush=True)
    slowest = torch.tensor(times)
    by_rank = [torch.zeros_like(slowest[:, 0, 0]) for _ in range(world.world_size)]
    dist.all_gather(by_rank, slowest[:, 0, 0].contiguous())
    memory = torch.tensor(float(torch.cuda.max_memory_allocated() if on_gpu else 0))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    ends = torch.stack([losses[0], losses[-1]])
    dist.all_reduce(ends)
    medians = [[statistics.median(runs) for runs in way] for way in slowest.permute(1, 2, 0).tolist()]
    device = hardware.gpu_of_driver_name(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "seconds": medians[0][0],
        "by_rank": [statistics.median(one.tolist()) for one in by_rank],
        "started": medians[0][1],
        "silent": medians[1][0] if len(medians) > 1 else None,
        "memory": float(memory) or None,
        "planned": planned(args, job, device) if device else None,
        "losses": ends.tolist(),
        "steps": len(losses),
    }


def planned(args: argparse.Namespace, job: dict[str, Any], device: hardware.Device) -> float:
    config, index = configure(args, job)
    found = make_plan(config, index, device, job["ranks"])
    alone = () if args.engine else ("gradients", "weights", "update")
    return sum(seconds for part, seconds in found.seconds.items() if part not in alone)


def rank() -> None:
    """Measure one job after the other, and end at the first that fails: the launcher starts the rest anew."""
    given = json.loads(os.environ["SEVERAL_GPUS"])
    args, folder = argparse.Namespace(**given["args"]), Path(given["folder"])
    world = process_group.join_process_group(args.limit)
    mesh = make_mesh(world.world_size, given["jobs"][0]["ranks"], world.device.type)
    for job in given["jobs"]:
        if not agreed(time.time() < given["end"]):
            break
        if world.is_rank_0:
            (folder / "at").write_text(json.dumps(job))
        faulthandler.dump_traceback_later(args.limit, exit=True)
        try:
            found = measure(args, world, mesh, job)
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if memory else f"{type(error).__name__}: {collectives.first_line(error)}"
            (folder / f"failed-{world.rank}").write_text(reason)
            if not memory:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the others may wait for this one: nothing here must wait for them
        if world.is_rank_0:
            tell(args, folder, job, found)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    process_group.leave_process_group()


# What is printed -------------------------------------------------------------------------------------------


def tell(args: argparse.Namespace, folder: Path, job: dict[str, Any], found: dict[str, Any]) -> None:
    """Print a row for each kind of scaling, and keep what was found for those that are compared with it."""
    before = known(folder)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({**job, **found}) + "\n")
    model, frames, ranks = configure(args, job)[0].model, job["frames"], job["ranks"]
    tokens = frames * cost.tokens_per_frame(model, args.side, args.side)
    gpus = str(ranks) if job["copies"] == 1 else f"{job['copies']} × 1"
    for scaling in job["scaling"]:
        row = [scaling, job["scales"], job["layouts"], gpus, f"{tokens:,}"]
        if "failed" in found:
            row += [found["failed"], *[""] * (len(COLUMNS) - 6)]
        else:
            compared = args.frames if scaling == "weak" else frames
            one = next((one for one in before if one["ranks"] == one["copies"] == 1 and one["scales"] == job["scales"]
                        and one["frames"] == compared and "seconds" in one), None)  # fmt: skip
            seconds, silent, memory = found["seconds"], found["silent"], found["memory"]
            row += [f"{seconds:.4f}", f"{found['started']:.4f}"]
            row += [f"{found['planned']:.4f}" if found["planned"] else ""]
            row += [f"{tokens / seconds / ranks:,.0f}"]
            if one is not None and ranks > 1:
                work, own = (cost.step_flops(model, many, args.side, args.side) for many in (frames, compared))
                faster = one["seconds"] / seconds / ranks
                row += [f"{faster * frames / compared:.1%}", f"{faster * work / own:.1%}"]
            else:
                row += ["", ""]
            row += ["" if silent is None else f"{1 - silent / seconds:.1%}", f"{memory / 1e9:.2f}" if memory else ""]
        print(f"| {' | '.join(row)} |", flush=True)
    if job["copies"] > 1 and "by_rank" in found:
        alone = ", ".join(f"{seconds:.4f}" for seconds in found["by_rank"])
        print(f"Seconds of each: {alone}", file=sys.stderr, flush=True)
    if args.longest and "losses" in found:
        first, last = found["losses"]
        print(f"\nLoss of the same clip at step 1: {first:.4f}, at step {found['steps']}: {last:.4f}", flush=True)


def known(folder: Path) -> list[dict[str, Any]]:
    """All jobs that were told, with what was found."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace, folder: Path) -> None:
    """Start ranks for all jobs of one number of GPUs, again for what is left after one that failed, and so on."""
    end, waiting = time.time() + args.seconds, jobs_of(args)
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})}
    with collect_signals() as received:
        while waiting and not received and time.time() < end:
            size = waiting[0]["ranks"], waiting[0]["copies"]
            batch = [job for job in waiting if (job["ranks"], job["copies"]) == size][: 1 if args.engine else None]
            for mark in (folder / "at", *folder.glob("failed-*")):
                mark.unlink(missing_ok=True)
            given = {"args": vars(args), "jobs": batch, "folder": str(folder), "end": end}
            environment["SEVERAL_GPUS"] = json.dumps(given)
            command = [sys.executable, "-c", RANK]
            code = launcher.run(command, prod(size), folder / "logs", environment, grace=5.0, received=received)
            at = json.loads((folder / "at").read_text()) if (folder / "at").exists() else batch[0]
            if code and not received and not any(one | at == one for one in known(folder)):
                reasons = sorted(path.read_text() for path in folder.glob("failed-*"))
                reasons.sort(key=lambda reason: reason != "out of memory")  # the others fail of that
                tell(args, folder, at, {"failed": (reasons or [f"killed, or no result in {args.limit:g} s"])[0]})
            waiting = [job for job in waiting if not any(one | job == one for one in known(folder))]
    for job in waiting:
        named = f"{', '.join(job['scaling'])}: {job['scales']} {job['layouts']} on {job['ranks']}"
        print(f"Not measured: {named}, {job['frames']} frames", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--depth", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--side", type=int, default=32, help="latents of a frame's side (32: 256 tokens with patch 2)")
    parser.add_argument("--frames", type=int, default=256, help="for each GPU, weak scaling")
    parser.add_argument("--video", type=int, help="frames of the one video, strong scaling (default: twice --frames)")
    parser.add_argument("--each", action="store_true", help="also each GPU by itself, all at once; the slowest counts")
    parser.add_argument("--scaling", nargs="+", default=["weak", "strong"], choices=["weak", "strong"])
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of GPUs (default: 1, 2, 4, 8)")
    parser.add_argument("--scales", nargs="+", default=["multi-scale", "dense"], choices=["multi-scale", "dense"])
    parser.add_argument(
        "--layouts", nargs="+", default=["auto", "ulysses", "ring"], choices=["auto", "halo", "ulysses", "ring"]
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", choices=["none", "cheap", "full"], help="default: as the preset")
    parser.add_argument("--engine", action="store_true", help="whole training steps, with DeepSpeed")
    parser.add_argument("--longest", type=int, nargs="?", const=2**20, metavar="TOKENS",
                        help="train on one clip of so many tokens over all GPUs, recomputed")  # fmt: skip
    parser.add_argument("--profile", type=int, metavar="N", help="also list the first rank's N longest kernels")
    parser.add_argument("--trace", metavar="FOLDER", help="also profile a step of every rank, for chrome://tracing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if gpus else "cpu")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after so many")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one row, starting and compiling included")
    args = parser.parse_args()
    if args.trace:
        args.profile = args.profile or 10
        Path(args.trace).mkdir(parents=True, exist_ok=True)
    most = gpus if args.device == "cuda" else 8
    args.ranks = [ranks for ranks in args.ranks or (1, 2, 4, 8) if ranks <= most]
    if args.each and (args.engine or args.longest):
        parser.error("--each is for forward and backward passes: DeepSpeed would add up the gradients of all GPUs")
    args.video, args.engine = args.video or 2 * args.frames, args.engine or bool(args.longest)
    base = PRESETS[args.preset]()
    model = replace(base.model, depth=args.depth or base.model.depth, channels=ASSUMED_INDEX.channels)
    name = f"{torch.cuda.get_device_name()}, {gpus} of them" if args.device == "cuda" else "CPU, gloo"
    steps = "whole steps" if args.engine else "forward and backward"
    how = "compiled" if args.compile else "not compiled"
    print(
        f"{args.preset}, {cost.parameters(model) / 1e6:.0f} M parameters, depth {model.depth}, {name}, torch "
        f"{torch.__version__}; {steps}, {how}, {cost.tokens_per_frame(model, args.side, args.side)} tokens a frame\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- | --- |{' ---: |' * (len(COLUMNS) - 3)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
