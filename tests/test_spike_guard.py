"""Skipped steps and the clips that a rollback excludes: pure functions; then the update itself at every stage."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from gloo_ranks import run_ranks
from guarded_steps import spoiled_on_a_rank

from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.checkpoints.rollback import (
    is_excluded,
    merge_ranges,
    read_excluded_ranges,
    roll_back,
    too_many_skipped_message,
)
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.tracking.spike_guard import GuardConfig, History, skip_reason, updated_history

RULE = GuardConfig(sigma=4, window=16)
CALM = History(tuple(1 + 0.01 * (-1) ** i for i in range(16)), tuple(0.5 + 0.1 * (-1) ** i for i in range(16)))


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (1.0, 0.5, ""),
        (1.039, 0.89, ""),
        (1.041, 0.5, "loss 1.041"),
        (1.0, 0.91, "gradient norm 0.91"),
        (0.1, 0.0, ""),  # lower is never a spike
        (math.nan, 0.5, "loss nan"),
        (1.0, math.inf, "gradient norm inf"),
        (1.0, 5e37, "gradient norm 5e+37, above 1e+19"),
    ],
)
def test_skip_reasons(loss, norm, reason):
    actual = skip_reason(RULE, CALM, loss, norm)
    assert actual.startswith(reason) and bool(actual) == bool(reason)


def test_without_the_rule_or_enough_history_only_non_finite_steps_are_skipped():
    assert not skip_reason(GuardConfig(), CALM, 1e9, 1e9)
    assert not skip_reason(RULE, History(CALM.losses[:7], CALM.norms[:7]), 1e9, 1e9)
    assert skip_reason(GuardConfig(), History(), math.inf, 1.0)


def test_history_keeps_the_window_and_counts_skipped_steps():
    history = CALM
    for why in ("", "loss nan", "loss nan"):
        history = updated_history(RULE, history, 3.0, 4.0, why)
    assert len(history.losses) == 16 and history.losses[-1] == 3.0 and history.norms[-1] == 4.0
    assert (history.skipped, history.in_a_row) == (2, 2)
    assert updated_history(RULE, history, 1.0, 1.0, "").in_a_row == 0
    assert History.read(asdict(history)) == history and History.read(None) == History()


@pytest.mark.parametrize("sigma", [-1, 0.5, 1.9])
def test_a_rule_that_skips_good_steps_is_an_error(sigma):
    with pytest.raises(ValueError, match="guard.sigma"):
        GuardConfig(sigma=sigma)


def made_run(run, steps, clock_of_last_report, refused=()):
    """A run folder with checkpoints of these steps, four clips a step."""
    for step in steps:
        path = RunFolder(run).checkpoints / checkpoint_directory.checkpoint_name(step)
        path.mkdir(parents=True)
        checkpoint_directory.CheckpointMeta(step, 4 * step).write(path)
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "clock": clock_of_last_report}) + "\n")
    lines = [{"step": c // 4 + 1, "clock": c, "batch": 4, "clips": [{"sample": c}]} for c in refused]
    (run / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("reported", "refused", "until"),
    [
        (80, (), 80),
        (80, (8, 64), 80),
        (60, (60, 64, 68), 72),  # ended on refused steps: what spoiled the weights before them was finite
        (4, (), 48),  # stopped before the next report, known from the newest checkpoint
    ],
)
def test_a_rollback_excludes_all_clips_since(reported, refused, until, tmp_path):
    made_run(tmp_path, (4, 10, 12), reported, refused)
    roll_back(tmp_path, "4")
    assert read_excluded_ranges(tmp_path) == [(16, until)]
    assert [checkpoint_directory.step_of(path) for path in checkpoint_directory.resume_candidates(tmp_path)] == [4]


def test_the_same_rollback_only_happens_again_if_told_so(tmp_path, caplog, monkeypatch):
    """Also where it was cut short, and where the checkpoint has been pruned since."""
    caplog.set_level("INFO")
    made_run(tmp_path, (4, 10), 60)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="power"):
        patched.setattr(checkpoint_directory, "rename_aside", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        roll_back(tmp_path, "4")
    roll_back(tmp_path, "4")
    assert [checkpoint_directory.step_of(path) for path in checkpoint_directory.list_checkpoints(tmp_path)] == [4]
    made_run(tmp_path, (12, 16), 72, refused=(68, 72))
    for wanted in ("4", str(checkpoint_directory.find(tmp_path, "4"))):
        roll_back(tmp_path, wanted)
    assert read_excluded_ranges(tmp_path) == [(16, 60)] and len(checkpoint_directory.list_checkpoints(tmp_path)) == 3
    assert caplog.text.count("resuming from the newest; --again") == 2
    checkpoint_directory.set_latest(tmp_path, checkpoint_directory.find(tmp_path, "16"))
    assert "--rollback N, N one of 16, 12, 4 (--again for" in too_many_skipped_message(tmp_path, 19, 2, "loss nan")
    roll_back(tmp_path, "12")
    assert read_excluded_ranges(tmp_path) == [(16, 76)]
    roll_back(tmp_path, "12", again=True)
    checkpoint_directory.rename_aside(checkpoint_directory.find(tmp_path, "12"), "undone")
    roll_back(tmp_path, "12")


def test_ranges_that_are_left_out():
    assert merge_ranges([(40, 48), (0, 4), (46, 50), (4, 8)]) == [(0, 8), (40, 50)]
    ranges = [(40, 48)]
    assert [clock for clock in range(32, 60, 4) if is_excluded(ranges, clock, 4)] == [40, 44]
    assert [clock for clock in range(32, 64, 8) if is_excluded(ranges, clock, 8)] == [40]
    assert [clock for clock in range(30, 64, 6) if is_excluded(ranges, clock, 6)] == [36, 42], "another batch size"


@pytest.mark.gloo
@pytest.mark.parametrize("cases", [
    [(2, "bf16"), (3, "fp32")],
    pytest.param([(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "bf16")], marks=pytest.mark.slow),
])  # fmt: skip
def test_a_skipped_step_changes_nothing(cases):
    """NaN on one rank, then a finite norm that is skipped, then one that fp32 cannot square (at stage 3 it is known, at
    the others not): weights, moments, averages as without these steps."""
    for results in run_ranks(spoiled_on_a_rank, 2, cases):
        for case, (with_them, without, outcomes) in zip(cases, results, strict=True):
            assert [bool(why) for _, why in outcomes] == [False, True, True, True, False], case
            assert not outcomes[3][0] < 1e19, case
            assert not math.isfinite(outcomes[1][0]) and outcomes[2][0] > 0, case
            assert with_them.keys() == without.keys() and len(without) > 4, case
            for name, value in without.items():
                assert torch.equal(with_them[name], value), (case, name)
