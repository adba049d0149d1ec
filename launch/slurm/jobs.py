"""Jobs of run folders: `msc status`, `msc logs` and `msc cancel`, from files, processes and Slurm."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.files import last_jsonl_record
from msc.datasets.text_table import text_table
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.tracking import heartbeat
from msc.pretrain.tracking.tracker import end_mlflow_run

from . import job_records, sbatch
from .job_records import JobRecord
from .sbatch import JobState
from .submit import active_records, part_log, process_of

log = logging.getLogger(__name__)

LONG_PHASE = 120.0  # seconds in one phase after which it is shown
CANCEL_SECONDS = 90  # Slurm sends SIGKILL KillWait (30) seconds after SIGTERM
POLL_SECONDS = 5  # between questions to Slurm, which answers everybody on the cluster


@dataclass(frozen=True)
class RunStatus:
    """What the files of a run folder say. clips, batch: of its configuration. line: the last report. saved: (step,
    clock, time) of the newest checkpoint. record: its newest job."""

    run: Path
    clips: int = 0
    batch: int = 1
    line: Mapping[str, Any] | None = None
    heartbeat: Mapping[str, Any] | None = None
    saved: tuple[int, int, float] | None = None
    record: JobRecord | None = None


def read_status(run: Path, last: Mapping[str, Any]) -> RunStatus:
    """FileNotFoundError if `run` is neither a run folder nor one with jobs."""
    jobs = job_records.jobs_folder(run)
    records = job_records.training_records(jobs) or job_records.read_records(jobs)
    record = records[-1] if records else None
    folder = RunFolder(run)
    if not folder.exists():
        if record is None:
            raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml, and no job was sent for it")
        return RunStatus(run, record=record)
    train = yaml.safe_load(folder.config.read_text())["train"]
    saved = None
    for path in checkpoint_directory.resume_candidates(run)[:1]:
        with suppress(ValueError, OSError):  # being pruned, or damaged
            meta = checkpoint_directory.CheckpointMeta.read(path)
            saved = meta.step, meta.clock, (path / "meta.json").stat().st_mtime
    return RunStatus(run, train["clips"], train["batch"], last_jsonl_record(folder.log), last or None, saved, record)


def describe_state(status: RunStatus, queue: Sequence[JobState], alive: bool, now: float) -> str:
    """One phrase on what the run is doing. queue: what Slurm says of its job; alive: its process, for a local one."""
    record, last = status.record, status.heartbeat
    fresh = last is not None and heartbeat.is_recent(last, now)
    if status.saved is not None and status.saved[1] >= status.clips and not fresh:
        return "FINISHED"
    if record is not None and record.cluster == "slurm" and queue:
        if len(queue) > 1:
            return ", ".join(f"{count} {name}" for name, count in sorted(Counter(s.name for s in queue).items()))
        job = queue[0]
        if job.name == "PENDING":
            return f"PENDING ({job.reason}{f', starts {job.start}' if job.start else ''})"
        if job.name != "RUNNING":
            return job.name + (f" (exit {job.exit})" if job.exit not in ("", "0:0") else "")
    if last is None or (not fresh and last["phase"] == heartbeat.ENDED):
        waiting = alive or any(s.name == "RUNNING" for s in queue)
        return "STARTING" if waiting else "STOPPED" if status.saved or last else "NOT STARTED"
    if not fresh:
        return f"LOST (silent for {duration(now - last['time'])} in step {last['step']}, {last['phase']})"
    if last["phase"] == "starting":
        return "STARTING"
    seconds = now - last["since"]
    return "RUNNING" + (f" ({last['phase']} for {duration(seconds)})" if seconds > LONG_PHASE else "")


HEADER = ["run", "job", "step", "loss", "tokens/s", "left", "checkpoint", "state"]


def table_row(status: RunStatus, state: str, now: float) -> list[str]:
    line, saved = status.line or {}, status.saved
    step = max(line.get("step", 0), saved[0] if saved else 0)
    clock = max(line.get("clock", 0), saved[1] if saved else 0)
    running = state.startswith("RUNNING") and line.get("clips_per_s")
    return [
        str(status.run),
        status.record.id if status.record else "-",
        f"{step:,}/{-(-status.clips // status.batch):,}" if status.clips else "-",
        f"{line['loss']:.4f}" if line.get("loss") is not None else "-",
        f"{line['tokens_per_s']:,.0f}" if running else "-",
        duration((status.clips - clock) / line["clips_per_s"]) if running else "-",
        f"step {saved[0]:,}, {duration(now - saved[2])} ago" if saved else "-",
        state,
    ]


def duration(seconds: float) -> str:
    """As `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{max(0, int(seconds))} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def status_table(runs: Sequence[Path]) -> str:
    """The table of `msc status`, by default of the runs in runs/."""
    runs = runs or sorted(path.parent for path in Path("runs").glob("*/config.yaml"))
    if not runs:
        raise FileNotFoundError("there is no run in runs/: name run folders")
    statuses = list(map(read_status, runs, heartbeat.read_with_own_clock(runs)))
    slurm_jobs = [s.record.id for s in statuses if s.record is not None and s.record.cluster == "slurm"]
    try:
        queue = sbatch.job_states(slurm_jobs)
    except ConnectionError as error:
        queue = {}
        log.warning(f"{error}; states are those of the run folders")
    now, rows = time.time(), []
    for status in statuses:
        alive = status.record is not None and process_of(status.record) is not None
        states = queue.get(status.record.id, []) if status.record else []
        rows.append(table_row(status, describe_state(status, states, alive, now), now))
    return text_table(rows, HEADER)


def show_log(run: Path, rank: int | None, follow: bool, lines: int) -> None:
    """Print what a rank of the last job wrote, or a part of the last conversion; FileNotFoundError if nothing."""
    records = job_records.read_records(job_records.jobs_folder(run))
    arrays = [record for record in records if record.parts]
    if arrays and rank is not None:
        path = Path(part_log(arrays[-1], rank))
    elif rank:
        path = RunFolder(run).rank_log(rank)
    elif records:
        path = Path(records[-1].log)
    else:
        raise FileNotFoundError(f"{run} has no job: rank 0 of `msc train` writes to its terminal")
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in RunFolder(run).logs.glob("rank_*.log"))) or "none"
        raise FileNotFoundError(f"{path} is not there (yet); logs of other ranks: {others}")
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000 * lines))
        text = b"".join(file.read().splitlines(keepends=True)[-lines:])
        while True:
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
            if not follow:
                return
            while not (text := file.read()):
                time.sleep(0.5)


def cancel(run: Path) -> str:
    """End the jobs of a run that are in the queue or alive, and wait until they are gone; returns a report."""
    jobs = job_records.jobs_folder(run)
    records = job_records.read_records(jobs)
    active = active_records(records)
    for record in reversed(records if not active else ()):
        last = (job_records.read_events(jobs, record.id) or [{}])[-1]
        local, ended = record.host == os.uname().nodename, last.get("verdict", "again") != "again"
        if record.cluster != "slurm" and not local and not ended:
            raise ValueError(
                f"job {record.id} of {run} was started on {record.host}, and no sign of its end is here: use "
                "`msc cancel` there"
            )
    if not active:
        raise ValueError(f"no job of {run} is in the queue or running")
    for record in active:
        if record.cluster == "slurm":
            if shutil.which("scancel") is None:
                raise ValueError(f"job {record.id} is Slurm's, but there is no scancel here")
            subprocess.run(["scancel", record.id], check=True)
        elif (process := process_of(record)) is not None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + CANCEL_SECONDS
    pause = POLL_SECONDS if any(record.cluster == "slurm" for record in active) else 1
    while (remaining := active_records(active)) and time.monotonic() < deadline:
        time.sleep(pause)
    if remaining:
        return f"signalled, but not gone yet: {', '.join(record.id for record in remaining)}"
    report = f"ended: {', '.join(record.id for record in active)}"
    if any(record.arguments[0] == "train" for record in active) and end_mlflow_run(run, "KILLED"):
        report += "; its MLflow run, which was left RUNNING, is now KILLED"
    return report
