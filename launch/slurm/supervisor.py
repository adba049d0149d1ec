"""What runs in a job, on its first node: starts the ranks, waits for them, and decides whether the job goes on.

submitit sends this function to Slurm, and no more than that: its own requeueing takes any signal for a time-out when
the limit is short, so that preemptions use up its time-outs, and leaves all ranks but the first running on. Here the
ranks themselves hear the signals and agree to save (train.py); what they ended with decides, once, outside of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from msc.datasets.errors import DETERMINISTIC_FAILURE, FAILURE, INTERRUPTED, REQUEUE, USER_ERROR
from msc.datasets.prepare.progress import count_finished_groups
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.tracking import heartbeat

from ..commands import PROGRAM
from ..commands import said as say
from ..processes import launcher
from . import job_records
from .job_records import Cluster

# A detached job on this machine: a process of its own that is given the Job as JSON.
LOCAL_PROGRAM = (
    "import sys; from msc.launch.slurm import supervisor; supervisor.attend(supervisor.from_json(sys.argv[1]))"
)
SIGNALLED = 128 + signal.SIGUSR1  # before the time limit, to a command that does not listen
PATIENCE = (1, 4, 15, 40)  # seconds between tries to reach a busy Slurm
WAIT = 60  # seconds between the ends of the first rank and the last: MLflow may keep rank 0 for 30

Verdict = Literal["done", "again", "over"]


@dataclass(frozen=True)
class Job:
    """words: what every task runs, of msc. folder: of the run, or of the shards. jobs: where starts are noted. starts:
    how many in a row may bring no new checkpoint. code: version and commit that it was sent with. again: the command
    that goes on after it is over. part: of a conversion, (i, N)."""

    words: tuple[str, ...]
    folder: str
    jobs: str
    cluster: Cluster
    tasks: int = 1
    starts: int = 3
    python: str = sys.executable
    container: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    code: tuple[tuple[str, str], ...] = ()
    again: str = ""
    part: tuple[int, int] | None = None

    @property
    def trains(self) -> bool:
        return self.words[0] == "train"

    @property
    def goes_on(self) -> bool:
        """Whether a new start finds done what the last one did; evaluations, samples and exports begin anew."""
        return self.words[0] in ("train", "convert")


def to_json(job: Job) -> str:
    return json.dumps(asdict(job))


def from_json(text: str) -> Job:
    values = json.loads(text)
    lists = {name: tuple(values[name]) for name in ("words", "container", "srun")}
    return Job(**{**values, **lists, "code": tuple((name, value) for name, value in values["code"])})


def attend(job: Job) -> None:
    """Run a job to its end, or to its next start. Ends the process with the code that the scheduler is to see."""
    with launcher.caught_signals() as received:  # Slurm signals the ranks itself; this process only outlives them
        code = attempts(job, received)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def attempts(job: Job, received: list[int]) -> int:
    folder, number = Path(job.jobs), slurm_number(os.environ) if job.cluster == "slurm" else str(os.getpid())
    os.environ[heartbeat.JOB_VARIABLE] = number
    say_changes(job)
    try:
        if job.trains:
            heartbeat.check_not_training(Path(job.folder), say)
    except ValueError as error:  # nor is its MLflow run ours to end
        say(f"{error}. This job ends without a start")
        return USER_ERROR
    while True:
        since, start = time.time(), reached(job)
        began = [line["from"] for line in job_records.notes(folder, number) if "from" in line]
        if job_records.fruitless(began, start) >= job.starts:  # it was Slurm that started it again
            say(f"{job.starts} starts without a new checkpoint: given up. The log above says why")
            return end(job, FAILURE)
        job_records.note(folder, number, **{"from": start}, host=os.uname().nodename)
        code = run_ranks(job, received)
        fruitless = job_records.fruitless([*began, start], reached(job))
        worked = start > 0 or (took_a_step(job, since, start) if job.trains else reached(job) > 0)
        verdict, why = decide(code, fruitless, job.starts, worked, job.goes_on)
        if verdict == "again" and not may_start_again(job, number, code, received):
            verdict, why = "over", "stopped from outside: cancelled, or put back into the queue"
        job_records.note(folder, number, code=code, to=reached(job), verdict=verdict, why=why)
        say(f"exit code {code}: {why}")
        if verdict != "again":
            return end(job, code)
        settle(job, code)
        if job.cluster == "slurm":
            return requeue(number, code)


def slurm_number(environment: Mapping[str, str]) -> str:
    """Of a part of an array `17_3`: one part has the number of the whole array for its own, and would speak for all."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def end(job: Job, code: int) -> int:
    settle(job, code)
    if code not in (0, DETERMINISTIC_FAILURE):  # how to go on after that is in the log: not with the same command
        say(f"to go on, where the job is not in the queue again: {job.again}")
    return code


def decide(code: int, fruitless: int, limit: int, worked: bool, goes_on: bool = True) -> tuple[Verdict, str]:
    """What becomes of a job whose ranks ended with `code` (the highest of theirs, 128 + signal).

    fruitless: starts in a row, this one included, since the last new checkpoint. worked: whether the job has ever
    got anything done; if so, a start that fails, also for want of a file, is more likely the machine's fault. goes_on:
    whether another start would have less to do than this one.
    """
    if code == 0:
        return "done", "finished"
    if code == SIGNALLED and not goes_on:
        return "over", "not started again, as its time is over and it would begin anew: raise --time"
    if code == INTERRUPTED or (code == USER_ERROR and not worked) or (code == DETERMINISTIC_FAILURE and fruitless):
        return "over", "not started again, as it would end the same; the reason is in the log"
    if code == FAILURE and not worked:
        return "over", "not started again, as it failed before it got anything done; the reason is in the log"
    if fruitless >= limit:
        return "over", f"not started again after {fruitless} starts without a new checkpoint"
    return "again", "stopped and saved" if code == REQUEUE else "failed; goes on from the last checkpoint"


def run_ranks(job: Job, received: list[int]) -> int:
    """Start all tasks of the job, wait for them; the exit code that stands for all."""
    command = [*job.container, job.python, "-c", PROGRAM, *job.words]
    if job.cluster != "slurm":
        return launcher.run(
            command, job.tasks, Path(job.folder if job.trains else job.jobs) / "logs", received=received
        )
    # Since 22.05 srun does not take over the number of CPUs from sbatch.
    cpus = [f"--cpus-per-task={count}"] if (count := os.environ.get("SLURM_CPUS_PER_TASK")) else []
    # A rank that ends takes nobody along at once: the others may still save, or say who is missing.
    srun = ["srun", f"--wait={WAIT}", "--kill-on-bad-exit=0", *cpus, *job.srun]
    code = subprocess.call([*srun, *command], env=launcher.process_environment(os.environ), stdin=subprocess.DEVNULL)
    return 128 - code if code < 0 else code


def reached(job: Job) -> int:
    """How far the work has come, as far as a new start would find it done: clips trained on, groups converted (of a
    part of a conversion, its own)."""
    if job.trains:
        newest = checkpoint_directory.newest_meta(Path(job.folder))
        return newest.clock if newest else 0
    return count_finished_groups(Path(job.folder).resolve(), job.part)  # a link may have another name


def took_a_step(job: Job, since: float, start: int) -> bool:
    """Whether training took a step since then, by a new checkpoint or the heartbeat that it leaves behind."""
    beat = heartbeat.read(Path(job.folder))
    newest = checkpoint_directory.newest_meta(Path(job.folder))
    before = newest.step if newest else 0
    return reached(job) > start or (beat.get("started", 0) >= since and beat["step"] > before)


# Starting again -------------------------------------------------------------------------------------------


def may_start_again(job: Job, number: str, code: int, received: list[int]) -> bool:
    """Not when somebody ended the job: then it would rise again after `scancel`, or twice when Slurm requeues it."""
    if job.cluster != "slurm":
        return code != REQUEUE and not received
    shown = persistently(["scontrol", "show", "job", "-o", number])
    state = re.search(r"\bJobState=(\w+)", shown.stdout)
    return shown.returncode != 0 or (state is not None and state[1] == "RUNNING")  # not known: to try costs nothing


def persistently(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program of Slurm's, again and again where it fails: many jobs may end at once."""
    for pause in (*PATIENCE, None):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 or pause is None:
            break
        time.sleep(pause)
    return done


def requeue(number: str, code: int) -> int:
    """Back into the queue under the same number. Slurm ends this process while or after it answers."""
    done = persistently(["scontrol", "requeue", number])
    if done.returncode:
        say(f"could not be requeued: {done.stderr.strip()}")
    else:
        say(f"job {number} is requeued; Slurm starts it again after two minutes at the earliest")
    return code


def settle(job: Job, code: int) -> None:
    """End the MLflow run where the ranks could not: they were killed, and it would be RUNNING for ever. Not if another
    job has the run: it took it while the ranks were starting."""
    beat = heartbeat.read(Path(job.folder))
    others = heartbeat.is_fresh(beat, time.time()) and beat["job"] != heartbeat.job_id(os.environ)
    if job.trains and code not in (0, REQUEUE) and not others:
        from msc.pretrain.tracking.tracker import end_mlflow_run

        if run_id := end_mlflow_run(Path(job.folder), "FAILED"):
            say(f"MLflow run {run_id} was still RUNNING and is now FAILED")


# Telling --------------------------------------------------------------------------------------------------


def say_changes(job: Job) -> None:
    from msc.pretrain.tracking.mlflow_store import code_version

    now = code_version()
    if changed := [f"{name} {old} -> {now.get(name)}" for name, old in job.code if now.get(name) != old]:
        say(f"the code is not what was submitted: {', '.join(changed)}")
