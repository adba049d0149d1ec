"""Planning against what is counted and measured; its report; and a run that compares itself with its plan."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from gloo_ranks import run_ranks
from small_plan import sent_on_a_rank, small
from test_training import curve, msc_train, shards  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from msc.launch import cli
from msc.launch.planning.hardware import KINDS, gpu_kind, gpu_of_driver_name
from msc.launch.planning.plan import make_plan, plan_rollout, search_plans, zero_bytes
from msc.launch.planning.report import describe, read_planned_step
from msc.parallel.deepspeed_zero import ZeroConfig
from msc.pretrain import cost
from msc.pretrain.diffusion.sampler import Cache, extend_cache
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.optimizer import OptimizerConfig, make_optimizer, set_schedule
from msc.pretrain.presets import PRESETS
from msc.pretrain.tracking.plan_deviation import PlannedStep, describe_deviation, plan_ratios
from msc.pretrain.validation import ASSUMED_INDEX, resolve

H100 = KINDS["h100"]


# Against what is counted -----------------------------------------------------------------------------------


def test_parameters_flops_and_state_are_those_of_a_real_step():
    """Products forward and backward, counted; what a model and its optimizer, without DeepSpeed, hold after a step."""
    config, index = small(zero=ZeroConfig(stage=0))
    config = replace(config, train=replace(config.train, batch=2, micro=2), parallel=replace(config.parallel))
    found = make_plan(config, index, H100, 1)
    model = MSCTransformer(config.model)
    optimizer = make_optimizer(model, OptimizerConfig())
    set_schedule(optimizer.param_groups, OptimizerConfig(), 0, 8, 2)
    x, t = torch.randn(2, 8, 3, 16, 24), torch.rand(2, 8)
    with FlopCounterMode(display=False) as counter:
        model(x, t).square().mean().backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    once = (model.noise.inner, model.noise.outer, model.modulate, model.final_modulate)  # per frame: left out
    left_out = sum(2 * 2 * 8 * layer.weight.numel() * (2 if layer is model.noise.inner else 3) for layer in once)
    first = 2 * 2 * index.frames * 96 * model.embed.weight.numel()  # nobody asks for the gradient of the input
    linear = 2 * 3 * cost.linear_flops(config.model, 8, 16, 24)
    assert products - left_out == linear - first
    assert found.flops == linear + 2 * 3 * cost.attention_flops(config.model, 8, 16, 24)
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    bytes_held = sum(tensor.untyped_storage().nbytes() for tensor in held)
    state = {name: found.memory[name] for name in ("weights", "gradients", "optimizer", "average")}
    assert sum(state.values()) == bytes_held
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("units", [2, 3, 8, 9])
@pytest.mark.parametrize("per_unit", [1, 2])
def test_caches_of_a_roll_out_hold_what_is_planned(units, per_unit):
    scales = (Scale(2, 1, 1, 2, 3), Scale(1, 2, 1, 4), Scale(1, 2, 3, None), Scale(1, 2, 2, 2), Scale(1))
    model = MSCTransformer(
        ModelConfig(width=60, depth=2, scales=scales, patch=2, channels=3, frames_per_unit=per_unit, gate="none")
    )
    cache = Cache()
    for _ in range(units):
        extend_cache(model, cache, torch.randn(2, per_unit, 3, 8, 12))
    assert cost.cache_bytes(model.config, units, 4, 6, batch=2) == cache.bytes
    assert plan_rollout(model.config, (4, 6), H100, units).memory["caches"] == cache.bytes / 2


def test_a_units_flops_add_up_to_the_clips():
    model = PRESETS["pilot"]().model
    model = replace(model, channels=16)
    whole = cost.attention_flops(model, 12, 64, 64) + cost.linear_flops(model, 12, 64, 64)
    assert sum(cost.unit_flops(model, unit, 32, 32) for unit in range(12)) == whole


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_traffic_along_time_is_what_ranks_send(ranks):
    config, index = small(sp=ranks)
    config = replace(config, train=replace(config.train, batch=1, micro=1))
    planned = make_plan(config, index, H100, ranks)
    assert set(planned.layouts) == {"halo"}
    sent = run_ranks(sent_on_a_rank, ranks)
    # the plan is of the rank that sends the most; gradients come back along the same ways
    assert planned.traffic["past along time", "in the machine"] >= max(both for _, both in sent)
    largest = max(forward for forward, _ in sent)
    assert planned.traffic["past along time", "in the machine"] == pytest.approx(2 * largest, rel=0.35)


# Against what was measured on GPUs (docs/benchmarks.md) ----------------------------------------------------

PILOT, BASE, WIDE = (replace(PRESETS[name]().model, channels=16) for name in ("pilot", "base", "2b"))
DENSE, DENSE_BASE = (replace(model, scales=(Scale(model.heads),), gate="none") for model in (PILOT, BASE))


def one_step(model, frames, compiled, recompute="none"):
    index = replace(ASSUMED_INDEX, frames=frames, height=32, width=32)
    config = PRESETS["pilot"]()
    parallel = replace(config.parallel, compile=compiled, recompute=recompute)
    config = replace(config, model=model, train=replace(config.train, batch=1), parallel=parallel)
    return make_plan(resolve(config, index), index, H100, 1)


def layers(model, depth):
    return replace(model, depth=depth)


@pytest.mark.parametrize(
    ("model", "frames", "compiled", "recompute", "measured"),
    [
        (PILOT, 64, True, "none", 0.0397),
        (PILOT, 64, False, "none", 0.185),
        (layers(BASE, 24), 256, True, "none", 0.3199),
        (layers(DENSE_BASE, 8), 256, True, "none", 0.8221),
        (layers(DENSE_BASE, 4), 1024, True, "none", 6.1814),
        (layers(BASE, 4), 512, False, "full", 0.1972),
    ],
)
def test_the_steps_that_constants_were_taken_from_are_predicted(model, frames, compiled, recompute, measured):
    """Forward and backward, without the update, as they were measured."""
    found = one_step(model, frames, compiled, recompute)
    predicted = found.step_s - found.seconds["update"]
    assert predicted == pytest.approx(measured, rel=0.02)


def test_a_step_of_a_small_model_with_windows_in_space_is_predicted():
    """From which the cost of their regions was taken."""
    index = replace(ASSUMED_INDEX, channels=3, frames=12, height=48, width=64)
    demo = PRESETS["demo"]()
    model = replace(demo.model, depth=6, scales=default_scales(4, patch_window=8))
    config = replace(demo, model=model, train=replace(demo.train, clips=1600, batch=2, micro=2))
    assert make_plan(resolve(config, index), index, H100, 1).step_s == pytest.approx(0.135, rel=0.02)


@pytest.mark.parametrize(
    ("model", "frames", "compiled", "recompute", "measured", "within"),
    [
        (DENSE, 64, True, "none", 0.0838, 0.11),
        (layers(BASE, 8), 64, True, "none", 0.0330, 0.2),
        (layers(DENSE_BASE, 8), 64, True, "none", 0.0753, 0.11),
        (layers(BASE, 8), 256, True, "none", 0.1102, 0.11),
        (layers(BASE, 4), 1024, True, "none", 0.2201, 0.11),
        (BASE, 2048, True, "full", 4.3796, 0.11),
        (layers(BASE, 8), 512, True, "full", 0.3051, 0.11),
        (layers(DENSE_BASE, 4), 256, False, "full", 0.5312, 0.11),
        (layers(DENSE_BASE, 4), 512, False, "full", 1.9465, 0.11),
        (layers(WIDE, 8), 256, False, "full", 0.5209, 0.11),
        (layers(WIDE, 8), 512, False, "full", 1.0226, 0.11),
        (layers(BASE, 4), 512, True, "none", 0.1042, 0.11),
        (layers(BASE, 4), 1024, True, "none", 0.2080, 0.11),
        (BASE, 512, True, "full", 1.1006, 0.11),
        (layers(WIDE, 4), 512, False, "full", 0.5226, 0.11),
        (layers(WIDE, 4), 256, True, "full", 0.2118, 0.11),
    ],
)
def test_steps_that_no_constant_was_taken_from_are_foretold(model, frames, compiled, recompute, measured, within):
    found = one_step(model, frames, compiled, recompute)
    assert found.step_s - found.seconds["update"] == pytest.approx(measured, rel=within)


@pytest.mark.parametrize(
    ("model", "gpus", "frames", "compiled", "recompute", "measured", "within"),
    [
        (layers(BASE, 4), 2, 512, False, "full", 0.1256, 0.02),  # from which the cost of more launches was taken
        (layers(WIDE, 8), 2, 512, False, "full", 0.5499, 0.1),
        (layers(DENSE_BASE, 4), 2, 512, False, "full", 1.0276, 0.1),
        (layers(BASE, 4), 2, 1024, False, "full", 0.2118, 0.1),
        (layers(BASE, 4), 2, 1024, True, "none", 0.1094, 0.1),
        (layers(BASE, 4), 4, 1024, True, "none", 0.0574, 0.1),
        (layers(BASE, 4), 4, 2048, True, "none", 0.1130, 0.1),
        (BASE, 4, 2048, True, "full", 1.1723, 0.1),
        (layers(WIDE, 4), 2, 512, True, "full", 0.2237, 0.1),
        (layers(WIDE, 4), 4, 1024, True, "full", 0.2246, 0.1),
    ],
)
def test_steps_on_several_gpus_are_foretold(model, gpus, frames, compiled, recompute, measured, within):
    """The clip shared along time, as its layout is chosen."""
    index = replace(ASSUMED_INDEX, frames=frames, height=32, width=32)
    config = PRESETS["pilot"]()
    parallel = replace(config.parallel, sp=gpus, recompute=recompute, compile=compiled)
    config = replace(config, model=model, train=replace(config.train, batch=1), parallel=parallel)
    seconds = make_plan(resolve(config, index), index, H100, gpus).seconds
    found = sum(value for part, value in seconds.items() if part not in ("gradients", "weights", "update"))
    assert found == pytest.approx(measured, rel=within)


@pytest.mark.parametrize(("frames", "compiled", "measured"), [(64, False, 7.70), (256, False, 29.74), (64, True, 7.01)])
def test_predicted_memory_is_near_the_measured_one(frames, compiled, measured):
    """Weights and gradients in bf16 and what is kept; a bound where it is compiled, as compilers fuse."""
    found = one_step(PILOT, frames, compiled)
    predicted = (found.memory["activations"] + 4 * found.parameters) / 1e9
    if compiled:
        assert predicted >= measured
    else:
        assert predicted == pytest.approx(measured, rel=0.02)


# The plan itself -------------------------------------------------------------------------------------------


def two_b(**changes):
    config = PRESETS["2b"]()
    return resolve(replace(config, parallel=replace(config.parallel, compile=True, **changes)), ASSUMED_INDEX)


def test_the_best_way_is_the_fastest_that_fits_and_stays_so():
    ways = search_plans(two_b(), ASSUMED_INDEX, H100, 1024)
    assert ways[0].fits and len(ways) > 10
    fitting = [way for way in ways if way.fits]
    assert ways[: len(fitting)] == fitting and ways[0].step_s == min(way.step_s for way in fitting)
    for way in ways:
        assert way.dp * way.config.parallel.sp == 1024
        assert way.config.train.micro * way.accumulate * way.dp == way.config.train.batch
        assert way.mfu < 0.6 and all(part >= 0 for part in way.seconds.values())
    again = make_plan(ways[0].config, ASSUMED_INDEX, H100, 1024)
    assert again == ways[0]


def test_less_memory_asks_for_recomputation_or_sharding():
    config = two_b()
    plenty, little = (search_plans(config, ASSUMED_INDEX, replace(H100, memory=size), 64)[0] for size in (200e9, 40e9))
    assert plenty.fits and little.fits and little.memory_bytes < 40e9 < plenty.memory_bytes
    assert little.step_s >= plenty.step_s
    nothing = search_plans(config, ASSUMED_INDEX, replace(H100, memory=5e9), 64)
    assert not nothing[0].fits and nothing[0].memory_bytes == min(way.memory_bytes for way in nothing)
    assert "DOES NOT FIT" in describe(nothing, ASSUMED_INDEX, None)


def test_better_hardware_is_never_slower():
    base = search_plans(two_b(), ASSUMED_INDEX, H100, 256)[0].step_s
    for better in ("peak", "memory", "bandwidth", "link", "network"):
        device = replace(H100, **{better: 2 * getattr(H100, better)})
        # the layout of a scale is chosen without regard to what else travels: a hair of slack
        assert search_plans(two_b(), ASSUMED_INDEX, device, 256)[0].step_s <= base * 1.001


def test_what_limits_is_named():
    slow = replace(H100, network=1e9)
    assert search_plans(two_b(), ASSUMED_INDEX, slow, 1024, fixed=["parallel.zero.stage"])[0].limit in (
        "gradients",
        "weights",
    )
    eager = replace(PRESETS["pilot"](), train=replace(PRESETS["pilot"]().train, batch=8))
    assert "parallel.compile=true" in describe(
        search_plans(resolve(eager, ASSUMED_INDEX), ASSUMED_INDEX, H100, 8), ASSUMED_INDEX, None
    )
    config = two_b()
    with pytest.raises(ValueError, match="a batch of a multiple of 67"):
        search_plans(config, ASSUMED_INDEX, H100, 67)


def test_fp32_takes_longer_and_holds_more():
    config = two_b(sp=8)
    slow = replace(config, parallel=replace(config.parallel, precision="fp32"))
    fast, slow = (make_plan(one, ASSUMED_INDEX, H100, 1024) for one in (config, slow))
    assert slow.seconds["matrix products"] == pytest.approx(989 / 67 * fast.seconds["matrix products"])
    assert slow.memory["activations"] == pytest.approx(2 * fast.memory["activations"], rel=0.1)


def test_given_settings_stay():
    ways = search_plans(two_b(sp=8), ASSUMED_INDEX, H100, 1024, fixed=["parallel.sp", "parallel.recompute"])
    assert {(way.config.parallel.sp, way.config.parallel.recompute) for way in ways} == {(8, "cheap")}


def test_traffic_of_zero():
    n, p = 1000, 4
    assert zero_bytes(n, 0, p, False, 2, "none") == (2 * 4 * 750, 0)
    assert zero_bytes(n, 1, p, False, 2, "none") == (2 * 4 * 750, 4 * 750)
    assert zero_bytes(n, 2, p, True, 2, "none") == (2 * 2 * 4 * 750, 2 * 750)
    assert zero_bytes(n, 3, p, True, 2, "full") == (2 * 4 * 750, 2 * 3 * 2 * 750)
    assert zero_bytes(n, 3, 1, True, 2, "full") == (0, 0)


def test_drivers_names():
    assert gpu_of_driver_name("NVIDIA H100 80GB HBM3") is KINDS["h100"]
    assert gpu_of_driver_name("NVIDIA H200") is KINDS["h200"]
    assert gpu_of_driver_name("NVIDIA A100-SXM4-80GB") is KINDS["a100"]
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA GB200", "NVIDIA L40S"):
        assert gpu_of_driver_name(other) is None
    with pytest.raises(ValueError, match="a100, h100, h200, b200"):
        gpu_kind("h300")


def test_the_command_says_everything(tmp_path, capsys):
    words = ["plan", "2b", "--gpus", "64", "--kind", "h200", "parallel.compile=true", "--price", "2.5"]
    assert cli.main([*words, "--roll-out", "900", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    names = "parameters FLOPs tokens activations gradients average clips/s MFU days limited network runners-up caches"
    for name in (*names.split(), "GPU hours", "at 2.5 each", "MEASURED", "ESTIMATED", "per latent frame"):
        assert name in said, name
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["dp"] * values["settings"]["parallel.sp"] == 64
    assert read_planned_step(tmp_path / "plan.json").step_s == values["step_s"]
    assert cli.main(["plan", "2b", "--gpus", "64", "--kind", "h100", "--network", "0"]) == 2
    assert cli.main(["plan", "--gpus", "64", "--kind", "h100"]) == 2


def test_a_longer_roll_out_holds_more_and_takes_longer():
    model = replace(PRESETS["2b"]().model, channels=16)
    short, long = (plan_rollout(model, (32, 32), H100, units) for units in (100, 3600))
    assert short.memory["caches"] < long.memory["caches"]
    assert long.seconds_per_frame[0] <= long.seconds_per_frame[1]


# A run against its plan ------------------------------------------------------------------------------------


def test_deviations_are_said():
    expected = PlannedStep(1.0, 40.0, "plan.json")
    fine = {"step_s": 1.4, "data_wait": 0.0, "memory_reserved_gib": 20.0}
    assert describe_deviation(fine, expected) == "" and plan_ratios(fine, expected) == {
        "plan/step_s": 1.4,
        "plan/memory": 0.5,
    }
    slow = describe_deviation({**fine, "step_s": 3.0, "data_wait": 0.6}, expected)
    assert slow == "off its plan (plan.json): a step takes 3 s, 3 times the 1 s planned, waiting for data 60% of it"
    assert "0.5 times" in describe_deviation({**fine, "step_s": 0.5}, expected)
    assert "70 GiB are held, 1.8 times the 40 planned" in describe_deviation(
        {**fine, "memory_reserved_gib": 70.0}, expected
    )
    assert plan_ratios({"step_s": 2.0, "memory_gib": 99.0}, expected) == {"plan/step_s": 2.0}
    with pytest.raises(ValueError, match="is not valid"):
        PlannedStep(0.0, 1.0, "x")


@pytest.mark.slow
def test_a_run_says_once_that_it_is_off_its_plan(shards, tmp_path):  # noqa: F811
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(json.dumps({"step_s": 1e-6, "memory_gib": 80.0}))
    done = msc_train(shards, tmp_path / "run", "--plan", plan_file, steps=3)
    assert done.stderr.count("off its plan") == 1 and "times the 1e-06 s planned" in done.stderr
    assert len(curve(tmp_path / "run")) == 3
    plan_file.write_text("{}")
    with pytest.raises(ValueError, match="has no step_s"):
        read_planned_step(plan_file)


def test_a_setting_of_the_command_line_stays_in_the_plan(capsys):
    assert cli.main(["plan", "pilot", "parallel.sp=4", "--gpus", "8", "--kind", "h100"]) == 0
    assert re.search(r"^best way +dp 2 × sp 4,", capsys.readouterr().out, re.MULTILINE)
