"""`msc plan`: the report on a plan as text and JSON, and the planned step that a training run is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msc.datasets.files import write_atomically
from msc.datasets.loading.mixture import open_shards, single_set
from msc.datasets.shards.index import Index
from msc.pretrain.config import Config
from msc.pretrain.model.config import check_clip
from msc.pretrain.tracking.plan_deviation import PlannedStep
from msc.pretrain.validation import assumed_index, costliest_index, resolve

from . import hardware
from .hardware import Device
from .plan import Plan, RolloutPlan, make_plan, plan_rollout, search_plans

RUNNERS_UP = 4
SEARCHED = ("parallel.sp", "parallel.zero.stage", "parallel.recompute", "train.micro")


def report_plan(
    config: Config, gpus: int, device: Device, fixed: Sequence[str] = (), price: float | None = None,
    units: int | None = None, steps: int = 16, out: Path | None = None,
) -> str:  # fmt: skip
    """The report on a configuration. fixed: keys set by the user, which stay. price: per GPU and hour, in any
    currency. units: also plan a roll-out of that many units, each denoised in `steps`. out: JSON file to write."""
    shards = open_shards(config.data) if config.data.sets else single_set("", assumed_index(config.model))
    config = resolve(config, shards.index)
    index = costliest_index(config, shards)
    check_clip(config.model, index.frames, index.height, index.width)
    plans = search_plans(config, index, device, gpus, [key for key in SEARCHED if key in fixed])
    text = describe(plans, index, price)
    values = as_json(plans[0])
    if units:
        grid = (index.height // config.model.patch, index.width // config.model.patch)
        rollout = plan_rollout(config.model, grid, device, units, steps)
        text += "\n\n" + describe_rollout(rollout, config, index, device)
        values["roll_out"] = {"units": units, "steps": steps, "memory": rollout.memory,
                              "seconds_per_frame": rollout.seconds_per_frame}  # fmt: skip
    if out is not None:
        write_atomically(out, json.dumps(values, indent=1).encode())
    return text


def describe(plans: Sequence[Plan], index: Index, price: float | None) -> str:
    """The best plan in full, a line for each runner-up."""
    best = plans[0]
    clips, model = best.config.train.clips, best.config.model
    hours = best.days * 24 * best.gpus
    size = f"{index.frames} × {index.height} × {index.width} latents"
    clip = size if index.autoencoder != "assumed" else f"{size}, ASSUMED, as data.shards is empty"
    facts = [
        ("model", f"{best.parameters:,} parameters (width {model.width}, depth {model.depth})"),
        ("clip", f"{clip}, {best.tokens:,} tokens"),
        ("training", f"{clips:,} clips, {best.tokens * clips:.3g} tokens, {best.flops * best.config.train.steps:.3g} "
                     f"FLOPs, {best.config.train.steps:,} steps of {best.config.train.batch} clips"),
        ("on", f"{best.gpus} × {best.device.name} ({best.device.source})"),
        ("best way", f"{parallel_layout(best)}{'' if best.fits else '  DOES NOT FIT; it needs least memory'}"),
        ("time", f"{best.step_s:.3g} s per step, {best.config.train.batch / best.step_s:.3g} clips/s, "
                 f"MFU {best.mfu:.0%}, {best.days:.3g} days"),
        ("cost", f"{hours:,.0f} GPU hours" + ("" if price is None else f", {hours * price:,.0f} at {price:g} each")),
        ("limited by", limiting_part(best)),
    ]  # fmt: skip
    lines = [f"{name:<12}{value}" for name, value in facts]
    lines += ["", f"memory per GPU: {best.memory_bytes / 1e9:.1f} of {best.device.memory / 1e9:.0f} GB"]
    lines += gigabytes({**best.memory, "(before it is sharded)": best.at_start})
    lines += ["", f"a step: {best.step_s:.3g} s"]
    lines += [f"  {name:<24}{s:8.3f} s  {s / best.step_s:4.0%}" for name, s in best.seconds.items() if s > 5e-4]
    if best.traffic:
        lines += ["", "a GPU sends per step:"]
        lines += [f"  {what:<24}{sent / 1e9:8.2f} GB  {link}" for (what, link), sent in best.traffic.items()]
    if best.layouts:
        lines.append(f"  layouts of the scales: {', '.join(best.layouts)}")
    others = [other for other in plans[1:] if other.fits] or list(plans[1:])
    if others:
        lines += ["", "runners-up:"]
        lines += [f"  {other.step_s:8.3g} s  {other.memory_bytes / 1e9:6.1f} GB{'' if other.fits else ' (too much)'}  "
                  f"MFU {other.mfu:4.0%}  {parallel_layout(other)}" for other in others[:RUNNERS_UP]]  # fmt: skip
    if not best.config.parallel.compile:
        compiled = replace(best.config, parallel=replace(best.config.parallel, compile=True))
        faster = make_plan(compiled, index, best.device, best.gpus)
        speed = f"{faster.step_s:.3g} s per step, MFU {faster.mfu:.0%}, {faster.days:.3g} days"
        lines += ["", f"with parallel.compile=true: {speed}"]
    lines += ["", f"MEASURED: {hardware.MEASURED}", f"ESTIMATED: {hardware.ESTIMATED}"]
    if best.config.parallel.precision == "fp8":
        lines.append("fp8 is planned as bf16: its speed was not measured")
    return "\n".join(lines)


def gigabytes(parts: Mapping[str, float]) -> list[str]:
    return [f"  {name:<24}{size / 1e9:8.2f} GB" for name, size in parts.items()]


def parallel_layout(plan: Plan) -> str:
    parallel = plan.config.parallel
    return (
        f"dp {plan.dp} × sp {parallel.sp}, ZeRO {parallel.zero.stage}, "
        f"recompute {parallel.recompute}, micro {plan.config.train.micro} × {plan.accumulate}"
    )


def limiting_part(plan: Plan) -> str:
    """The part of a step that takes longest, and how to shorten it."""
    advice = {
        "matrix products": "the GPUs' arithmetic",
        "attention": "attention's arithmetic",
        "memory traffic": "what is not a matrix product; wider models and parallel.compile=true have less of it",
        "launches": "the CPU's starting of kernels; parallel.compile=true, or a larger train.micro",
        "exchanges along time": "what ranks of a video send each other; a smaller parallel.sp, or one within a machine",
        "gradients": "their reduction over the network; a larger train.batch per GPU, or fewer micro-batches",
        "weights": "their gathering over the network; ZeRO 2, or a larger train.batch per GPU",
        "update": "the optimizer's memory traffic; a higher ZeRO stage or a larger train.batch",
    }
    return f"{plan.limit} ({plan.seconds[plan.limit] / plan.step_s:.0%} of a step): {advice[plan.limit]}"


def describe_rollout(rollout: RolloutPlan, config: Config, index: Index, device: Device) -> str:
    frames = rollout.units * config.model.frames_per_unit
    total = sum(rollout.memory.values())
    first, last = rollout.seconds_per_frame
    seconds = frames * index.temporal_factor / index.fps
    lines = [
        f"a roll-out of {rollout.units} units ({frames} latent frames, about {seconds:.0f} s of video) in fp32 on one "
        f"GPU: {total / 1e9:.2f} of {device.memory / 1e9:.0f} GB{'' if total < device.memory else ', DOES NOT FIT'}",
        *gigabytes(rollout.memory),
        f"  {rollout.steps} denoising steps: {first:.3g} s per latent frame at the start, {last:.3g} s at the end "
        "(ESTIMATE; no roll-out was timed on a GPU; decoding not included)",
    ]
    return "\n".join(lines)


def as_json(best: Plan) -> dict[str, Any]:
    """For programs, and for `msc train --plan`; keys are stable."""
    parallel = best.config.parallel
    return {
        "settings": {"parallel.sp": parallel.sp, "parallel.zero.stage": parallel.zero.stage,
                     "parallel.recompute": parallel.recompute, "train.micro": best.config.train.micro},
        "gpus": best.gpus, "device": best.device.name, "dp": best.dp, "accumulate": best.accumulate, "fits": best.fits,
        "parameters": best.parameters, "tokens_per_clip": best.tokens, "flops_per_step": best.flops,
        "memory": best.memory, "memory_gib": best.memory_bytes / 2**30,
        "traffic": {f"{what} ({link})": sent for (what, link), sent in best.traffic.items()},
        "seconds": best.seconds, "step_s": best.step_s, "mfu": best.mfu, "days": best.days, "limit": best.limit,
    }  # fmt: skip


# Planned step of a run ---------------------------------------------------------------------------------------


def read_planned_step(path: Path) -> PlannedStep:
    """From the JSON that `msc plan --json` wrote."""
    try:
        values = json.loads(path.read_text())
        return PlannedStep(float(values["step_s"]), float(values["memory_gib"]), str(path))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not what `msc plan --json` writes: it has no step_s and memory_gib") from None


def planned_step(config: Config, processes: int, name: str) -> PlannedStep | None:
    """For a run on GPUs that the driver calls `name`; None for GPUs that have no entry in hardware.py."""
    device = hardware.gpu_of_driver_name(name)
    if device is None or not config.data.sets:
        return None
    shards = open_shards(config.data)
    if len(shards.shapes) > 1:  # a plan is of one; a run's mean step is of all
        return None
    config = resolve(config, shards.index)
    plan = make_plan(config, costliest_index(config, shards), device, processes)
    return PlannedStep(plan.step_s, plan.memory_bytes / 2**30, f"msc plan, {device.name}")
