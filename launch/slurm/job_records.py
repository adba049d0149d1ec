"""The jobs of a run folder: what was sent where, and what became of its starts. Files only.

    RUN/jobs/ID.json          a submission (Record)
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
from pathlib import Path
from typing import Any, Literal

from msc.datasets.files import append_jsonl, read_jsonl, write_atomically

Cluster = Literal["slurm", "local", "debug"]


@dataclass(frozen=True)
class Record:
    """A submission. id: Slurm's job number, or the process id. created: when that process started. words: of msc.
    code: version and commit that it was sent with."""

    id: str
    cluster: Cluster
    words: tuple[str, ...]
    log: str
    tasks: int = 1
    parts: int = 0
    submitted: float = field(default_factory=time.time)
    host: str = field(default_factory=socket.gethostname)
    created: float = 0.0
    code: dict[str, str] = field(default_factory=dict)


def folder(run: Path) -> Path:
    """Where the jobs of a run folder, or of a folder of shards, are described."""
    beside = run.with_name(f"{run.name}.jobs")
    return run / "jobs" if (run / "jobs").is_dir() or not beside.is_dir() else beside


def write(jobs: Path, record: Record) -> None:
    jobs.mkdir(parents=True, exist_ok=True)
    write_atomically(jobs / f"{record.id}.json", json.dumps(asdict(record), indent=1).encode())


def records(jobs: Path) -> list[Record]:
    """All submissions, oldest first; files that are not ours are passed over."""
    found = []
    for path in jobs.glob("*.json") if jobs.is_dir() else ():
        try:
            values = json.loads(path.read_text())
            found.append(Record(**{**values, "words": tuple(values["words"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(found, key=lambda record: record.submitted)


def trainings(jobs: Path) -> list[Record]:
    """`records` of the jobs that train: the run's evaluations, samples and exports lie in the same folder."""
    return [record for record in records(jobs) if record.words[0] == "train"]


# Starts ---------------------------------------------------------------------------------------------------


def note(jobs: Path, job: str, **facts: Any) -> None:
    """Append a line on a start of `job`, written before anything else happens."""
    jobs.mkdir(parents=True, exist_ok=True)
    append_jsonl(jobs / f"{job}.starts.jsonl", {"time": time.time(), **facts}, required=True)


def notes(jobs: Path, job: str) -> list[dict[str, Any]]:
    return read_jsonl(jobs / f"{job}.starts.jsonl")


def ended(jobs: Path) -> list[dict[str, Any]]:
    """Every start of training that has come to an end: its exit `code`, when it `began`, and its `seconds`."""
    found = []
    for record in trainings(jobs):
        began = None
        for line in notes(jobs, record.id):
            if "from" in line:
                began = line["time"]
            elif began is not None:
                found.append({"code": line["code"], "began": began, "seconds": line["time"] - began})
    return sorted(found, key=lambda start: start["began"])


def fruitless(starts: Sequence[int], reached: int) -> int:
    """How many of the last starts began where the work still is: at `reached`, in clips or whatever grows with it."""
    count = 0
    while count < len(starts) and starts[-1 - count] == reached:
        count += 1
    return count
