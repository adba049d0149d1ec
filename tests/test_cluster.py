# ruff: noqa: F811 - `shards` is a fixture
"""`msc submit` on a real Slurm: whatever `sinfo` reaches, from two nodes with two CPUs each on. Skipped without one.

The nodes may be virtual ones on one machine; pytest's folders must be seen by all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from faults import PROGRAM
from test_stopping import Run
from test_tracking import free_port, server
from test_training import MSC, SMALL, curve, final_weights, shards, wait_for  # noqa: F401

from msc.launch.scaling.sweep import Sweep
from msc.launch.scaling.sweep_spec import read_sweep_spec
from msc.launch.slurm import job_records, sbatch
from msc.pretrain.tracking.mlflow_store import read_identity


def no_slurm() -> str:
    """Why there is no Slurm to test with; "" if there is."""
    if shutil.which("sinfo") is None:
        return "there is no sinfo"
    command = ["sinfo", "-h", "-N", "-t", "idle,mixed,allocated,completing", "-o", "%N"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "sinfo reaches nobody within 10 s"
    nodes = len(set(done.stdout.split()))
    return "" if nodes >= 2 else done.stderr.strip() or f"sinfo knows {nodes} usable nodes, and two are needed"


pytestmark = pytest.mark.skipif(bool(REASON := no_slurm()), reason=f"no Slurm: {REASON}")


def control(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def msc(*words: object, environment=None) -> str:
    done = subprocess.run([MSC, *map(str, words)], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Sent:
    """A run that `msc submit` trains in, with faults: its ranks write down what they read, step by step."""

    def __init__(self, folder: Path, shards: Path, *settings: str, options=(), steps=30, **faults):
        self.run, self.folder = folder / "run", folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "msc-with-faults").write_text(f"#!/bin/sh\nshift 2\nexec {sys.executable} -c '{PROGRAM}' \"$@\"\n")
        (folder / "msc-with-faults").chmod(0o755)
        (folder / "site.yaml").write_text(f"python: {folder}/msc-with-faults\nsignal_seconds: 30\n")
        faults_json = json.dumps({"consumed": str(folder), **faults})
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MSC_FAULTS": faults_json}
        self.environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        words = ["submit", "--nodes", "2", "--site", folder / "site.yaml", "--time", "10", *options, "--run", self.run,
                 "--preset", "demo", f"data.shards={shards}", *SMALL, "parallel.sp=2", f"train.clips={4 * steps}",
                 "checkpoint.every=4", *settings]  # fmt: skip
        self.output = self.msc(*words)
        (self.record,) = job_records.read_records(self.run / "jobs")
        self.job = self.record.id

    def msc(self, *words: object) -> str:
        return msc(*words, environment=self.environment)

    def log(self) -> str:
        path = Path(self.record.log)
        return path.read_text() if path.exists() else "nothing yet"

    def state(self) -> str:
        return sbatch.job_states([self.job])[self.job][0].name

    def steps(self, rank: int = 0) -> list[dict]:
        file = self.folder / f"{rank}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if "clock" in line]

    def until(self, condition, what: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited too long for {what}: {self.state()}\n{self.log()}"
            time.sleep(0.2)

    def until_queued_again(self) -> None:
        """And lift the two minutes that Slurm keeps a requeued job waiting."""
        self.until(lambda: self.state() == "PENDING", "the requeue")
        time.sleep(2)  # in the second in which it was ended, its nodes refuse to start it ("credential revoked")
        control("scontrol", "update", f"jobid={self.job}", "starttime=now")

    def end(self) -> None:
        subprocess.run(["scancel", self.job], capture_output=True)
        wait_for(lambda: not any(s.active for s in sbatch.job_states([self.job]).get(self.job, [])), seconds=60)


@pytest.fixture
def sent(tmp_path, shards):
    submissions: list[Sent] = []

    def send(*settings, **options) -> Sent:
        submissions.append(Sent(tmp_path / f"{len(submissions)}", shards, *settings, **options))
        return submissions[-1]

    yield send
    for one in submissions:
        one.end()


@pytest.mark.gloo
def test_preempted_twice_is_bit_identical(sent, shards, tmp_path):
    """The signal before a time limit, and a requeue from outside, on two nodes: bit for bit the run left alone."""
    uri = f"metrics.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
    run = sent(uri, step_s=0.25, steps=16)
    run.until(lambda: len(run.steps()) > 5, "five steps")
    control("scancel", "--signal=USR1", run.job)  # what --signal makes Slurm send
    run.until_queued_again()
    assert job_records.read_events(run.run / "jobs", run.job)[-1]["verdict"] == "again"
    run.until(lambda: len(run.steps()) > 9, "more steps")
    control("scontrol", "requeue", run.job)
    run.until_queued_again()
    run.until(lambda: run.state() == "COMPLETED", "the end")

    whole = Run(tmp_path / "whole", shards, processes=2, sp=2, steps=16)
    whole.go()
    parts = Run.__new__(Run)
    parts.folder = run.folder
    for rank in range(2):
        assert parts.committed(rank) == whole.committed(rank) and len(whole.committed(rank)) == 16
    assert sum("from" in line for line in parts.consumed()) == 3, "three starts"
    assert torch.equal(curve(run.run), curve(whole.run))
    expected = final_weights(whole.run)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(run.run).items())

    from mlflow import MlflowClient

    client = MlflowClient(uri.partition("=")[2])
    (mlflow_run,) = client.search_runs([client.get_experiment_by_name("msc").experiment_id])
    assert mlflow_run.info.run_id == read_identity(run.run)["run_id"]
    assert (mlflow_run.info.status, mlflow_run.data.tags["msc.starts"]) == ("FINISHED", "3")
    assert {point.step for point in client.get_metric_history(mlflow_run.info.run_id, "loss")} == set(range(1, 17))
    assert "FINISHED" in run.msc("status", run.run) and "16/16" in run.msc("status", run.run)


@pytest.mark.slow
@pytest.mark.gloo
def test_time_limit_and_preemption(sent):
    if "urgent" not in control("sinfo", "-h", "-o", "%R").split():
        pytest.skip("there is no partition `urgent` that preempts")
    run = sent(step_s=0.5, steps=2000, options=["--time", "2"])
    run.until(run.steps, "the first step")  # before, it is queued for want of nodes that are being freed
    run.until(lambda: run.state() == "PENDING", "the time limit", 240)
    first = job_records.read_events(run.run / "jobs", run.job)[-1]
    assert (first["code"], first["verdict"]) == (75, "again") and first["to"] > 0
    control("scontrol", "update", f"jobid={run.job}", "starttime=now", "timelimit=10")
    before = len(run.steps())
    run.until(lambda: len(run.steps()) > before + 3, "more steps")
    urgent = control("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                     "--wrap=sleep 5").strip()  # fmt: skip
    try:
        run.until(lambda: run.state() == "PENDING", "the preemption")
        second = job_records.read_events(run.run / "jobs", run.job)[-1]
        assert second["to"] > first["to"], "it has saved"
    finally:
        control("scancel", urgent)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("what", ["killed", "rank 0 killed", "hung", "fails at once", "cancelled", "node down"])
def test_failures(what, sent, tmp_path):
    """As in the table of docs/slurm.md; prints the times that are in it."""
    hurt = {"hung": {"hang": [1, 28]}, "fails at once": {"fail": [1, 0]}}.get(what, {})
    uri = f"sqlite:///{tmp_path}/mlflow.db" if what == "rank 0 killed" else "none"
    run = sent("parallel.timeout=20", f"metrics.tracking_uri={uri}", step_s=0.2, steps=2000, **hurt)
    run.until(lambda: len(run.steps(1)) > 6 or what == "fails at once", "six steps")
    began = time.monotonic()
    if what.endswith("killed"):
        if uri != "none":
            run.until(lambda: read_identity(run.run).get("run_id"), "MLflow")
        ranks = [int(line) for line in subprocess.run(["pgrep", "-f", f"faults.main.*{run.run}"], text=True,
                                                      capture_output=True).stdout.split()]  # fmt: skip
        mark = b"\0SLURM_PROCID=%d\0" % (what == "killed")
        hit = [p for p in ranks if mark in Path(f"/proc/{p}/environ").read_bytes()]
        subprocess.run(["kill", "-KILL", *map(str, hit)], check=True)
    if what == "cancelled":
        assert f"ended: {run.job}" in run.msc("cancel", run.run)
    if what == "node down":
        control("scontrol", "update", "nodename=" + nodes()[-1], "state=down", "reason=test")
    try:
        over = {"fails at once": "FAILED", "cancelled": "CANCELLED"}.get(what, "PENDING")
        run.until(lambda: run.state() == over, over)
        print(f"\n{what}: {over} after {time.monotonic() - began:.0f} s\n{run.log()[-3000:]}")
        print(run.msc("status", run.run))
    finally:
        if what == "node down":
            # which fails where the node has come back by itself
            subprocess.run(["scontrol", "update", "nodename=" + nodes()[-1], "state=resume"], capture_output=True)
    log = run.log()
    if what == "hung":
        others = (run.run / "logs/rank_1.log").read_text()
        assert re.search(r"rank 1 .* is alive but lags behind in step", log), log
        assert "in all_reduce" in log or "in all_reduce_sum" in log, "where rank 0 stood"
        assert "Current thread" in others and "in loader_with_faults" in others, "and where rank 1 did"
    if what == "killed":
        assert re.search(r"rank 1 \(process \d+ on .*\) is silent", log), log
    if what == "rank 0 killed":
        from mlflow import MlflowClient

        others = (run.run / "logs/rank_1.log").read_text()
        assert "rank 0, which keeps the store, does not answer" in others or "rank 0 (process" in others, others
        assert MlflowClient(uri).get_run(read_identity(run.run)["run_id"]).info.status == "FAILED"
        assert "was still RUNNING and is now FAILED" in log
    if what == "fails at once":
        assert "failed before it got anything done" in log and run.msc("status", run.run).rstrip().endswith("FAILED")
    if what == "cancelled":
        assert "stopped at step" in log


def nodes() -> list[str]:
    return sorted(set(control("sinfo", "-h", "-N", "-o", "%N").split()))


# Arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.gloo
def test_sweep_array(shards, tmp_path):
    """Of three runs one is killed and requeued, alone, though it has the array's own number; one fails: sent again, it
    alone is repeated. Then two of them are evaluated, as an array."""
    folder, programs = tmp_path / "runs" / "a sweep", tmp_path / "programs"
    programs.mkdir()
    (programs / "broken").touch()
    (programs / "once").touch()
    (programs / "python").write_text(
        f"#!/bin/sh\ncd '{programs}'\ncase \"$*\" in\n*seed1*) [ -e broken ] && exit 1;;\n"
        f'*seed2*) rm once 2>/dev/null && exit 137;;\nesac\nexec {sys.executable} "$@"\n'
    )
    (programs / "python").chmod(0o755)
    site, file = tmp_path / "site.yaml", tmp_path / "sweep.yaml"
    site.write_text(f"python: '{programs}/python'\ntime: '5'\n")
    settings = {key: yaml.safe_load(value) for key, value in (s.split("=", 1) for s in SMALL)}
    settings |= {"data.shards": str(shards), "train.clips": 16, "metrics.tracking_uri": f"sqlite:///{tmp_path}/m.db"}
    file.write_text(yaml.safe_dump({"preset": "demo", "set": settings, "grid": {"train.seed": [0, 1, 2]}}))
    words = ["sweep", file, "--out", folder, "--cluster", "slurm", "--site", site]
    plan, environment = read_sweep_spec(file), {**os.environ, "OMP_NUM_THREADS": "1"}

    def states() -> list[str]:
        queue = Sweep(folder, plan).slurm_states()
        return [Sweep(folder, plan).state(run, queue) for run in plan.runs]

    msc(*words, "--jobs", "2", environment=environment)
    first = job_records.read_records(folder / "jobs")[-1]
    try:
        assert first.parts == 3
        left = {run.name for run in Sweep(folder, plan).pending()}
        assert left <= {"seed1"}, "a second sweep leaves alone what is queued or running"
        last = f"{first.id}_2"
        wait_for(lambda: job_records.read_events(folder / "seed2/jobs", last)[1:], seconds=120)
        wait_for(lambda: sbatch.job_states([last])[last][0].name == "PENDING", seconds=30)
        time.sleep(2)  # as in until_queued_again
        control("scontrol", "update", f"jobid={last}", "starttime=now")
        wait_for(lambda: not {"queued", "running"} & set(states()), seconds=180, every=1)
        assert states() == ["finished", "failed", "finished"], msc("logs", folder, "--rank", "0")
        assert "2 finished, 1 failed" in msc(*words, "--status")
        assert "1 FAILED, 2 COMPLETED" in (output := msc("status", folder)) or "2 COMPLETED, 1 FAILED" in output
        (programs / "broken").unlink()
        msc(*words, environment=environment)
        wait_for(lambda: states() == ["finished"] * 3, seconds=120, every=1)
        assert [len(job_records.training_attempts(folder / run.name / "jobs")) for run in plan.runs] == [1, 2, 2]
        wait_for(
            lambda: not sbatch.job_states([job_records.read_records(folder / "jobs")[-1].id]).popitem()[1][0].active
        )
        msc(*words)
        assert len(job_records.read_records(folder / "jobs")) == 2, "nothing is sent when all is done"
    finally:
        subprocess.run(
            ["scancel", *(record.id for record in job_records.read_records(folder / "jobs"))], capture_output=True
        )

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/m.db")
    parent = read_identity(folder)["run_id"]
    mlflow_runs = client.search_runs([client.get_experiment_by_name("msc").experiment_id])
    assert {run.info.run_name: run.info.status for run in mlflow_runs} == {
        "a sweep": "FINISHED", "seed0": "FINISHED", "seed1": "FINISHED", "seed2": "FINISHED"
    }  # fmt: skip
    assert {run.data.tags.get("mlflow.parentRunId") for run in mlflow_runs} == {None, parent}

    runs = [folder / "seed0", folder / "seed2"]
    msc("submit", "evaluate", *runs, "--clips", "2", "--site", site, environment=environment)
    wait_for(lambda: all("held-out" in msc("logs", run) for run in runs), seconds=120, every=2)
    assert all(json.loads((run / "evaluation.json").read_text())["clips"] == 2 for run in runs)


# Conversions -------------------------------------------------------------------------------------------------


def test_conversion_in_parts(tmp_path):
    from msc.datasets.synthetic import write_videos

    write_videos(tmp_path / "my videos", seed=0, clips=4, frames=20, height=16, width=24)
    shape = ["--frames", "5", "--size", "16x24", "--fps", "12", "--held-out", "0.3", "--clips-per-shard", "1"]
    words = ["convert", tmp_path / "my videos", *shape, "--workers", "1", "--autoencoder", "pixels"]
    out = tmp_path / "the shards"
    msc("submit", *words, "--out", out, "--parts", "2", "--time", "5")
    array, merge = job_records.read_records(job_records.jobs_folder(out))
    try:
        wait_for(lambda: sbatch.job_states([merge.id])[merge.id][0].name == "COMPLETED")
    finally:
        subprocess.run(["scancel", array.id, merge.id], capture_output=True)
    msc(*words, "--out", tmp_path / "alone")
    for path in (tmp_path / "alone").glob("*.tar"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert (out / "index.json").read_bytes() == (tmp_path / "alone/index.json").read_bytes()
    assert "part 1/2" in msc("logs", out, "--rank", "1") and "training and" in msc("logs", out)


# Tracking ----------------------------------------------------------------------------------------------------

# A job of an array: 200 points of 5 metrics from the tracker of training, which the server sees as they come.
TRACKED = """
import os, signal, sys, time
from pathlib import Path
from msc.pretrain.tracking.tracker import MetricsConfig, Tracker
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
number = os.environ["SLURM_ARRAY_TASK_ID"]
tracker = Tracker(MetricsConfig(tracking_uri=sys.argv[1], system=False))
tracker.start(Path(sys.argv[2]) / number, {"number": number}, "", number)
for step in range(200):
    tracker.log({name: step + int(number) for name in "abcde"}, step)
    time.sleep(0.02)
while int(number) >= 16 and not stopping:
    time.sleep(0.1)
assert tracker.flush(120)
tracker.finish("KILLED" if stopping else "FINISHED", timeout=60)
"""


@pytest.mark.slow
def test_twenty_jobs_on_one_mlflow_server(tmp_path):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    (tmp_path / "tracked.py").write_text(TRACKED)
    command = f"{sys.executable} {tmp_path}/tracked.py {uri} {tmp_path}/runs"
    with server(tmp_path / "server", port):
        began = time.monotonic()
        job = control("sbatch", "--parsable", "--array=0-19", "--time=10", "--mem-per-cpu=300", "--ntasks=1",
                      f"--output={tmp_path}/%a.log", f"--wrap=srun {command}").strip()  # fmt: skip
        try:
            from mlflow import MlflowClient

            client = MlflowClient(uri)

            def runs_of_msc() -> list:
                experiment = client.get_experiment_by_name("msc")
                return client.search_runs([experiment.experiment_id]) if experiment else []

            def complete() -> list[str]:
                return [r.info.run_name for r in runs_of_msc() if r.data.metrics.get("e") == 199 + int(r.info.run_name)]

            wait_for(lambda: len(complete()) == 20, seconds=400, every=2)
            print(f"20 jobs, 20,000 values: {time.monotonic() - began:.0f} s")
            control("scancel", job)
            wait_for(lambda: not any(s.active for s in sbatch.job_states([job])[job]), seconds=60)
            states = {int(r.info.run_name): r.info.status for r in runs_of_msc()}
            assert states == {n: "FINISHED" if n < 16 else "KILLED" for n in range(20)}
            for r in runs_of_msc():
                for name in "abcde":
                    points = client.get_metric_history(r.info.run_id, name)
                    assert [p.value for p in sorted(points, key=lambda p: p.step)] == [
                        step + int(r.info.run_name) for step in range(200)
                    ]
        finally:
            subprocess.run(["scancel", job], capture_output=True)
