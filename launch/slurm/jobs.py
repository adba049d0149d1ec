"""`msc status`, `msc logs`, `msc cancel`: what files and Slurm say of a run. Only `cancel` ends anything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.files import last_jsonl_record
from msc.datasets.text_table import text_table
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.tracking import heartbeat

from .. import commands
from . import job_records, sbatch
from .job_records import Record
from .sbatch import State
from .submit import part_log, process_of, still_active

STANDS = 120.0  # seconds in one phase after which that is worth saying
CANCEL_SECONDS = 90  # Slurm sends SIGKILL KillWait (30) seconds after SIGTERM
ASK_SECONDS = 5  # between questions to Slurm, which answers everybody on the cluster


@dataclass(frozen=True)
class Facts:
    """What a run folder says. clips, batch: of its configuration. line: the last report. saved: (step, clock, time) of
    the newest checkpoint."""

    run: Path
    clips: int = 0
    batch: int = 1
    line: Mapping[str, Any] | None = None
    beat: Mapping[str, Any] | None = None
    saved: tuple[int, int, float] | None = None
    record: Record | None = None


def read(run: Path) -> Facts:
    """ValueError if `run` is neither a run folder nor one with jobs."""
    jobs = job_records.folder(run)
    records = job_records.trainings(jobs) or job_records.records(jobs)
    record = records[-1] if records else None
    config = run / "config.yaml"
    if not config.is_file():
        if record is None:
            raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml, and no job was sent for it")
        return Facts(run, record=record)
    train = yaml.safe_load(config.read_text())["train"]
    saved = None
    for path in checkpoint_directory.resume_candidates(run)[:1]:
        try:
            meta = checkpoint_directory.CheckpointMeta.read(path)
            saved = meta.step, meta.clock, (path / "meta.json").stat().st_mtime
        except (ValueError, OSError):  # being pruned, or damaged
            pass
    beat = heartbeat.read(run) or None
    return Facts(run, train["clips"], train["batch"], last_jsonl_record(run / "log.jsonl"), beat, saved, record)


def state(facts: Facts, queue: Sequence[State], alive: bool, now: float) -> str:
    """One phrase on what the run is doing. queue: what Slurm says of its job; alive: its process, for a local one."""
    record, beat = facts.record, facts.beat
    if facts.saved is not None and facts.saved[1] >= facts.clips and not (beat and heartbeat.is_fresh(beat, now)):
        return "FINISHED"
    if record is not None and record.cluster == "slurm" and queue:
        if len(queue) > 1:
            return ", ".join(f"{count} {name}" for name, count in sorted(Counter(s.name for s in queue).items()))
        found = queue[0]
        if found.name == "PENDING":
            start = f", starts {found.start}" if found.start else ""
            return f"PENDING ({found.reason}{start})"
        if found.name != "RUNNING":
            return found.name + (f" (exit {found.exit})" if found.exit not in ("", "0:0") else "")
    lives = beat is not None and heartbeat.is_fresh(beat, now)
    if beat is None or (not lives and beat["phase"] == heartbeat.ENDED):
        waiting = alive or any(s.name == "RUNNING" for s in queue)
        return "STARTING" if waiting else "STOPPED" if facts.saved or beat else "NOT STARTED"
    if not lives:
        return f"LOST (silent for {duration(now - beat['time'])} in step {beat['step']}, {beat['phase']})"
    if beat["phase"] == "starting":
        return "STARTING"
    stands = now - beat["since"]
    return "RUNNING" + (f" ({beat['phase']} for {duration(stands)})" if stands > STANDS else "")


def row(facts: Facts, word: str, now: float) -> list[str]:
    line, saved = facts.line or {}, facts.saved
    step = max(line.get("step", 0), saved[0] if saved else 0)
    clock = max(line.get("clock", 0), saved[1] if saved else 0)
    steps = -(-facts.clips // facts.batch)
    running = word.startswith("RUNNING") and line.get("clips_per_s")
    return [
        str(facts.run),
        f"{facts.record.id}" if facts.record else "-",
        f"{step:,}/{steps:,}" if facts.clips else "-",
        f"{line['loss']:.4f}" if "loss" in line else "-",
        f"{line['tokens_per_s']:,.0f}" if running else "-",
        duration((facts.clips - clock) / line["clips_per_s"]) if running else "-",
        f"step {saved[0]:,}, {duration(now - saved[2])} ago" if saved else "-",
        word,
    ]


def duration(seconds: float) -> str:
    """As `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{max(0, int(seconds))} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


HEAD = ["run", "job", "step", "loss", "tokens/s", "left", "checkpoint", "state"]


def table(runs: Sequence[Path]) -> str:
    all_facts = [read(run) for run in runs]
    numbers = [f.record.id for f in all_facts if f.record is not None and f.record.cluster == "slurm"]
    try:
        queue = sbatch.states(numbers)
    except ConnectionError as error:
        queue = {}
        commands.said(f"{error}; states are those of the run folders")
    now, rows = time.time(), [HEAD]
    for facts in all_facts:
        alive = facts.record is not None and process_of(facts.record) is not None
        rows.append(row(facts, state(facts, queue.get(facts.record.id, []) if facts.record else [], alive, now), now))
    return text_table(rows)


def runs_here() -> list[Path]:
    found = sorted(path.parent for path in Path("runs").glob("*/config.yaml"))
    if not found:
        raise FileNotFoundError("there is no run in runs/: name run folders")
    return found


# Logs -----------------------------------------------------------------------------------------------------


def log_of(run: Path, rank: int | None) -> Path:
    """Where a rank of the last job writes, or a part of the last conversion; FileNotFoundError says what there is."""
    records = job_records.records(job_records.folder(run))
    arrays = [record for record in records if record.parts]
    if arrays and rank is not None:
        path = Path(part_log(arrays[-1], rank))
    elif rank:
        path = run / "logs" / f"rank_{rank}.log"
    elif records:
        path = Path(records[-1].log)
    else:
        raise FileNotFoundError(f"{run} has no job: rank 0 of `msc train` writes to its terminal")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in (run / "logs").glob("rank_*.log"))) or "none"
        raise FileNotFoundError(f"{path} is not there (yet); logs of other ranks: {there}")
    return path


def show_log(run: Path, rank: int | None, follow: bool, lines: int) -> None:
    with log_of(run, rank).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 1000 * lines))
        sys.stdout.buffer.write(b"".join(log.read().splitlines(keepends=True)[-lines:]))
        sys.stdout.flush()
        while follow:
            if new := log.read():
                sys.stdout.buffer.write(new)
                sys.stdout.flush()
            else:
                time.sleep(0.5)


# Ending ---------------------------------------------------------------------------------------------------


def is_left_elsewhere(jobs: Path, record: Record) -> bool:
    """Whether a job went into the background of another machine, and its end was not written down."""
    if record.cluster == "slurm" or record.host == os.uname().nodename:
        return False
    last = (job_records.notes(jobs, record.id) or [{}])[-1]
    return last.get("verdict", "again") == "again"


def cancel(run: Path) -> str:
    """End the jobs of a run that are still in the queue or alive, wait until they are gone; what was done, as text."""
    jobs = job_records.folder(run)
    active = still_active(job_records.records(jobs))
    if not active:
        if others := [record for record in job_records.records(jobs) if is_left_elsewhere(jobs, record)]:
            raise ValueError(
                f"job {others[-1].id} of {run} was started on {others[-1].host}, and no sign of its end is here: "
                "use `msc cancel` there"
            )
        raise ValueError(f"no job of {run} is in the queue or running")
    for record in active:
        if record.cluster == "slurm":
            if shutil.which("scancel") is None:
                raise ValueError(f"job {record.id} is Slurm's, but there is no scancel here")
            subprocess.run(["scancel", record.id], check=True)
        elif (process := process_of(record)) is not None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + CANCEL_SECONDS
    pause = ASK_SECONDS if any(record.cluster == "slurm" for record in active) else 1
    while (left := still_active(active)) and time.monotonic() < until:
        time.sleep(pause)
    if left:
        return f"told to end, but not gone yet: {', '.join(record.id for record in left)}"
    ended = f"ended: {', '.join(record.id for record in active)}"
    if any(record.words[0] == "train" for record in active):
        from msc.pretrain.tracking.tracker import end_mlflow_run

        if end_mlflow_run(run, "KILLED"):
            ended += "; its MLflow run, which was left RUNNING, is now KILLED"
    return ended
