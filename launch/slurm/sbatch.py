"""To Slurm and back: sends jobs through submitit, asks squeue and sacct what became of them.

Nothing goes through a shell: programs get lists of words, and what submitit writes into its batch script is quoted by
it. Only what quoting cannot make harmless there is refused (`check_path`).
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cluster_config import Site, one_line
from .supervisor import Job, attend

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT")


@dataclass(frozen=True)
class State:
    """What Slurm says of a job. start: when it expects to start one that waits, as text."""

    name: str
    reason: str = ""
    start: str = ""
    exit: str = ""

    @property
    def active(self) -> bool:
        return self.name in ACTIVE


def check_path(folder: Path) -> None:
    """ValueError for paths that a batch script cannot hold: Slurm puts numbers for %, and reads a line as its own."""
    one_line(str(folder), "the folder")
    for sign in "%\\":
        if sign in str(folder):
            raise ValueError(f"the folder {str(folder)!r} has {sign!r} in it, which Slurm replaces: choose another")


def job_name(text: str) -> str:
    """A name for squeue's narrow columns and sacct's database."""
    return re.sub(r"[^\w.+-]", "_", text, flags=re.ASCII)[:60] or "msc"


def parameters(
    site: Site, name: str, nodes: int, tasks_per_node: int, gpus_per_node: int, dependency: str = "", parallel: int = 0
) -> dict[str, Any]:
    """What submitit's SlurmExecutor is told, for `site`, over which the command line has gone already."""
    extra = {option: value for option, value in site.sbatch.items() if value is not False}
    if dependency:
        extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    named: dict[str, Any] = {
        "partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint,
        "time": site.time, "mem": site.mem, "cpus_per_task": site.cpus_per_task, "gpus_per_node": gpus_per_node,
        "array_parallelism": parallel,
    }  # fmt: skip
    return {option: value for option, value in named.items() if value} | {
        "job_name": job_name(name),
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "wckey": None,  # submitit's own default is refused where such keys are checked
        "stderr_to_stdout": True,
        "use_srun": False,  # supervisor.py starts the ranks and looks after them
        "setup": ["export PYTHONSAFEPATH=1", *site.setup],
        # To the ranks, not to the batch script; USR1 for they may get TERM as well, and two of a kind end at once.
        "additional_parameters": {**extra, "signal": f"USR1@{site.signal_seconds}", "requeue": True},
    }


def send(jobs: Sequence[Job], folder: Path, options: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Submit one job, or several as an array; Slurm's number of it. ValueError says what sbatch had against it."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.SlurmExecutor(folder)
        # where nothing is said of it, submitit has at most 256 parts of an array run at once
        executor.update_parameters(**{"array_parallelism": len(jobs), **options})
        # sbatch hands the environment on to the job; nothing writes it down. What it says on stderr is raised, too.
        with added(environment), redirect_stderr(io.StringIO()):
            sent = [executor.submit(attend, jobs[0])] if len(jobs) == 1 else executor.map_array(attend, jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError("; ".join(line.strip() for line in str(error).splitlines()) or "sbatch failed") from None
    except RuntimeError as error:  # submitit's for a machine without Slurm
        raise ValueError(f"{error} Use --cluster local to run here") from None
    return str(sent[0].job_id).partition("_")[0]


@contextmanager
def added(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def states(numbers: Sequence[str]) -> dict[str, list[State]]:
    """What Slurm knows of jobs by their numbers: of an array a State for each part, of a part (`17_3`) its own; none
    for those it has forgotten. ConnectionError where it does not answer. One question for all, and of no other jobs."""
    if not numbers:
        return {}
    whole = ",".join(dict.fromkeys(number.partition("_")[0] for number in numbers))
    found: dict[str, list[State]] = {}

    def add(number: str, state: State) -> None:
        for name in {number, number.partition("_")[0]}:
            found.setdefault(name, []).append(state)

    for line in _ask(["squeue", "--noheader", "--array", "--states=all", f"--jobs={whole}", "--format=%i|%T|%r|%S"]):
        number, name, reason, start = line.split("|")
        add(number, State(name, reason if reason != "None" else "", start if start != "N/A" else ""))
    if missing := [number for number in numbers if number not in found]:
        what = ["--format=JobID,State,ExitCode", f"--jobs={','.join(missing)}"]
        for line in _ask(["sacct", "--noheader", "--allocations", "--parsable2", *what], needed=False):
            number, name, code = line.split("|")
            add(number, State(name.partition(" ")[0], exit=code))
    return {number: found[number] for number in numbers if number in found}


def _ask(command: Sequence[str], needed: bool = True) -> list[str]:
    """Lines that a program of Slurm's prints, none where there is no such program. needed: ConnectionError if it fails;
    otherwise it may (there may be no accounting)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", "no answer within 60 s")
    reason = done.stderr.strip()
    if done.returncode and needed and "Invalid job id" not in reason:  # said of a single job that it has forgotten
        raise ConnectionError(f"{command[0]} fails, so what has become of jobs is not known; try again: {reason}")
    return done.stdout.splitlines()
