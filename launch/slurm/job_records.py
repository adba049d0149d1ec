"""Job records of a run folder: what was submitted, and what became of every start. Files only, nothing of Slurm.

    RUN/jobs/ID.json          a submission (JobRecord)
    RUN/jobs/ID.starts.jsonl  one line when the job starts, one when its ranks have ended
    RUN/jobs/ID_0_log.out     what it printed: the job's own lines and rank 0's; the other ranks in RUN/logs/rank_N.log

`msc convert` makes its folder at the very end, so its jobs lie beside it, in OUT.jobs/.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from msc.datasets.files import append_jsonl, read_jsonl, write_atomically

from .cluster_config import Cluster


@dataclass(frozen=True)
class JobRecord:
    """A submission. id: Slurm's job number, or the process id. created: when that process started. arguments: of msc;
    "words" in the file. parts: of an array (0: a single job). code: version and commit that it was submitted with."""

    id: str
    cluster: Cluster
    arguments: tuple[str, ...]
    log: str
    tasks: int = 1
    parts: int = 0
    submitted: float = field(default_factory=time.time)
    host: str = field(default_factory=socket.gethostname)
    created: float = 0.0
    code: dict[str, str] = field(default_factory=dict)


def jobs_folder(run: Path) -> Path:
    """Where the jobs of a run folder, or of a folder of shards, are recorded."""
    beside = run.with_name(f"{run.name}.jobs")
    return run / "jobs" if (run / "jobs").is_dir() or not beside.is_dir() else beside


def write_record(jobs: Path, record: JobRecord) -> None:
    jobs.mkdir(parents=True, exist_ok=True)
    values = asdict(record)
    values["words"] = values.pop("arguments")
    write_atomically(jobs / f"{record.id}.json", json.dumps(values, indent=1).encode())


def read_records(jobs: Path) -> list[JobRecord]:
    """All submissions, oldest first; files that are not ours are ignored."""
    records = []
    for path in jobs.glob("*.json") if jobs.is_dir() else ():
        try:
            values = json.loads(path.read_text())
            records.append(JobRecord(arguments=tuple(values.pop("words")), **values))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(records, key=lambda record: record.submitted)


def training_records(jobs: Path) -> list[JobRecord]:
    """The jobs that train: the run's evaluations, samples and exports lie in the same folder."""
    return [record for record in read_records(jobs) if record.arguments[0] == "train"]


def append_event(jobs: Path, job: str, **facts: Any) -> None:
    """Append a line on a start of `job`, or on its end, and sync it."""
    jobs.mkdir(parents=True, exist_ok=True)
    append_jsonl(jobs / f"{job}.starts.jsonl", {"time": time.time(), **facts}, required=True)


def read_events(jobs: Path, job: str) -> list[dict[str, Any]]:
    """The lines of `append_event`: starts have "from", ends have "code"."""
    return read_jsonl(jobs / f"{job}.starts.jsonl")


def training_attempts(jobs: Path) -> list[dict[str, Any]]:
    """Every start of training that has come to an end: its exit `code`, when it `began`, and its `seconds`."""
    attempts = []
    for record in training_records(jobs):
        began = None
        for event in read_events(jobs, record.id):
            if "from" in event:
                began = event["time"]
            elif began is not None:
                attempts.append({"code": event["code"], "began": began, "seconds": event["time"] - began})
    return sorted(attempts, key=lambda attempt: attempt["began"])


def starts_without_progress(starts: Sequence[int], progress: int) -> int:
    """How many of the last starts began where the work still is. starts, progress: clips, or whatever grows with it."""
    return sum(1 for _ in takewhile(lambda start: start == progress, reversed(starts)))
