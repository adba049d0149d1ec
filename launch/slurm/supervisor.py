"""Supervisor: what runs in a job, on its first node; starts the ranks, waits for them, and decides on a requeue.

submitit sends this function to Slurm, and no more than that: its own requeueing takes any signal for a time-out when
the limit is short, so that preemptions use up its time-outs, and leaves all ranks but the first running. Here the
ranks themselves get the signals and agree to save (train.py); their exit codes decide, once, outside of them.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from msc.datasets.errors import DETERMINISTIC_FAILURE, FAILURE, INTERRUPTED, REQUEUE, USER_ERROR
from msc.datasets.files import retry
from msc.datasets.prepare.progress import count_finished_groups
from msc.parallel.console import configure_logging
from msc.parallel.signals import collect_signals
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.tracking import heartbeat, mlflow_store, tracker

from ..processes import launcher
from . import job_records
from .cluster_config import ClusterConfig, JobRequest

log = logging.getLogger(__name__)

# A detached job on this machine: a process of its own that is given the Job as JSON.
LOCAL_PROGRAM = (
    "import sys; from msc.launch.slurm.supervisor import JOB, supervise; supervise(JOB.validate_json(sys.argv[1]))"
)
SIGNALLED = 128 + signal.SIGUSR1  # before the time limit, to a command that does not handle it
RETRY_SECONDS = (1, 4, 15, 40)  # between attempts to reach a busy Slurm
WAIT = 60  # seconds between the ends of the first rank and the last: MLflow may keep rank 0 for 30

Verdict = Literal["done", "again", "over"]  # as written to the job's events


@dataclass(frozen=True)
class Job:
    """A command of msc as a job. arguments: of msc, the same in every task. folder: of the run, or of the shards. jobs:
    where starts are recorded. code: version and commit that it was submitted with. resume_command: for the user, when
    it is over. part: of a conversion, (i, N)."""

    arguments: tuple[str, ...]
    folder: str
    jobs: str
    request: JobRequest = field(default_factory=JobRequest)
    config: ClusterConfig = field(default_factory=ClusterConfig)
    code: tuple[tuple[str, str], ...] = ()
    resume_command: str = ""
    part: tuple[int, int] | None = None

    @property
    def trains(self) -> bool:
        return self.arguments[0] == "train"

    @property
    def resumable(self) -> bool:
        """Whether a new start continues the work of the last one; evaluations, samples and exports begin anew."""
        return self.arguments[0] in ("train", "convert")

    def without_secrets(self) -> Job:
        """As it may be written to a file: the variables of its environment are handed on by the process."""
        return replace(self, config=replace(self.config, environment={}))


JOB = TypeAdapter(Job)


def supervise(job: Job) -> None:
    """Run a job to its end, or to its requeue. Ends the process with the code that the scheduler is to see."""
    configure_logging()
    with collect_signals() as received:  # Slurm signals the ranks itself; this process only outlives them
        code = run_attempts(job, received)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def run_attempts(job: Job, received: list[int]) -> int:
    """Start the ranks until the job is over or in Slurm's queue again; returns the exit code. received: signals."""
    jobs, number = Path(job.jobs), slurm_job_id(os.environ) if job.request.cluster == "slurm" else str(os.getpid())
    os.environ[heartbeat.JOB_VARIABLE] = number
    warn_of_changed_code(job)
    try:
        if job.trains:
            heartbeat.check_not_training(Path(job.folder))
    except ValueError as error:  # its MLflow run is not ours to end, either
        log.error(f"{error}. This job ends without a start")
        return USER_ERROR
    while True:
        start = progress_of(job)
        starts = [event["from"] for event in job_records.read_events(jobs, number) if "from" in event]
        if job_records.starts_without_progress(starts, start) >= job.config.starts:  # Slurm itself requeued it
            log.error(f"{job.config.starts} starts without a new checkpoint: given up. The log above says why")
            return finish(job, FAILURE)
        job_records.append_event(jobs, number, **{"from": start}, host=os.uname().nodename)
        code = run_ranks(job, received)
        end = progress_of(job)
        stalled = job_records.starts_without_progress([*starts, start], end)
        worked = start > 0 or end > start or (job.trains and took_a_step(job, number))
        verdict, reason = decide(code, stalled, job.config.starts, worked, job.resumable)
        if verdict == "again" and not may_restart(job, number, code, received):
            verdict, reason = "over", "stopped from outside: cancelled, or put back into the queue"
        job_records.append_event(jobs, number, code=code, to=end, verdict=verdict, why=reason)
        log.info(f"exit code {code}: {reason}")
        if verdict != "again":
            return finish(job, code)
        end_own_mlflow_run(job, code)
        if job.request.cluster == "slurm":
            requeue(number)
            return code


def slurm_job_id(environment: Mapping[str, str]) -> str:
    """`17`, or `17_3` for a part of an array: one part has the array's own number for its SLURM_JOB_ID, with which
    scontrol would requeue all of them."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def finish(job: Job, code: int) -> int:
    end_own_mlflow_run(job, code)
    if code not in (0, DETERMINISTIC_FAILURE):  # how to resume after that is in the log: not with the same command
        log.info(f"to go on, where the job is not in the queue again: {job.resume_command}")
    return code


def decide(code: int, stalled: int, limit: int, worked: bool, resumable: bool = True) -> tuple[Verdict, str]:
    """What becomes of a job whose ranks ended with `code` (their highest, 128 + signal), and the reason.

    stalled: starts in a row, this one included, since the last new checkpoint. worked: whether the job has ever made
    progress; if so, a start that fails, also for want of a file, is more likely the machine's fault. resumable: whether
    another start would have less to do than this one.
    """
    if code == 0:
        return "done", "finished"
    if code == SIGNALLED and not resumable:
        return "over", "not started again, as its time is over and it would begin anew: raise --time"
    if code == INTERRUPTED or (code == USER_ERROR and not worked) or (code == DETERMINISTIC_FAILURE and stalled):
        return "over", "not started again, as it would end the same; the reason is in the log"
    if code == FAILURE and not worked:
        return "over", "not started again, as it failed before it got anything done; the reason is in the log"
    if stalled >= limit:
        return "over", f"not started again after {stalled} starts without a new checkpoint"
    return "again", "stopped and saved" if code == REQUEUE else "failed; goes on from the last checkpoint"


def run_ranks(job: Job, received: list[int]) -> int:
    """Start all tasks of the job and wait for them; returns the highest exit code."""
    command = [*job.config.container, *launcher.msc_command(job.arguments, job.config.python or sys.executable)]
    if job.request.cluster != "slurm":
        logs = Path(job.folder if job.trains else job.jobs) / "logs"
        return launcher.run(command, job.request.tasks, logs, received=received)
    # Since 22.05 srun does not inherit the number of CPUs from sbatch.
    cpus = [f"--cpus-per-task={count}"] if (count := os.environ.get("SLURM_CPUS_PER_TASK")) else []
    # A rank that ends must not end the others at once: they may still save, or name the stalled rank.
    srun = ["srun", f"--wait={WAIT}", "--kill-on-bad-exit=0", *cpus, *job.config.srun]
    logs = RunFolder(Path(job.folder)).logs
    sizes = {path: path.stat().st_size for path in logs.glob("rank_*.log")}
    code = subprocess.call([*srun, *command], env=launcher.process_environment(os.environ), stdin=subprocess.DEVNULL)
    if code not in (0, REQUEUE):  # rank 0's output is in the job's own log; the reason may be in that of another rank
        grown = [path for path in logs.glob("rank_*.log") if path.stat().st_size > sizes.get(path, 0)]
        for path in sorted(grown, key=lambda path: path.stat().st_mtime)[: launcher.SHOWN_TAILS]:
            log.error("\n".join([f"the end of {path}:", *launcher.log_tail(path, sizes.get(path, 0))]))
    return 128 - code if code < 0 else code


def progress_of(job: Job) -> int:
    """The work that a new start would find done: clips trained on, or groups converted (of a part, its own)."""
    if job.trains:
        newest = checkpoint_directory.newest_meta(Path(job.folder))
        return newest.clock if newest else 0
    return count_finished_groups(
        Path(job.folder).resolve(), job.part
    )  # as convert does: the link may have another name


def took_a_step(job: Job, number: str) -> bool:
    """Whether the heartbeat that its ranks left behind has a later step than the newest checkpoint."""
    last, newest = heartbeat.read(Path(job.folder)), checkpoint_directory.newest_meta(Path(job.folder))
    return last.get("job") == number and last["step"] > (newest.step if newest else 0)


def may_restart(job: Job, number: str, code: int, received: list[int]) -> bool:
    """False where somebody ended the job: it would start again after `scancel`, or twice when Slurm requeues it."""
    if job.request.cluster != "slurm":
        return code != REQUEUE and not received
    try:
        state = re.search(r"\bJobState=(\w+)", scontrol("show", "job", "-o", number))
        return state is not None and state[1] == "RUNNING"
    except subprocess.CalledProcessError:
        return True  # unknown: an attempt is harmless


def requeue(number: str) -> None:
    """Back into the queue under the same number. Slurm ends this process while or after it answers."""
    try:
        scontrol("requeue", number)
        log.info(f"job {number} is requeued; Slurm starts it again after two minutes at the earliest")
    except subprocess.CalledProcessError as error:
        log.error(f"could not be requeued: {error.stderr.strip()}")


def scontrol(*arguments: str) -> str:
    """What `scontrol` prints; retried where it fails, as many jobs may end at once. CalledProcessError."""

    def call() -> str:
        return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout

    return retry(call, RETRY_SECONDS, lambda error: isinstance(error, subprocess.CalledProcessError))


def end_own_mlflow_run(job: Job, code: int) -> None:
    """End the MLflow run where the ranks could not: they were killed, and it would be RUNNING for ever. Not if another
    job has taken the run folder while the ranks were starting."""
    if not job.trains or code in (0, REQUEUE):
        return
    try:
        if heartbeat.read(Path(job.folder)).get("job") != heartbeat.job_id(os.environ):
            heartbeat.check_not_training(Path(job.folder))
    except ValueError:
        return
    if run_id := tracker.end_mlflow_run(Path(job.folder), "FAILED"):
        log.warning(f"MLflow run {run_id} was still RUNNING and is now FAILED")


def warn_of_changed_code(job: Job) -> None:
    now = mlflow_store.code_version()
    if changed := [f"{name} {old} -> {now.get(name)}" for name, old in job.code if now.get(name) != old]:
        log.warning(f"the code is not what was submitted: {', '.join(changed)}")
