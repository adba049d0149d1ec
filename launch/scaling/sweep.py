"""Sweep: a folder with the runs of a sweep file, which are trained on this machine and tabulated by state.

A sweep folder holds the runs' folders, `sweep.json` (which runs, with which settings), `attempts.jsonl` (the end of
each attempt) and `logs/`. The state of a run is read from its own folder, whoever trained it: `Sweep.pending` lists the
runs that need a process, `train_request` is what that trains, here or in an array of Slurm jobs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TextIO

from msc.datasets.errors import INTERRUPTED, REQUEUE
from msc.datasets.files import append_jsonl, last_jsonl_record, locked, read_jsonl, try_lock, write_atomically
from msc.datasets.text_table import text_table
from msc.parallel.signals import collect_signals
from msc.pretrain.config import Config, dump, flat, load
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.tracking import tracker as tracking
from msc.pretrain.tracking.mlflow_store import without_credentials
from msc.pretrain.tracking.tracker import Tracker

from ..processes import launcher
from ..processes.train_request import TrainRequest
from ..slurm import job_records, sbatch, submit
from ..slurm.cluster_config import JobRequest
from .sweep_spec import RunSpec, SweepSpec

log = logging.getLogger(__name__)

State = Literal["finished", "running", "queued", "failed", "stopped", "waiting"]


@dataclass
class Sweep:
    """parent, uri: the MLflow run that the runs are shown under, and its store; of `start_parent_run`."""

    folder: Path
    spec: SweepSpec
    parent: str | None = None
    uri: str | None = None

    def of(self, run: RunSpec) -> RunFolder:
        return RunFolder(self.folder / run.name)

    # Names --------------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Record the runs in sweep.json, under the names that they have there already. ValueError if a recorded name is
        of another run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "sweep.lock"):
            self.adopt_recorded_names()
            recorded = self.recorded() | {run.name: run.settings for run in self.spec.runs}
            write_atomically(self.folder / "sweep.json", json.dumps(recorded, indent=1).encode())

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The runs in sweep.json, with their settings over the base."""
        path = self.folder / "sweep.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def adopt_recorded_names(self) -> None:
        """Rename the runs that the folder has under other names: a name holds only what varies, so one more key in a
        grid changes every name, also of runs whose settings are unchanged. ValueError if a recorded name is of another
        run."""
        recorded, runs = self.recorded(), self.spec.runs
        names = {run.name: run.name for run in runs if recorded.get(run.name) == run.settings}
        others = {}
        for name in reversed(recorded) if len(names) < len(runs) else ():
            if name not in names:
                own = RunFolder(self.folder / name)  # once it has begun that counts, whatever the base says today
                with suppress(ValueError):  # it goes with another base, or another version
                    config = (
                        load(file=own.config) if own.exists() else self.spec.resolved(RunSpec(name, recorded[name]))
                    )
                    others[identity(config)] = name
        for run in runs:
            if others and run.name not in names and (name := others.pop(identity(self.spec.resolved(run)), "")):
                names[run.name] = name
        for run in runs:
            taken = self.of(run).path.exists() or run.name in names.values()
            if run.name in recorded and run.name not in names and taken:
                old, new = recorded[run.name], run.settings
                key = min(key for key in old | new if old.get(key, ...) != new.get(key, ...))
                raise ValueError(
                    f"{self.of(run).path} has {key} = {old.get(key)}, the sweep file now says {new.get(key)}; put what "
                    "is new behind what was there, use another --out, or remove that folder"
                )
        self.spec = replace(self.spec, runs=tuple(replace(run, name=names.get(run.name, run.name)) for run in runs))

    # States -------------------------------------------------------------------------------------------------

    def state(self, run: RunSpec, queue: Mapping[str, sbatch.JobState] = MappingProxyType({})) -> State:
        """Where a run stands: finished means trained to its last clip, and evaluated if it is to be. queue: of
        `slurm_states`."""
        if (job := queue.get(run.name)) is not None and job.active:
            return "queued" if job.name == "PENDING" else "running"
        return "running" if self.is_locked(run) else self.state_on_disk(run)

    def slurm_states(self) -> dict[str, sbatch.JobState]:
        """Slurm's states of the submitted runs, from one query. ConnectionError if Slurm does not answer."""
        sent = {}
        for run in self.spec.runs:
            if records := [r for r in job_records.training_records(self.of(run).jobs) if r.cluster == "slurm"]:
                sent[run.name] = records[-1].id
        states = sbatch.job_states(list(sent.values()))
        return {name: states[number][0] for name, number in sent.items() if number in states}

    def state_on_disk(self, run: RunSpec) -> State:
        """`state` of a run that no process is training."""
        train, own = self.spec.configured(run).train, self.of(run)
        clock, held_out = (last_jsonl_record(path).get("clock", 0) for path in (own.log, own.held_out))
        if clock >= train.clips and (held_out >= train.clips or not train.evaluate):
            return "finished"
        code = attempts[-1]["code"] if (attempts := self.attempts(run)) else None
        if code not in (None, 0, REQUEUE):
            return "failed"
        return "stopped" if own.path.exists() or code is not None else "waiting"

    def attempts(self, run: RunSpec) -> list[dict[str, Any]]:
        """Every start of a run that has come to an end, here or as a job, oldest first."""
        here = [attempt for attempt in read_jsonl(self.folder / "attempts.jsonl") if attempt["run"] == run.name]
        return sorted([*here, *job_records.training_attempts(self.of(run).jobs)], key=lambda one: one["began"])

    def pending(self) -> list[RunSpec]:
        """The runs that need a process: neither finished, running nor queued."""
        queue = self.slurm_states()
        return [run for run in self.spec.runs if self.state(run, queue) not in ("finished", "running", "queued")]

    # One process per run, also of several sweeps on one folder

    def lock(self, run: RunSpec) -> TextIO | None:
        """Lock a run until the file is closed or this process ends; None if another process holds it."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "logs" / f"{run.name}.lock").open("a+")
        for _ in range(3):  # `is_locked` of another process holds it for a moment
            if try_lock(lock):
                return lock
            time.sleep(0.02)
        lock.close()
        return None

    def is_locked(self, run: RunSpec) -> bool:
        if not (self.folder / "logs" / f"{run.name}.lock").exists():
            return False
        if (lock := self.lock(run)) is None:
            return True
        lock.close()
        return False

    # Training -----------------------------------------------------------------------------------------------

    def start_parent_run(self) -> Tracker:
        """Start the MLflow run that all runs of the sweep are shown under. A user's name and password are not in `uri`:
        anybody may read words of a command, and runs inherit the environment."""
        tracker = Tracker(self.spec.configured(self.spec.runs[0]).metrics)
        tracker.start(self.folder, {"runs": len(self.spec.runs)}, dump(self.spec.base()), self.folder.name)
        tracker.tags({"msc.sweep": self.folder.name})
        tracker.flush()
        if tracker.config.tracking_uri != "none":
            self.parent, self.uri = tracker.run_id, without_credentials(tracker.config.resolve(self.folder))
            if self.parent is None:
                log.info("MLflow does not answer; the runs will not be shown under one parent")
        return tracker

    def train_request(self, run: RunSpec) -> TrainRequest:
        """The `msc train` that starts or resumes a run."""
        if self.of(run).exists():
            return TrainRequest(self.of(run).path, resume=True)
        tracking = {"metrics.parent": self.parent, "metrics.tracking_uri": self.uri}
        overrides = [*run.overrides, *(f"{key}={value}" for key, value in tracking.items() if value)]
        return TrainRequest(self.of(run).path, self.spec.config, tuple(overrides), self.spec.preset)

    def command(self, run: RunSpec) -> list[str]:
        request = replace(self.train_request(run), processes=self.spec.processes)
        return launcher.msc_command(request.command_line())

    def start(self, run: RunSpec, lock: TextIO, gpus: str, jobs: int) -> RunProcess:
        """Start the process of a run, one of `jobs` at a time on this machine."""
        threads = {"OMP_NUM_THREADS": launcher.cores_each(jobs * self.spec.processes)}
        environment = {**threads, **launcher.process_environment(os.environ)}
        environment |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        with self.log_of(run).open("ab") as out:
            process = subprocess.Popen(
                self.command(run), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True, preexec_fn=launcher.die_with_parent(),
            )  # fmt: skip
        return RunProcess(run, process, time.time(), lock, gpus)

    def record_end(self, process: RunProcess) -> int:
        """Append the attempt to attempts.jsonl, unlock the run and report how it ended; its exit code."""
        run, code, seconds = process.run, process.popen.wait(), time.time() - process.began
        entry = {"run": run.name, "code": code, "began": process.began, "seconds": round(seconds, 1)}
        append_jsonl(self.folder / "attempts.jsonl", entry, required=True)
        process.lock.close()
        if (state := self.state(run)) == "finished":
            loss = last_jsonl_record(self.of(run).log).get("loss")
            loss = last_jsonl_record(self.of(run).held_out).get("mean", loss)
            shown = "not finite" if loss is None else f"{loss:.4f}"  # JSON has no NaN
            log.info(f"{run.name}: finished in {seconds:.0f} s, loss {shown}")
        else:
            output = self.log_of(run).read_text(errors="replace").strip().splitlines() or ["no output"]
            log.info(f"{run.name}: {state} (exit code {code}): {output[-1]}; see {self.log_of(run)}")
        return code

    def log_of(self, run: RunSpec) -> Path:
        return self.folder / "logs" / f"{run.name}.log"


@dataclass
class RunProcess:
    run: RunSpec
    popen: subprocess.Popen[bytes]
    began: float
    lock: TextIO
    gpus: str  # CUDA_VISIBLE_DEVICES; "": inherited


def identity(config: Config) -> str:
    """Equal for runs with equal settings, whatever MLflow store they log to."""
    return json.dumps({key: value for key, value in flat(config).items() if not key.startswith("metrics.")})


def run_all(folder: Path, spec: SweepSpec, jobs: int = 1) -> int:
    """Run what is pending, `jobs` at a time on GPUs of their own, until each had one attempt. Returns an exit code.

    Several of these may work on one folder: a run belongs to the process that locks it first. Signals are forwarded
    to the runs, which save and stop; the same command resumes the sweep.
    """
    free = launcher.gpu_shares(os.environ, jobs, spec.processes)
    sweep = Sweep(folder, spec)
    sweep.register()
    tracker = sweep.start_parent_run()
    waiting, running, failed = sweep.pending(), list[RunProcess](), 0
    log.info(f"{len(spec.runs)} runs, {len(spec.runs) - len(waiting)} of them done or under way; {folder}")
    with collect_signals() as received:
        forwarded: set[int] = set()
        while running or (waiting and not received):
            while waiting and free and not received:
                run = waiting.pop(0)
                if (lock := sweep.lock(run)) is None:
                    continue  # another sweep on this folder was quicker
                if sweep.state_on_disk(run) == "finished":
                    lock.close()
                    continue
                running.append(sweep.start(run, lock, free.pop(0), jobs))
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
                failed += sweep.record_end(process) not in (0, REQUEUE)
            time.sleep(0.1)
    tracker.finish("KILLED" if received else "FAILED" if failed else "FINISHED")
    if received:
        return REQUEUE if signal.SIGINT not in received else INTERRUPTED
    return 1 if failed else 0


def submit_sweep(folder: Path, spec: SweepSpec, file: Path, job_request: JobRequest, parallel: int = 0) -> int:
    """`msc sweep --cluster slurm`: an array, a job for every run that is neither finished nor under way; ValueError,
    and nothing submitted, if one is invalid. Each job is what `msc submit` sends for a single run, and recorded in the
    folders of the sweep and of the run."""
    config = job_request.cluster_config()
    if job_request.tasks_per_node is None and job_request.gpus_per_node is None:
        job_request = replace(job_request, tasks_per_node=max(1, spec.processes // (job_request.nodes or 1)))
    if (tasks := job_request.tasks) != spec.processes:
        raise ValueError(f"the sweep file says processes: {spec.processes}, but {tasks} tasks are asked for")
    folder = folder.absolute()
    sbatch.check_folder(folder)
    sweep = Sweep(folder, spec)
    sweep.register()
    with ExitStack() as locks:
        pending = [run for run in sweep.pending() if (lock := sweep.lock(run)) and locks.enter_context(lock)]
        if not pending:
            log.info("every run is finished or under way: nothing is sent")
            return 0
        new_folders = [sweep.of(run) for run in pending if not sweep.of(run).exists()]
        tracker = sweep.start_parent_run()
        end: tracking.State = "FAILED"
        try:
            requests = [sweep.train_request(run) for run in pending]
            parts = [submit.prepare_training(one, job_request, config, check_active=False) for one in requests]
            record = submit.submit_array(parts, folder / "jobs", folder.name, parallel=parallel)
        except (ValueError, OSError):
            for own in new_folders:  # their runs have not begun
                with suppress(OSError):
                    own.config.unlink()
                    own.path.rmdir()
            raise
        else:  # Slurm has it: whatever fails now, its number is known and the runs keep their folders
            sent = f"{len(pending)} of {len(spec.runs)} runs"
            log.info(f"job {record.id}: {sent}, others are finished or under way; {folder}")
            job_records.write_record(folder / "jobs", replace(record, arguments=("sweep", str(file))))
            for part, own_record in zip(parts, submit.part_records(record, parts), strict=True):
                job_records.write_record(Path(part.jobs), own_record)
            end = "FINISHED"
        finally:
            tracker.finish(end)
    return 0


def table(folder: Path, spec: SweepSpec) -> str:
    """State, progress and losses of every run."""
    if not (folder / "sweep.json").is_file():
        raise FileNotFoundError(f"{folder} holds no sweep yet; start it with msc sweep FILE")
    sweep = Sweep(folder, spec)
    sweep.adopt_recorded_names()
    try:
        queue = sweep.slurm_states()
    except ConnectionError as error:
        queue = {}
        log.info(f"{error}; states are those of the run folders")
    rows, counts = [], Counter[str]()
    for run in sweep.spec.runs:
        state, line = sweep.state(run, queue), last_jsonl_record(sweep.of(run).log)
        counts[state] += 1
        losses = line.get("loss"), last_jsonl_record(sweep.of(run).held_out).get("mean")
        numbers = (f"{value:.4f}" if value is not None else "" for value in losses)
        spent = sum(attempt["seconds"] for attempt in sweep.attempts(run))
        clips = f"{line.get('clock', 0)}/{spec.configured(run).train.clips}"
        rows.append([run.name, state, clips, *numbers, f"{spent:.0f}"])
    summary = ", ".join(f"{number} {name}" for name, number in counts.items())
    return f"{text_table(rows, ['run', 'state', 'clips', 'loss', 'held out', 'seconds'], align='<<>')}\n{summary}"
