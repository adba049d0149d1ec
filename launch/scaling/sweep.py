"""Sweep folder: register the runs of a sweep file, run them on this machine, and tabulate their states.

A sweep folder holds the runs' folders, `sweep.json` (which runs, with which settings), `attempts.jsonl` (the end of
each attempt) and `logs/`. The state of a run is read from its own folder, whoever trained it: `pending` lists the runs
that need a process, `train_request` is what that trains; an array of Slurm jobs (sweep_array.py) is made of these.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from msc.datasets.errors import INTERRUPTED, REQUEUE
from msc.datasets.files import append_jsonl, last_jsonl_record, locked, read_jsonl, write_atomically
from msc.datasets.text_table import text_table
from msc.parallel.signals import collect_signals
from msc.pretrain.config import Config, dump, flat, load
from msc.pretrain.tracking.mlflow_store import without_credentials
from msc.pretrain.tracking.tracker import Tracker

from ..processes import launcher
from ..processes.train_request import TrainRequest
from ..slurm import job_records, sbatch
from .sweep_spec import RunSpec, SweepSpec

log = logging.getLogger(__name__)

State = Literal["finished", "running", "queued", "failed", "stopped", "waiting"]


def register_runs(folder: Path, sweep: SweepSpec) -> SweepSpec:
    """Record the runs in sweep.json; the sweep with the names under which the folder has them. ValueError if a recorded
    name is of another run."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "sweep.lock"):
        recorded = recorded_runs(folder)
        sweep = with_recorded_names(folder, sweep, recorded)
        recorded |= {run.name: run.settings for run in sweep.runs}
        write_atomically(folder / "sweep.json", json.dumps(recorded, indent=1).encode())
    return sweep


def recorded_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs in sweep.json, with their settings over the base."""
    path = folder / "sweep.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def recorded_names(folder: Path, sweep: SweepSpec, recorded: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Names in the folder by names in the sweep file, of runs that are recorded already. A name holds only what varies,
    so one more key in a grid changes every name, also of runs whose settings are unchanged."""
    names = {run.name: run.name for run in sweep.runs if recorded.get(run.name) == run.settings}
    if not recorded or len(names) == len(sweep.runs):
        return names
    others = {}
    for name in (name for name in reversed(recorded) if name not in names):
        record = folder / name / "config.yaml"  # once it has begun that counts, whatever the base says today
        try:
            config = load(file=record) if record.is_file() else sweep.resolved(RunSpec(name, recorded[name]))
        except ValueError:  # it goes with another base, or another version
            continue
        others[identity(config)] = name
    for run in sweep.runs:
        if run.name not in names and (name := others.pop(identity(sweep.resolved(run)), "")):
            names[run.name] = name
    return names


def identity(config: Config) -> str:
    """Equal for runs with equal settings, whatever MLflow store they log to."""
    return json.dumps({key: value for key, value in flat(config).items() if not key.startswith("metrics.")})


def with_recorded_names(folder: Path, sweep: SweepSpec, recorded: dict[str, dict[str, Any]]) -> SweepSpec:
    """With the names that the folder has; ValueError if a recorded name is of another run."""
    names = recorded_names(folder, sweep, recorded)
    for run in sweep.runs:
        taken = (folder / run.name).exists() or run.name in names.values()
        if run.name in recorded and run.name not in names and taken:
            old, new = recorded[run.name], run.settings
            key = min(key for key in old | new if old.get(key, ...) != new.get(key, ...))
            raise ValueError(
                f"{folder / run.name} has {key} = {old.get(key)}, the sweep file now says {new.get(key)}; put what "
                "is new behind what was there, use another --out, or remove that folder"
            )
    return replace(sweep, runs=tuple(replace(run, name=names.get(run.name, run.name)) for run in sweep.runs))


def state(
    folder: Path, sweep: SweepSpec, run: RunSpec, queue: Mapping[str, sbatch.JobState] = MappingProxyType({})
) -> State:
    """Where a run stands: finished means trained to its last clip, and evaluated if it is to be. queue: of
    `slurm_states`."""
    if (job := queue.get(run.name)) is not None and job.active:
        return "queued" if job.name == "PENDING" else "running"
    return "running" if is_locked(folder, run) else state_on_disk(folder, sweep, run)


def slurm_states(folder: Path, sweep: SweepSpec) -> dict[str, sbatch.JobState]:
    """Slurm's states of the submitted runs, from one query. ConnectionError if Slurm does not answer."""
    sent = {}
    for run in sweep.runs:
        if records := [r for r in job_records.training_records(folder / run.name / "jobs") if r.cluster == "slurm"]:
            sent[run.name] = records[-1].id
    states = sbatch.job_states(list(sent.values()))
    return {name: states[number][0] for name, number in sent.items() if number in states}


def state_on_disk(folder: Path, sweep: SweepSpec, run: RunSpec) -> State:
    """`state` of a run that no process is training."""
    config = sweep.configured(run)
    own = folder / run.name
    clock = last_jsonl_record(own / "log.jsonl").get("clock", 0)
    held_out = last_jsonl_record(own / "held_out.jsonl").get("clock", 0)
    evaluated = not config.train.evaluate or held_out >= config.train.clips
    if clock >= config.train.clips and evaluated:
        return "finished"
    code = last_code(folder, run)
    if code not in (None, 0, REQUEUE):
        return "failed"
    return "stopped" if own.exists() or code is not None else "waiting"


def pending(folder: Path, sweep: SweepSpec) -> list[RunSpec]:
    """The runs that need a process: neither finished, running nor queued."""
    queue = slurm_states(folder, sweep)
    return [run for run in sweep.runs if state(folder, sweep, run, queue) not in ("finished", "running", "queued")]


def train_request(
    folder: Path, sweep: SweepSpec, run: RunSpec, parent: str | None = None, uri: str | None = None
) -> TrainRequest:
    """The `msc train` that starts or resumes a run. parent, uri: the MLflow run to be shown under, and its store."""
    own = folder / run.name
    if (own / "config.yaml").is_file():
        return TrainRequest(own, resume=True)
    tracking = [f"metrics.parent={parent}"] if parent else []
    tracking += [f"metrics.tracking_uri={uri}"] if uri else []
    return TrainRequest(own, sweep.config, (*run.overrides, *tracking), sweep.preset)


def command(
    folder: Path, sweep: SweepSpec, run: RunSpec, parent: str | None = None, uri: str | None = None
) -> list[str]:
    request = replace(train_request(folder, sweep, run, parent, uri), processes=sweep.processes)
    return launcher.msc_command(request.command_line())


@dataclass
class RunProcess:
    run: RunSpec
    popen: subprocess.Popen[bytes]
    began: float
    lock: int
    gpus: str  # CUDA_VISIBLE_DEVICES; "": inherited


def run_all(folder: Path, sweep: SweepSpec, jobs: int = 1) -> int:
    """Run what is pending, `jobs` at a time on GPUs of their own, until each had one attempt. Returns an exit code.

    Several of these may work on one folder: a run belongs to the process that locks it first. Signals are forwarded
    to the runs, which save and stop; the same command resumes the sweep.
    """
    free = launcher.gpu_shares(os.environ, jobs, sweep.processes)
    sweep = register_runs(folder, sweep)
    tracker, uri = start_parent_run(folder, sweep)
    waiting, running, failed = pending(folder, sweep), list[RunProcess](), 0
    log.info(f"{len(sweep.runs)} runs, {len(sweep.runs) - len(waiting)} of them done or under way; {folder}")
    with collect_signals() as received:
        forwarded: set[int] = set()
        while waiting or running:
            while waiting and free and not received:
                run = waiting.pop(0)
                if (lock := lock_run(folder, run)) is None:
                    continue  # another sweep on this folder was quicker
                if state_on_disk(folder, sweep, run) == "finished":
                    os.close(lock)
                    continue
                running.append(start(folder, sweep, run, jobs, lock, tracker.run_id, uri, free.pop(0)))
            for number in set(received) - forwarded:
                forwarded.add(number)
                for process in running:
                    process.popen.send_signal(number)  # to it alone: its loader workers must live until it has saved
            if received.count(signal.SIGINT) > 1:
                for process in running:
                    process.popen.kill()
            for process in [process for process in running if process.popen.poll() is not None]:
                running.remove(process)
                free.append(process.gpus)
                failed += record_end(folder, process) not in (0, REQUEUE)
                log.info(f"{process.run.name}: {describe_outcome(folder, sweep, process)}")
            if received and not running:
                break
            time.sleep(0.1)
    tracker.finish("KILLED" if received else "FAILED" if failed else "FINISHED")
    if received:
        return REQUEUE if signal.SIGINT not in received else INTERRUPTED
    return 1 if failed else 0


def start_parent_run(folder: Path, sweep: SweepSpec) -> tuple[Tracker, str | None]:
    """The MLflow run that all runs of the sweep are shown under, and the store that it is in, if there is one. A user's
    name and password are not in its address: anybody may read words of a command, and runs inherit the environment."""
    tracker = Tracker(sweep.configured(sweep.runs[0]).metrics)
    tracker.start(folder, {"runs": len(sweep.runs)}, dump(sweep.base()), folder.name)
    tracker.tags({"msc.sweep": folder.name})
    tracker.flush()
    if tracker.config.tracking_uri == "none":
        return tracker, None
    if tracker.run_id is None:
        log.info("MLflow does not answer; the runs will not be shown under one parent")
    return tracker, without_credentials(tracker.config.resolve(folder))


def start(
    folder: Path, sweep: SweepSpec, run: RunSpec, jobs: int, lock: int, parent: str | None, uri: str | None, gpus: str
) -> RunProcess:
    log = folder / "logs" / f"{run.name}.log"
    cores = len(os.sched_getaffinity(0)) // jobs
    threads = {"OMP_NUM_THREADS": str(max(1, cores // sweep.processes))}
    environment = {**threads, **os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command(folder, sweep, run, parent, uri), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True, preexec_fn=launcher.die_with_parent(),
        )  # fmt: skip
    return RunProcess(run, process, time.time(), lock, gpus)


def record_end(folder: Path, process: RunProcess) -> int:
    """Append the attempt to attempts.jsonl and unlock the run."""
    code = process.popen.wait()
    entry = {
        "run": process.run.name,
        "code": code,
        "began": process.began,
        "seconds": round(time.time() - process.began, 1),
    }
    append_jsonl(folder / "attempts.jsonl", entry, required=True)
    os.close(process.lock)
    return code


def describe_outcome(folder: Path, sweep: SweepSpec, process: RunProcess) -> str:
    now = state(folder, sweep, process.run)
    if now == "finished":
        loss = last_jsonl_record(folder / process.run.name / "held_out.jsonl").get("mean")
        loss = last_loss(folder / process.run.name) if loss is None else loss
        return f"finished in {time.time() - process.began:.0f} s, loss {loss:.4f}"
    log = folder / "logs" / f"{process.run.name}.log"
    words = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
    return f"{now} (exit code {process.popen.returncode}): {words[0]}; see {log}"


# One process per run, also of several sweeps on one folder ------------------------------------------------


def lock_run(folder: Path, run: RunSpec) -> int | None:
    """Lock a run until the descriptor is closed or this process ends; None if another process holds it."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "logs" / f"{run.name}.lock", os.O_CREAT | os.O_RDWR, 0o666)
    for _ in range(3):  # `is_locked` of another process holds it for a moment
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            time.sleep(0.02)
    os.close(lock)
    return None


def is_locked(folder: Path, run: RunSpec) -> bool:
    if not (folder / "logs" / f"{run.name}.lock").exists():
        return False
    lock = lock_run(folder, run)
    if lock is not None:
        os.close(lock)
    return lock is None


# What to show ---------------------------------------------------------------------------------------------


def table(folder: Path, sweep: SweepSpec) -> str:
    """State, progress and losses of every run."""
    if not (folder / "sweep.json").is_file():
        raise FileNotFoundError(f"{folder} holds no sweep yet; start it with msc sweep FILE")
    sweep = with_recorded_names(folder, sweep, recorded_runs(folder))
    rows = [["run", "state", "clips", "loss", "held out", "seconds"]]
    counts: dict[str, int] = {}
    try:
        queue = slurm_states(folder, sweep)
    except ConnectionError as error:
        queue = {}
        log.info(f"{error}; states are those of the run folders")
    for run in sweep.runs:
        own, now = folder / run.name, state(folder, sweep, run, queue)
        counts[now] = counts.get(now, 0) + 1
        line, clips = last_jsonl_record(own / "log.jsonl"), sweep.configured(run).train.clips
        spent = sum(attempt["seconds"] for attempt in attempts(folder, run))
        held_out = last_jsonl_record(own / "held_out.jsonl").get("mean")
        numbers = (f"{value:.4f}" if value is not None else "" for value in (line.get("loss"), held_out))
        rows.append([run.name, now, f"{line.get('clock', 0)}/{clips}", *numbers, f"{spent:.0f}"])
    summary = ", ".join(f"{number} {name}" for name, number in counts.items())
    return f"{text_table(rows[1:], rows[0], align='<<>')}\n{summary}"


def last_loss(run: Path) -> float:
    loss = last_jsonl_record(run / "log.jsonl").get("loss")
    return math.nan if loss is None else float(loss)


def attempts(folder: Path, run: RunSpec) -> list[dict[str, Any]]:
    """Every start of a run that has come to an end, here or as a job, oldest first."""
    here = [attempt for attempt in read_jsonl(folder / "attempts.jsonl") if attempt["run"] == run.name]
    jobs = job_records.training_attempts(folder / run.name / "jobs")
    return sorted([*here, *jobs], key=lambda attempt: attempt["began"])


def last_code(folder: Path, run: RunSpec) -> int | None:
    return found[-1]["code"] if (found := attempts(folder, run)) else None
