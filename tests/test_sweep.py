"""Sweeps: a file becomes named runs by stated rules; they run, stop, fail and go on."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import yaml
from test_training import SMALL, shards  # noqa: F401

from msc.datasets.shards.index import read_index
from msc.launch import cli
from msc.launch.scaling import sweep
from msc.launch.scaling.data import read_scaling_data
from msc.launch.scaling.sweep import Sweep
from msc.launch.scaling.sweep_spec import RunSpec, SweepSpec, nearest_power, read_sweep_spec
from msc.launch.slurm import job_records, sbatch
from msc.pretrain import cost
from msc.pretrain.config import dump, load
from msc.pretrain.tracking.tracker import MetricsConfig
from msc.pretrain.validation import resolve

SETTINGS = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in SMALL)}
SETTINGS["train.clips"] = 8
SCALES = SETTINGS["model.scales"]


def write(path: Path, shards, **values) -> Path:  # noqa: F811
    own = values.pop("set", {})
    values = {"preset": "demo", "set": {**SETTINGS, "data.shards": str(shards), **own}, **values}
    path.write_text(yaml.safe_dump(values))
    return path


def register(folder: Path, plan: SweepSpec) -> SweepSpec:
    """The sweep with the names that the folder has."""
    registered = Sweep(folder, plan)
    registered.register()
    return registered.spec


def sizes(plan: SweepSpec, index):
    """(parameters, tokens, FLOPs, configuration) of every run."""
    for run in plan.runs:
        config = resolve(plan.configured(run), index)
        per_clip = index.frames * cost.tokens_per_frame(config.model, index.height, index.width)
        flops = cost.step_flops(config.model, index.frames, index.height, index.width)
        yield cost.parameters(config.model), config.train.clips * per_clip, config.train.clips * flops, config


def test_a_grid_is_all_combinations_with_a_list(shards, tmp_path):  # noqa: F811
    file = write(
        tmp_path / "s.yaml", shards, grid={"optimizer.lr": [1e-3, 2e-3], "train.seed": [0, 1]},
        list=[{"model.gate": "logits"}, {"model.gate": "none"}],
    )  # fmt: skip
    plan = read_sweep_spec(file)
    assert len(plan.runs) == 8
    assert plan.runs[0].name == "gatelogits-lr0.001-seed0" and plan.runs[-1].name == "gatenone-lr0.002-seed1"
    assert plan.configured(plan.runs[-1]).optimizer.lr == 2e-3
    assert read_sweep_spec(file) == plan


@pytest.mark.parametrize("kind, budgets", [("tokens", [3e3, 3e4]), ("flops", [3e8, 3e9]), ("clips", [40, 400])])
def test_ladders_spend_what_they_say(shards, tmp_path, kind, budgets):  # noqa: F811
    ladder = {"sizes": [{"width": 32, "depth": 2}, {"width": 64, "depth": 3, "heads": 8}], kind: budgets}
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, ladder=ladder))
    found = list(sizes(plan, read_index(shards)))
    for (_, tokens, flops, config), budget in zip(found, budgets * 2, strict=True):
        spent = {"tokens": tokens, "flops": flops, "clips": config.train.clips}[kind]
        # whole steps: off by half a batch at most
        assert abs(spent / budget - 1) <= 0.51 * config.train.batch / config.train.clips
        assert config.optimizer.warmup == pytest.approx(0.05 * config.train.clips, abs=1)
    assert found[2][3].model.heads == 8 and [s.heads for s in found[2][3].model.scales] == [4, 2, 2]


@pytest.mark.parametrize("kind", ["list", "grid"])
def test_every_model_of_a_list_or_grid_spends_the_budget(shards, tmp_path, kind):  # noqa: F811
    """A dense model pays more for a clip than a multi-scale one, so that it sees fewer of them."""
    dense, scales = [{"heads": 4}], SCALES
    varied = {"list": [{"model.scales": dense}, {"model.scales": scales}], "grid": {"model.scales": [dense, scales]}}
    ladder = {"sizes": [{"width": 32}, {"width": 64}], "flops": [3e9]}
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, ladder=ladder, **{kind: varied[kind]}))
    found = list(sizes(plan, read_index(shards)))
    assert [(config.model.width, len(config.model.scales)) for *_, config in found] == [
        (32, 1), (32, len(scales)), (64, 1), (64, len(scales))
    ]  # fmt: skip
    for _, _, flops, config in found:
        assert abs(flops / 3e9 - 1) <= 0.51 * config.train.batch / config.train.clips
    assert len({config.train.clips for *_, config in found}) == 4


def test_the_rules_for_learning_rate_and_batch_are_those_stated(shards, tmp_path):  # noqa: F811
    ladder = {
        "sizes": [{"width": 32, "depth": 2}, {"width": 64, "depth": 8}], "clips": [100, 400],
        "base": {"width": 32, "depth": 2, "batch": 4, "lr": 0.01, "tokens": 100 * 5 * 24}, "lr": [1, 2],
    }  # fmt: skip
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, ladder=ladder))
    found = {
        (config.model.width, config.train.clips, i % 2): (config.train.batch, config.optimizer.lr)
        for i, (*_, config) in enumerate(sizes(plan, read_index(shards)))
    }
    assert found[32, 100, 0] == (4, 0.01)
    assert found[32, 100, 1] == (4, 0.02)
    assert found[32, 400, 0] == (8, pytest.approx(0.01 * math.sqrt(2), rel=1e-3))  # four times the tokens
    assert found[64, 100, 0] == (4, pytest.approx(0.01 / 2 / 2))  # twice as wide, four times as deep
    ladder |= {"rules": {"width": 0, "depth": 0, "tokens": 0, "batch": 0}, "lr": [1]}
    plain = read_sweep_spec(write(tmp_path / "s.yaml", shards, ladder=ladder))
    assert {config.optimizer.lr for *_, config in sizes(plain, read_index(shards))} == {0.01}
    over = read_sweep_spec(write(tmp_path / "s.yaml", shards, ladder=ladder, grid={"optimizer.lr": [0.5]}))
    assert {config.optimizer.lr for *_, config in sizes(over, read_index(shards))} == {0.5}


def test_numbers_of_a_ladder_may_be_written_as_people_do(shards, tmp_path):  # noqa: F811
    """1e-1 is a text to YAML."""
    texts, floats = (
        {"sizes": [{"width": 32}], "tokens": [of("1e4")], "batch": [of("2e0")], "lr": [of("1e-1"), of("1e0")],
         "warmup": of("5e-2"), "ema": of("1e-1"), "base": {"lr": of("1e-2"), "tokens": of("1e4")},
         "rules": {"batch": of("5e-1")}} for of in (str, float)
    )  # fmt: skip
    plans = [read_sweep_spec(write(tmp_path / "s.yaml", shards, ladder=ladder)) for ladder in (texts, floats)]
    assert plans[0] == plans[1] and plans[0].runs[0].settings["optimizer.lr"] < 0.01


def test_batches_are_powers_of_two_of_a_micro_batch():
    assert [nearest_power(value, 3) for value in (0.1, 3, 4.3, 5, 11, 1000)] == [3, 3, 6, 6, 12, 768]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gird": {}}, "unknown key gird"),
        ({"grid": {"optimizer.lr": 1}}, "must be a list"),
        ({"grid": {"optimizer.rate": [1]}}, "unknown key optimizer.rate"),
        ({"grid": {"model.width": [30]}}, "run width30: .*head width|run run: "),
        ({"ladder": {"sizes": [{"width": 32}]}}, "exactly one of clips"),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [1]}}, "less than one batch"),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [8], "base": {"lr": 0}}}, "base.lr is 0"),
        (
            {"ladder": {"sizes": [{"width": 32}], "clips": [8], "base": {"lr": "x"}}},
            "ladder.base.lr is 'x'; it must be",
        ),
        (
            {"ladder": {"sizes": [{"width": 32}], "clips": [8], "lr": ["1e"]}},
            r"ladder.lr\[0\] is '1e'; it must be a number",
        ),
        (
            {"ladder": {"sizes": [{"width": 32}], "clips": ["many"]}},
            r"ladder.clips\[0\] is 'many'; it must be a number",
        ),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [8], "ema": None}}, "ladder.ema is None; it must be a number"),
        ({"list": [{"train.seed": 1}, {"train.seed": 1}]}, "the same run twice"),
        ({"config": "x.yaml"}, "both a preset"),
        ({"preset": ["demo"]}, r"preset is \['demo'\]; it must be text"),
        ({"processes": "two"}, "processes is 'two'; it must be an integer"),
        ({"processes": 0}, "processes is 0; it must be positive"),
        ({"grid": 3}, "grid is 3; it must be a table"),
        ({"list": 3}, "list is 3; it must be a list"),
        ({"list": [3]}, r"list\[0\] is 3; it must be a table"),
        ({"ladder": 3}, "ladder must be a table of keys, not 3"),
        ({"ladder": {"sizes": 5, "clips": [8]}}, "ladder.sizes is 5; it must be a list"),
        ({"ladder": {"sizes": [5], "clips": [8]}}, r"ladder.sizes\[0\] is 5; it must be a table"),
        ({"ladder": {"sizes": [{3: 1}], "clips": [8]}}, "unknown key model.3"),
        ({"ladder": {"sizes": [{"heads": "four"}], "clips": [8]}}, "'four' heads cannot be shared"),
        ({"ladder": {"sizes": [{"heads": 0}], "clips": [8]}}, "0 heads cannot be shared"),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [math.inf]}}, "ladder.clips is inf; it must be positive"),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [math.nan]}}, r"ladder.clips\[0\] is nan; it must be a number"),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [-8], "base": {"tokens": 1}}}, "ladder.clips is -8; it must"),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [8], "lr": [0]}}, "ladder.lr is 0; it must be positive"),
        ({"ladder": {"sizes": [{"width": 32}], "clips": [8], "base": 3}}, "ladder.base must be a table"),
        (
            {"ladder": {"sizes": [{"width": 32}], "clips": [8], "base": {"batch": 0.5}}},
            "ladder.base.batch is 0.5; it must be",
        ),
    ],
)
def test_mistakes_are_named(shards, tmp_path, values, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        read_sweep_spec(write(tmp_path / "s.yaml", shards, **values))


def test_a_file_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "s.yaml").write_bytes("preset: démo".encode("latin-1"))
    assert cli.main(["sweep", str(tmp_path / "s.yaml")]) == 2
    assert f"{tmp_path}/s.yaml is not valid YAML" in capsys.readouterr().err


# Running, with a stand-in for `msc train`: writes what a run writes, or fails while the file `broken` is there

STAND_IN = """
import json, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
run, clips = Path(sys.argv[1]), int(words["train.clips"])
run.mkdir(exist_ok=True)
with (run / "started").open("a") as file:
    file.write("x")
if words["train.seed"] == "1" and (run.parent / "broken").exists():
    sys.exit("it broke")
(run / "log.jsonl").write_text(json.dumps({"step": 1, "clock": clips, "loss": 0.5}))
"""


@pytest.fixture
def stand_in(monkeypatch):
    def command(sweep, run):
        return [sys.executable, "-c", STAND_IN, str(sweep.folder / run.name), *run.overrides]

    monkeypatch.setattr(Sweep, "command", command)


def test_finished_runs_are_not_repeated_and_failed_ones_are(shards, tmp_path, stand_in):  # noqa: F811
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1, 2]}))
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "broken").touch()
    assert sweep.run_all(folder, plan, jobs=2) == 1
    assert [Sweep(folder, plan).state(run) for run in plan.runs] == ["finished", "failed", "finished"]
    text = sweep.table(folder, plan)
    assert "2 finished, 1 failed" in text and "it broke" in (folder / "logs" / "seed1.log").read_text()
    (folder / "broken").unlink()
    assert [run.name for run in Sweep(folder, plan).pending()] == ["seed1"]
    assert sweep.run_all(folder, plan) == 0
    assert [(folder / run.name / "started").read_text() for run in plan.runs] == ["x", "xx", "x"]


def test_what_was_trained_keeps_its_name_when_one_more_key_varies(shards, tmp_path, stand_in, capsys):  # noqa: F811
    """Also where the sweep file leaves out a setting that is the default, or writes a number in another way."""
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 2]}))
    assert sweep.run_all(tmp_path / "s", plan) == 0
    record = load(plan.resolved(plan.runs[0]), overrides=["metrics.parent=x", "metrics.tracking_uri=sqlite:///x.db"])
    (tmp_path / "s/seed0/config.yaml").write_text(dump(record))  # of the other only sweep.json knows
    file = write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 2], "optimizer.lr": [1e-3, 2e-3]})
    more, names = read_sweep_spec(file), ["seed0", "lr0.002-seed0", "seed2", "lr0.002-seed2"]
    assert sweep.run_all(tmp_path / "s", more) == 0
    assert "4 runs, 2 of them done or under way" in capsys.readouterr().err
    assert [(tmp_path / "s" / name / "started").read_text() for name in names] == ["x"] * 4
    assert len(list((tmp_path / "s").glob("*/started"))) == 4
    assert sorted(json.loads((tmp_path / "s/sweep.json").read_text())) == sorted(names)
    for known in (more, plan):
        assert f"{len(known.runs)} finished" in sweep.table(tmp_path / "s", known)
    assert [run.name for run in register(tmp_path / "s", plan).runs] == ["seed0", "seed2"]


def test_a_run_of_another_base_is_another_run(shards, tmp_path):  # noqa: F811
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.clips": [8, 16]}))
    register(tmp_path, plan)
    (tmp_path / "clips8").mkdir()
    record = load(plan.resolved(plan.runs[0]), overrides=["diffusion.shift=7"])
    (tmp_path / "clips8/config.yaml").write_text(dump(record))
    more = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.clips": [8, 16], "train.seed": [0, 1]}))
    names = [run.name for run in register(tmp_path, more).runs]
    assert names == ["clips8-seed0", "clips8-seed1", "clips16", "clips16-seed1"]


def test_a_name_stands_for_one_run(shards, tmp_path):  # noqa: F811
    """Tables are numbered in order of appearance: one more in front would take the name of the first."""
    dense, near = [{"heads": 4}], [{"heads": 4, "window": 2}]
    one, two = ({"grid": {"model.scales": scales}} for scales in ([near, SCALES], [dense, near, SCALES]))
    register(tmp_path, read_sweep_spec(write(tmp_path / "s.yaml", shards, **one)))
    for look in (register, sweep.table):
        with pytest.raises(ValueError, match="scales0 has model.scales = "):
            look(tmp_path, read_sweep_spec(write(tmp_path / "s.yaml", shards, **two)))
    two["grid"]["model.scales"].append(two["grid"]["model.scales"].pop(0))
    plan = register(tmp_path, read_sweep_spec(write(tmp_path / "s.yaml", shards, **two)))
    assert [run.name for run in plan.runs] == ["scales0", "scales1", "scales2"]


def test_runs_at_a_time_have_gpus_of_their_own(shards, tmp_path, monkeypatch):  # noqa: F811
    """Two at a time, of two processes each: a run has the GPUs of the one that ended before it."""
    program = "import os, sys, time; time.sleep(0.3); open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"

    def command(sweep, run):
        return [sys.executable, "-c", program, str(sweep.folder / f"{run.name}.gpus")]

    monkeypatch.setattr(Sweep, "command", command)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0,2,5")
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1, 2, 3]}, processes=2))
    sweep.run_all(tmp_path / "s", plan, jobs=2)
    given = [(tmp_path / "s" / f"{run.name}.gpus").read_text() for run in plan.runs]
    assert given[:2] == ["3,1", "0,2"] and sorted(given[2:]) == ["0,2", "3,1"]
    with pytest.raises(ValueError, match="need 6 GPUs, but 5 are visible"):
        sweep.run_all(tmp_path / "t", plan, jobs=3)
    assert not (tmp_path / "t").exists()


def test_the_command_shows_what_would_run_and_where_it_is(shards, tmp_path, capsys):  # noqa: F811
    file = write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1]})
    assert cli.main(["sweep", str(file), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["seed0", "seed1"] and "train.seed=1" in lines[1]
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "none"), "--status"]) == 2
    assert "holds no sweep yet" in capsys.readouterr().err
    register(tmp_path / "some", read_sweep_spec(file))
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "some"), "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 waiting"


def test_options_of_jobs_are_for_jobs(shards, tmp_path, capsys):  # noqa: F811
    file = write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1]})
    words = ["sweep", str(file), "--out", str(tmp_path / "runs"), "--nodes", "2"]
    assert cli.main(words) == 2
    assert "--nodes is for jobs: add --cluster slurm" in capsys.readouterr().err
    assert cli.main([*words, "--cluster", "slurm"]) == 2
    assert "the sweep file says processes: 1, but 2 tasks are asked for" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("accepted", [False, True])
def test_a_sweep_is_taken_back_only_until_slurm_has_it(shards, tmp_path, monkeypatch, capsys, accepted):  # noqa: F811
    file = write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1]}, set={"metrics.tracking_uri": "none"})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sbatch, "submit_array", (lambda *_: "77") if accepted else fail)
    monkeypatch.setattr(job_records, "write_record", fail)
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "runs"), "--cluster", "slurm"]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and ("job 77: 2 of 2 runs" in said) == accepted
    assert len(list((tmp_path / "runs").glob("*/config.yaml"))) == 2 * accepted


def test_slurm_is_asked_once_for_all_runs_that_are_sent_again(shards, tmp_path, monkeypatch):  # noqa: F811
    file = write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1, 2]}, set={"metrics.tracking_uri": "none"})
    folder, asked = tmp_path / "runs", []
    monkeypatch.setattr(sbatch, "job_states", lambda numbers: asked.append(len(numbers)) or {})
    monkeypatch.setattr(sbatch, "submit_array", lambda *_: "77")
    for _ in range(2):
        assert cli.main(["sweep", str(file), "--out", str(folder), "--cluster", "slurm"]) == 0
    assert [len(job_records.read_records(folder / name)) for name in ("jobs", "seed0/jobs")] == [1, 1]
    assert asked == [0, 3, 3, 3], "each time to see what is to do, and for the table"


def test_where_runs_that_were_sent_are(shards, tmp_path, monkeypatch):  # noqa: F811
    """By Slurm while it has them; by what they left behind, as here, once it has not."""
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1, 2]}))
    for number, run in enumerate(plan.runs):
        jobs = tmp_path / run.name / "jobs"
        job_records.write_record(jobs, job_records.JobRecord(f"7_{number}", "slurm", ("train",), "x"))
        job_records.append_event(jobs, f"7_{number}", **{"from": 0})
        job_records.append_event(jobs, f"7_{number}", code=1)
    states = {
        "7_0": [sbatch.JobState("PENDING")],
        "7_1": [sbatch.JobState("RUNNING")],
        "7_2": [sbatch.JobState("FAILED")],
    }
    monkeypatch.setattr(sbatch, "job_states", lambda numbers: {number: states[number] for number in numbers})
    queue = Sweep(tmp_path, plan).slurm_states()
    assert [Sweep(tmp_path, plan).state(run, queue) for run in plan.runs] == ["queued", "running", "failed"]
    assert [run.name for run in Sweep(tmp_path, plan).pending()] == ["seed2"]


def test_other_jobs_of_a_run_are_not_its_training(shards, tmp_path, monkeypatch):  # noqa: F811
    """An evaluation that was sent later, and failed, says nothing of where training stands."""
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1]}))
    run = plan.runs[0]
    jobs = tmp_path / run.name / "jobs"
    for number, (word, code) in enumerate({"train": 75, "evaluate": 1}.items()):
        job_records.write_record(jobs, job_records.JobRecord(str(number), "slurm", (word,), "x"))
        job_records.append_event(jobs, str(number), **{"from": 0})
        job_records.append_event(jobs, str(number), code=code)
    for running, said in {"0": "running", "1": "stopped"}.items():
        queue = {running: [sbatch.JobState("RUNNING")]}
        monkeypatch.setattr(sbatch, "job_states", lambda numbers, q=queue: {n: q[n] for n in numbers if n in q})
        assert Sweep(tmp_path, plan).state(run, Sweep(tmp_path, plan).slurm_states()) == said
    assert [attempt["code"] for attempt in Sweep(tmp_path, plan).attempts(run)] == [75]


def test_a_run_that_somebody_has_is_left_to_them(shards, tmp_path, stand_in):  # noqa: F811
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 2]}))
    register(tmp_path, plan)
    lock = Sweep(tmp_path, plan).lock(plan.runs[0])
    assert lock is not None and Sweep(tmp_path, plan).lock(plan.runs[0]) is None
    assert Sweep(tmp_path, plan).state(plan.runs[0]) == "running"
    assert sweep.run_all(tmp_path, plan) == 0
    assert not (tmp_path / "seed0").exists() and (tmp_path / "seed2").exists()


def test_other_settings_for_a_run_that_was_begun_are_refused(shards, tmp_path):  # noqa: F811
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1]}))
    register(tmp_path, plan)
    (tmp_path / "seed0").mkdir()
    changed = read_sweep_spec(
        write(tmp_path / "t.yaml", shards, set={"optimizer.lr": 0.5}, grid={"train.seed": [0, 1]})
    )
    with pytest.raises(ValueError, match=r"optimizer\.lr = 1e-3, the sweep file now says 0\.5"):
        register(tmp_path, changed)


def test_sweeps_that_start_at_once_are_all_written_down(shards, tmp_path, monkeypatch):  # noqa: F811
    """None overwrites what another has added since it looked."""
    plans = [read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [i, i + 4]})) for i in range(4)]
    at_once = sweep.write_atomically
    monkeypatch.setattr(sweep, "write_atomically", lambda *given: time.sleep(0.05) or at_once(*given))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(register, tmp_path / "sweep"), plans))
    assert len(json.loads((tmp_path / "sweep/sweep.json").read_text())) == 8


def test_a_torn_last_line_of_the_log_does_not_hide_what_was_reached(shards, tmp_path):  # noqa: F811
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1]}))
    own = tmp_path / plan.runs[0].name
    own.mkdir()
    (own / "log.jsonl").write_text('torn by a crash{"clock": 4}\n{"clock": 8, "loss": 0.5}\n{"clo')
    assert Sweep(tmp_path, plan).state_on_disk(plan.runs[0]) == "finished"
    (tmp_path / "sweep.json").write_text("{}")
    assert "8/8  0.5000" in sweep.table(tmp_path, plan)


def test_a_password_of_the_store_reaches_runs_and_nothing_that_is_read(shards, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Neither their words, which `ps` shows, nor any file: they have it of the environment."""
    program = "import json, os, sys; json.dump([sys.argv, os.environ['MLFLOW_TRACKING_URI']], open(sys.argv[1], 'w'))"

    def command(sweep, run):
        return [sys.executable, "-c", program, str(tmp_path / "told"), *sweep.train_request(run).command_line()]

    monkeypatch.setattr(Sweep, "command", command)
    monkeypatch.setattr(sweep.Tracker, "flush", lambda tracker: False)  # nobody answers: no need to wait
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:swordfish@127.0.0.1:9")
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, set={"metrics.tracking_uri": ""}))
    assert sweep.run_all(tmp_path / "sweep", plan) == 0
    words, inherited = json.loads((tmp_path / "told").read_text())
    assert words[-1] == "metrics.tracking_uri=http://127.0.0.1:9"
    assert MetricsConfig(tracking_uri=words[-1].partition("=")[2]).resolve(tmp_path) == inherited
    assert inherited == "http://me:swordfish@127.0.0.1:9"
    written = "".join(path.read_text() for path in (tmp_path / "sweep").rglob("*") if path.is_file())
    assert "swordfish" not in written + "".join(words) + "".join(capfd.readouterr())


def test_a_run_that_has_begun_goes_on(tmp_path):
    plan, run = SweepSpec((), "demo", None, 2), RunSpec("a", {"train.seed": 3})
    fresh = Sweep(tmp_path, plan, "abc", "sqlite:///x.db").command(run)
    assert fresh[3:] == [
        "train", "--run", str(tmp_path / "a"), "--preset", "demo", "--processes", "2", "train.seed=3",
        "metrics.parent=abc", "metrics.tracking_uri=sqlite:///x.db",
    ]  # fmt: skip
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    assert "--resume" in Sweep(tmp_path, plan).command(run)


@pytest.mark.slow
@pytest.mark.gloo
def test_a_real_sweep_is_nested_in_mlflow_and_can_be_fitted(shards, tmp_path):  # noqa: F811
    file = write(
        tmp_path / "s.yaml", shards, set={"train.evaluate": 10**6, "train.held_out": 2, "metrics.tracking_uri": ""},
        grid={"train.clips": [16, 32], "model.width": [32, 64]},
    )  # fmt: skip
    folder = tmp_path / "runs" / "s"
    assert cli.main(["sweep", str(file), "--out", str(folder)]) == 0
    points = read_scaling_data(folder)
    assert len(points.used) == 4 and not points.left_out
    assert {point.D for point in points.used} == {16 * 5 * 24, 32 * 5 * 24}
    parent = json.loads((folder / "mlflow.json").read_text())["run_id"]
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as store:
        rows = store.execute("select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?", [parent])
        assert len(rows.fetchall()) == 4
        states = store.execute("select status from runs").fetchall()
    assert states == [("FINISHED",)] * 5


def test_a_signal_stops_the_sweep_and_what_was_not_run_waits(shards, tmp_path, monkeypatch):  # noqa: F811
    """The run in progress is told and may end as it likes (75: it saved); nothing new is started. Continued, the sweep
    starts what was stopped and what waited, and what was finished stays so."""
    stops = "import signal, sys; signal.signal(15, lambda *_: sys.exit(75))"
    waits = "import time; open(run.parent / (run.name + '.began'), 'w'); time.sleep(60)"

    def command(sweep, run):
        at_work = run.name == "seed1" and not (sweep.folder / "seed1.began").exists()
        program = "\n".join([stops, STAND_IN.rpartition("(run /")[0], waits]) if at_work else STAND_IN
        return [sys.executable, "-c", program, str(sweep.folder / run.name), *run.overrides]

    monkeypatch.setattr(Sweep, "command", command)
    plan = read_sweep_spec(write(tmp_path / "s.yaml", shards, grid={"train.seed": [0, 1, 2]}))
    killer = subprocess.Popen([sys.executable, "-c", WHEN_BEGUN, str(tmp_path / "seed1.began"), str(os.getpid())])
    assert sweep.run_all(tmp_path, plan) == 75
    assert killer.wait() == 0
    assert [Sweep(tmp_path, plan).state(run) for run in plan.runs] == ["finished", "stopped", "waiting"]
    assert sweep.run_all(tmp_path, plan) == 0
    assert [Sweep(tmp_path, plan).state(run) for run in plan.runs] == ["finished"] * 3
    assert [(tmp_path / run.name / "started").read_text() for run in plan.runs] == ["x", "xx", "x"]
    assert [len(Sweep(tmp_path, plan).attempts(run)) for run in plan.runs] == [1, 2, 1]
    assert sweep.run_all(tmp_path, plan) == 0 and len(Sweep(tmp_path, plan).attempts(plan.runs[0])) == 1


WHEN_BEGUN = """
import os, signal, sys, time
for _ in range(600):
    if os.path.exists(sys.argv[1]):
        time.sleep(0.2)
        os.kill(int(sys.argv[2]), signal.SIGTERM)
        break
    time.sleep(0.05)
"""
