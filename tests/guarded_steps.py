"""Rank functions of test_spike_guard.py: training steps of which some are skipped."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group

from msc.parallel import deepspeed_zero
from msc.pretrain.optimizer import OptimizerConfig, make_optimizer
from msc.pretrain.tracking import spike_guard
from msc.pretrain.tracking.spike_guard import GuardConfig, History


def spoiled_on_a_rank(rank, ranks, cases):
    """Of each case: state after the steps good, NaN, refused, huge, good; after good, good; outcomes of the first."""
    init_process_group("gloo")
    results = [spoiled(rank, *case) for case in cases]
    destroy_process_group()
    return results


def spoiled(rank, stage, precision):
    results = []
    for steps in (("good", "nan", "refused", "huge", "good"), ("good", "good")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        optimizer = make_optimizer(model, OptimizerConfig(lr=1e-2))
        for group in optimizer.param_groups:
            group["ema_decay"] = 0.9
        engine = deepspeed_zero.make_engine(model, optimizer, deepspeed_zero.ZeroConfig(stage=stage), precision, 2, 1.0)
        assert not engine.tput_timer.config.enabled, "it would wait for the GPU at every pass"
        outcomes, good = [], 0
        for kind in steps:
            good += kind == "good"
            for micro in range(2):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * good + 2 * micro + rank))
                if kind == "nan" and micro == 1 and rank == 1:
                    x[0, 0] = torch.nan
                y = engine(x.to(next(engine.module.parameters()).dtype))
                deepspeed_zero.backward(engine, y.float().square().mean() * (1e38 if kind == "huge" else 1.0))

            def skip_reason(norm, kind=kind):
                return "refused" if kind == "refused" else spike_guard.skip_reason(GuardConfig(), History(), 1.0, norm)

            outcomes.append(deepspeed_zero.step(engine, skip_reason))
        state = {
            f"{piece.name} {key}": value.clone()
            for piece in deepspeed_zero.local_slices(engine)
            for key, value in piece.state.items()
        }
        state["steps"] = torch.tensor(deepspeed_zero.adam_steps(engine))
        with torch.no_grad():
            state["output"] = engine(torch.ones(1, 8, dtype=next(engine.module.parameters()).dtype)).float()
        results.append((state, outcomes))
    (with_them, outcomes), (without, _) = results
    return with_them, without, outcomes
