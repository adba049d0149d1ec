"""Slurm's programs: submits functions through submitit, and asks squeue and sacct for the states of jobs.

Nothing goes through a shell: programs get lists of arguments, and submitit quotes what it writes into its batch script.
Only what quoting cannot make harmless there is refused (`check_folder`).
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cluster_config import ClusterConfig, JobRequest, check_one_line

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT")


class SubmissionError(ValueError):
    """sbatch refused a job, or is not installed."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job. start: when it expects to start a pending one, as text. exit: `code:signal`."""

    name: str
    reason: str = ""
    start: str = ""
    exit: str = ""

    @property
    def active(self) -> bool:
        return self.name in ACTIVE


def check_folder(folder: Path) -> None:
    """ValueError for paths that a batch script cannot hold: Slurm expands %, and `\\` joins its lines."""
    check_one_line(str(folder), "the folder")
    for sign in "%\\":
        if sign in str(folder):
            raise ValueError(f"the folder {str(folder)!r} has {sign!r} in it, which Slurm replaces: choose another")


def submit_array(
    function: Callable[..., Any], arguments: Sequence[Any], folder: Path, name: str, request: JobRequest,
    config: ClusterConfig, dependency: str = "", parallel: int = 0,
) -> str:  # fmt: skip
    """Submit `function(argument)` as a job, for several arguments as an array, `parallel` parts at a time (0: all);
    returns Slurm's number of it. `config.environment` is added to the job's, and written nowhere. SubmissionError with
    sbatch's message if it refuses."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    check_folder(folder)
    extra = {option: value for option, value in config.sbatch.items() if value is not False}
    if dependency:
        extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    optional: dict[str, Any] = {
        "partition": config.partition, "account": config.account, "qos": config.qos, "constraint": config.constraint,
        "time": config.time, "mem": config.mem, "cpus_per_task": config.cpus_per_task,
        "gpus_per_node": request.gpus_per_node,
    }  # fmt: skip
    parameters = {option: value for option, value in optional.items() if value} | {
        # for squeue's narrow columns and sacct's database
        "job_name": re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)[:60] or "msc",
        "nodes": request.nodes or 1,
        "ntasks_per_node": request.ranks_per_node,
        "array_parallelism": parallel or len(arguments),  # submitit's own default is at most 256
        "wckey": None,  # submitit's own default is refused where such keys are checked
        "stderr_to_stdout": True,
        "use_srun": False,  # the submitted function starts the ranks
        "setup": ["export PYTHONSAFEPATH=1", *config.setup],
        # To the ranks, not to the batch script; USR1 for they may get TERM as well, and two of a kind end at once.
        "additional_parameters": {**extra, "signal": f"USR1@{config.signal_seconds}", "requeue": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    try:
        executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(**parameters)
        # sbatch hands the environment on to the job. What it says on stderr is in the exception, too.
        os.environ.update(config.variables)
        with redirect_stderr(io.StringIO()):
            if len(arguments) == 1:
                jobs = [executor.submit(function, arguments[0])]
            else:
                jobs = executor.map_array(function, arguments)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SubmissionError("; ".join(line.strip() for line in str(error).splitlines()) or "sbatch failed") from None
    except RuntimeError as error:  # submitit's for a machine without Slurm
        raise SubmissionError(f"{error} Use --cluster local to run here") from None
    finally:
        for name in config.variables:
            os.environ.pop(name, None)
        os.environ.update(before)
    return str(jobs[0].job_id).partition("_")[0]


def job_states(numbers: Sequence[str]) -> dict[str, list[JobState]]:
    """What Slurm knows of jobs by number: of an array one state for each part, of a part (`17_3`) its own; none for
    those that it has forgotten. One question for all. ConnectionError where Slurm does not answer."""
    if not numbers:
        return {}
    arrays = ",".join(dict.fromkeys(number.partition("_")[0] for number in numbers))
    states: dict[str, list[JobState]] = {}

    def add(number: str, state: JobState) -> None:
        for name in {number, number.partition("_")[0]}:
            states.setdefault(name, []).append(state)

    for line in _lines(["squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}", "--format=%i|%T|%r|%S"]):
        number, name, reason, start = line.split("|")
        add(number, JobState(name, reason if reason != "None" else "", start if start != "N/A" else ""))
    if missing := [number for number in numbers if number not in states]:
        query = ["--format=JobID,State,ExitCode", f"--jobs={','.join(missing)}"]
        for line in _lines(["sacct", "--noheader", "--allocations", "--parsable2", *query], required=False):
            number, name, code = line.split("|")
            add(number, JobState(name.partition(" ")[0], exit=code))
    return {number: states[number] for number in numbers if number in states}


def _lines(command: Sequence[str], required: bool = True) -> list[str]:
    """Lines that a program of Slurm prints, none where it is not installed. required: ConnectionError if it fails;
    otherwise it may (there may be no accounting)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", "no answer within 60 s")
    reason = done.stderr.strip()
    if done.returncode and required and "Invalid job id" not in reason:  # its answer for a single forgotten job
        raise ConnectionError(f"{command[0]} fails, so what has become of jobs is not known; try again: {reason}")
    return done.stdout.splitlines()
