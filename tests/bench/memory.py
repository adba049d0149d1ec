"""Planned memory against the measured peak, for configurations small enough for a CPU.

    OMP_NUM_THREADS=1 python tests/bench/memory.py

Every configuration takes three steps in processes of its own, as `msc train` takes them: build, DeepSpeed, forward,
backward, update. Measured is the most that torch had allocated at once, from before the model was built (torch's
profiler; on a GPU this is `max_memory_allocated`), of the rank that had the most, and the peak of resident memory
above the start, which also holds what malloc does not give back. Planned is the sum of what `msc plan` lists, without
its reserve, which stands for a GPU's libraries and allocator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

WIDE: dict[str, Any] = {"width": 768, "depth": 6, "frames": 4, "side": 16}  # weights weigh most
LONG: dict[str, Any] = {"width": 256, "depth": 4, "frames": 32, "side": 32}  # activations weigh most
CASES: dict[str, dict[str, Any]] = {
    "wide, ZeRO 0": {**WIDE, "stage": 0},
    "wide, ZeRO 2, 2 ranks": {**WIDE, "stage": 2, "ranks": 2},
    "wide, ZeRO 3, 2 ranks": {**WIDE, "stage": 3, "ranks": 2},
    "long": {**LONG, "stage": 0},
    "long, recomputed": {**LONG, "stage": 0, "recompute": "full"},
    "long, sp 2": {**LONG, "stage": 2, "ranks": 2, "sp": 2},
    "long, dense": {**LONG, "stage": 0, "dense": True},
}
RANK = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import memory; memory.rank()"


def configure(case: dict[str, Any]) -> Any:
    """(configuration, index) of a case, resolved."""
    from msc.datasets.statistics import Statistics
    from msc.pretrain.model.scales import Scale, default_scales
    from msc.pretrain.presets import PRESETS
    from msc.pretrain.validation import ASSUMED_INDEX, resolve

    base = PRESETS["demo"]()
    scales = (Scale(8),) if case.get("dense") else default_scales(8, patch_window=8)
    model = replace(base.model, width=case["width"], depth=case["depth"], scales=scales, patch=2)
    deepspeed_zero = replace(base.parallel.zero, stage=case["stage"], bucket=5_000_000)
    recompute = case.get("recompute", "none")
    parallel = replace(base.parallel, sp=case.get("sp", 1), recompute=recompute, zero=deepspeed_zero)
    side, batch = case["side"], case.get("ranks", 1) // case.get("sp", 1)
    index = replace(
        ASSUMED_INDEX, channels=4, frames=case["frames"], height=side, width=side, statistics=Statistics.default(4)
    )
    train = replace(base.train, batch=batch, micro=1)
    return resolve(replace(base, model=model, parallel=parallel, train=train), index), index


def planned(case: dict[str, Any]) -> float:
    from msc.launch.planning.hardware import KINDS
    from msc.launch.planning.plan import make_plan

    config, index = configure(case)
    memory = make_plan(config, index, KINDS["h100"], case.get("ranks", 1)).memory
    return sum(size for part, size in memory.items() if part != "reserved")


def rank() -> None:
    """One rank of a case: prints the peak above the start, in bytes."""
    import torch

    from msc.parallel import deepspeed_zero, process_group
    from msc.parallel.mesh import make_mesh
    from msc.pretrain.optimizer import OptimizerConfig
    from msc.pretrain.parallelize import build_model, clip_shape, own_past_context, parallelize

    case = json.loads(os.environ["CASE"])
    process_group.keep_freed_memory = lambda: None  # what it keeps is no peak of the model's
    world = process_group.join_process_group(300)
    config, index = configure(case)
    mesh = make_mesh(world.world_size, config.parallel.sp, "cpu")
    clip = clip_shape(config.model, config.parallel, index.frames, index.height, index.width)
    past_context, units = own_past_context(mesh, config.model, config.parallel, clip)
    deepspeed_zero._deepspeed()
    x = torch.randn(1, len(units) * config.model.frames_per_unit, index.channels, index.height, index.width)
    t = torch.rand(x.shape[:2])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = held("VmRSS")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.manual_seed(0)
        model = build_model(config.model, config.parallel, world.device)
        engine = parallelize(model, config.parallel, OptimizerConfig(), 1)
        for _ in range(3):
            deepspeed_zero.backward(engine, engine(x, t, None, None, past_context).square().mean())
            deepspeed_zero.step(engine, lambda norm: "")
    resident = held("VmHWM") - before
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    allocated = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    print(f"peak {allocated} {resident}", flush=True)
    process_group.leave_process_group()


def held(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    from msc.launch.processes.launcher import free_port, rank_environment

    print("| configuration | planned, MB | allocated, MB | allocated / planned | resident, MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, case in CASES.items():
        ranks, port = case.get("ranks", 1), free_port()
        base = {**os.environ, "CASE": json.dumps(case)}
        processes = [
            subprocess.Popen([sys.executable, "-c", RANK], env=rank_environment(base, number, ranks, port),
                             stdout=subprocess.PIPE, text=True)
            for number in range(ranks)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in processes]
        peaks = [line.split()[1:] for text in said for line in text.splitlines() if line.startswith("peak ")]
        assert len(peaks) == ranks, f"{name}: a rank failed"
        plan, (allocated, resident) = planned(case), (max(map(int, of)) for of in zip(*peaks, strict=True))
        print(f"| {name} | {plan / 1e6:.0f} | {allocated / 1e6:.0f} | {allocated / plan:.2f} | {resident / 1e6:.0f} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
