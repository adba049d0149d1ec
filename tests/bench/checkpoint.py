"""What a checkpoint costs training, written beside it against before it goes on, and what a restart costs.

    python tests/bench/checkpoint.py --width 512 --depth 8         # stall per checkpoint
    python tests/bench/checkpoint.py --restart --processes 2       # kill -9 to the first resumed step

The stall is the time from a checkpoint's beginning to the end of the last step that it overlaps, less as many
median steps just before it. Both ways alternate in one run on one process. `write` is the time in which the file
is written, synced and published; shares are of it when nothing runs beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import checkpoint as c; sys.exit(c.rank())"


# Stall -----------------------------------------------------------------------------------------------------


def stall(args: argparse.Namespace, folder: Path) -> None:
    import torch

    from msc.launch.processes.launcher import free_port, rank_environment
    from msc.parallel import deepspeed_zero, process_group
    from msc.pretrain import cost
    from msc.pretrain.checkpoints.async_writer import CheckpointWriter
    from msc.pretrain.checkpoints.directory import CheckpointMeta
    from msc.pretrain.checkpoints.format import CheckpointConfig
    from msc.pretrain.model.config import ModelConfig
    from msc.pretrain.model.scales import default_scales
    from msc.pretrain.optimizer import OptimizerConfig
    from msc.pretrain.parallelize import ParallelConfig, build_model, parallelize

    os.environ.update(rank_environment(os.environ, 0, 1, free_port()))
    world = process_group.join_process_group(60)
    torch.manual_seed(0)
    config = ModelConfig(
        width=args.width, depth=args.depth, scales=default_scales(8, patch_window=None), patch=2, channels=4
    )
    parallel = ParallelConfig(precision="fp32")
    engine = parallelize(build_model(config, parallel, world.device), parallel, OptimizerConfig(), 1)
    x = torch.randn(1, 4, 4, 16, 16, device=world.device)
    t = torch.rand(1, 4, device=world.device)

    def step() -> float:
        began = time.perf_counter()
        deepspeed_zero.backward(engine, engine(x, t).square().mean())
        deepspeed_zero.step(engine, lambda norm: "")  # the norm is a number on the host: nothing is left running
        return time.perf_counter() - began

    writer = CheckpointWriter(folder, CheckpointConfig(every=1, keep=1), 600.0)
    for _ in range(3):
        step()
    writer.save(engine, CheckpointMeta(step=0, clock=0))  # makes the host buffer
    writer.finish()
    number, rows = 0, []
    for _ in range(args.runs):
        for way in ("before", "beside"):
            plain = statistics.median(step() for _ in range(args.steps))
            number, began = number + 1, time.perf_counter()
            copied = writer.save(engine, CheckpointMeta(step=number, clock=0))["saving/stall_s"]
            steps = 0
            if way == "before":
                writer.finish()
            while writer.writing:  # the last of these steps ends after the writing: what it lost there counts, too
                step()
                steps += 1
            rows.append((way, plain, copied, time.perf_counter() - began - steps * plain, writer.seconds))
            print(f"{way}: " + ", ".join(f"{seconds:.3f}" for seconds in rows[-1][1:]), file=sys.stderr, flush=True)
    state = 16 * cost.parameters(config)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{cost.parameters(config) / 1e6:.1f} M parameters, {state / 1e6:.0f} MB a checkpoint, {name}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; medians of {args.runs}, (least to most)"
    )
    print(f"{'written':<10} {'step s':>8} {'copy s':>8} {'stall s':>8} {'write s':>8} {'stall of write':>15}")
    write = statistics.median(written for way, *_, written in rows if way == "before")
    stalls = {}
    for way in ("before", "beside"):
        columns = list(zip(*(seconds for other, *seconds in rows if other == way), strict=True))
        stalls[way] = [stall / write for stall in columns[2]]
        values = " ".join(f"{statistics.median(column):>8.3f}" for column in columns)
        share = statistics.median(stalls[way])
        print(f"{way:<10} {values} {share:>15.1%}  ({min(stalls[way]):.1%} to {max(stalls[way]):.1%})")
    ratio = statistics.median(stalls["beside"]) / statistics.median(stalls["before"])
    print(f"beside / before: {ratio:.1%} of the stall")
    process_group.leave_process_group()


# Restart ---------------------------------------------------------------------------------------------------

MARKS: list[tuple[str, float]] = []


def rank() -> int:
    """`msc` as a rank or launcher that notes when each part of its start was done."""
    from msc.launch import cli
    from msc.launch.processes import launcher

    launcher.PROGRAM = PROGRAM
    if "RANK" not in os.environ:
        return cli.main()
    import psutil

    MARKS.append(("launcher: imports, checks", psutil.Process().create_time()))
    from msc.pretrain import train as training

    def timed(module: Any, name: str, what: str) -> None:
        function = getattr(module, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if len(MARKS) < 9:
                MARKS.append((what, time.time()))
            return result

        setattr(module, name, marked)

    MARKS.append(("ranks: imports", time.time()))
    timed(training.process_group, "join_process_group", "process group")
    timed(training, "build_model", "shards' index, mesh, model")
    timed(training, "parallelize", "DeepSpeed")
    timed(training.checkpoint_format, "load_newest", "checkpoint: verify, load")
    timed(training.process_group, "all_reduce_sum", "loader, tracker, first batch")
    timed(training.deepspeed_zero, "step", "first step")
    taken: list[int] = []
    step = training.deepspeed_zero.step

    def first(*arguments: Any) -> Any:
        result = step(*arguments)
        if not taken and os.environ["RANK"] == "0" and "BENCH_OUT" in os.environ:
            Path(os.environ["BENCH_OUT"]).write_text(json.dumps(MARKS))
        taken.append(1)
        return result

    training.deepspeed_zero.step = first  # type: ignore[assignment]
    return cli.main()


def restart(args: argparse.Namespace, folder: Path) -> None:
    from msc.datasets.prepare.convert import ConvertConfig, convert
    from msc.datasets.synthetic import write_videos
    from msc.pretrain.diffusion.autoencoder import open_autoencoder

    videos = write_videos(folder / "videos", seed=0, clips=4, frames=40, height=64, width=64)
    autoencoder = open_autoencoder("pixels")
    config = ConvertConfig(sources=tuple(map(str, videos)), out=str(folder / "shards"), frames=8, height=64, width=64,
                           fps=12.0, stride=2, held_out=0.2, autoencoder="pixels")  # fmt: skip
    convert(config, autoencoder.encode, 1)
    run, out = folder / "run", folder / "marks.json"
    command = [sys.executable, "-c", PROGRAM, "train", "--run", str(run), "--processes", str(args.processes),
               f"data.shards={folder / 'shards'}", "checkpoint.every=3", "train.batch=4", "train.micro=2",
               "train.clips=4000", "train.evaluate=0", "train.report=1"]  # fmt: skip
    marks_of_runs: list[list[tuple[str, float]]] = []
    for turn in range(args.runs + 1):  # the first compiles and fills caches
        out.unlink(missing_ok=True)
        began = time.time()
        process = subprocess.Popen([*command, "--resume" if turn else "--preset=demo"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.STDOUT, env={**os.environ, "BENCH_OUT": str(out)})  # fmt: skip
        while not out.exists() or len(list(run.glob("checkpoints/step-*"))) < 2:
            if process.poll() is not None:
                raise RuntimeError("training ended by itself")
            time.sleep(0.05)
        if turn:
            marks_of_runs.append([("", began), *map(tuple, json.loads(out.read_text()))])
        process.send_signal(signal.SIGKILL)  # the ranks die with it
        process.wait()
        time.sleep(1.0)
    print(f"{args.processes} processes, `demo` preset: seconds from the new start after kill -9, median of {args.runs}")
    total = 0.0
    for i in range(1, len(marks_of_runs[0])):
        seconds = statistics.median(marks[i][1] - marks[i - 1][1] for marks in marks_of_runs)
        total += seconds
        print(f"{marks_of_runs[0][i][0]:<32} {seconds:>7.2f}")
    print(f"{'to the end of the first step':<32} {total:>7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restart", action="store_true", help="time a restart instead")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="steps without a checkpoint before each")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--disk", type=Path, help="folder to write in (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        (restart if args.restart else stall)(args, Path(folder))


if __name__ == "__main__":
    main()
