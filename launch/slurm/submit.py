"""`msc submit`: a command of msc as a job, on Slurm or detached on this machine."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from msc.datasets.files import write_atomically
from msc.parallel.signals import collect_signals
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.tracking import heartbeat
from msc.pretrain.tracking.mlflow_store import code_version

from ..processes import launcher
from ..processes.train_request import TrainRequest
from . import job_records, sbatch, supervisor
from .cluster_config import ClusterConfig, JobRequest
from .job_records import JobRecord
from .supervisor import Job

log = logging.getLogger(__name__)


def submit_training(request: TrainRequest, job_request: JobRequest) -> int:
    """Submit `msc train`; returns the exit code of `msc submit`."""
    job = prepare_training(request, job_request, checked_config(job_request, "train"))
    try:
        return start_job(job, Path(job.folder).name)
    except sbatch.SubmissionError:
        if not request.resumes:
            RunFolder(Path(job.folder)).config.unlink()  # a new run does not exist yet
        raise


def submit_command(
    arguments: Sequence[str], folder: Path, job_request: JobRequest, part: tuple[int, int] | None = None
) -> int:
    """Submit another command of msc, which runs as a single process. folder: its run, or the shards it writes."""
    command, folder = arguments[0], folder.absolute()
    config, jobs = checked_config(job_request, command), folder.with_name(f"{folder.name}.jobs")
    if command != "convert":
        check_run(folder)
        jobs = folder / "jobs"
    return start_job(make_job(arguments, folder, jobs, job_request, config, part), f"{command}-{folder.name}")


def submit_evaluations(runs: Sequence[Path], options: Sequence[str], job_request: JobRequest) -> int:
    """Submit the evaluation of several runs: an array with a job for each. options: of `msc evaluate`."""
    config = checked_config(job_request, "evaluate")
    if job_request.cluster != "slurm":
        raise ValueError("several runs make an array, which needs Slurm; `msc evaluate` does them one after another")
    jobs = []
    for run in map(Path.absolute, runs):
        check_run(run)
        jobs.append(make_job(["evaluate", str(run), *options], run, run / "jobs", job_request, config))
    record = submit_array(jobs, Path(jobs[0].jobs), "evaluate")
    for job, part_record in zip(jobs, part_records(record, jobs), strict=True):
        job_records.write_record(Path(job.jobs), part_record)
        print(summary(job, [part_record]))
    return 0


def checked_config(job_request: JobRequest, command: str) -> ClusterConfig:
    """The cluster configuration; ValueError if the request does not suit the cluster or the command."""
    config, cluster, tasks = job_request.cluster_config(), job_request.cluster, job_request.tasks
    if cluster != "slurm" and (job_request.nodes or 1) > 1:
        raise ValueError(f"--nodes is {job_request.nodes}, but --cluster {cluster} is this machine alone")
    if job_request.parts and command != "convert":
        raise ValueError(f"--parts divides a conversion, not `msc {command}`")
    if job_request.parts and cluster != "slurm":
        raise ValueError("--parts needs Slurm; on one machine `msc convert --workers N` does the same")
    if command != "train" and tasks > 1:
        hint = "; --parts N makes an array of jobs" if command == "convert" else ""
        raise ValueError(f"`msc {command}` is one process, but {tasks} tasks are requested{hint}")
    return config


def check_run(folder: Path) -> None:
    if not RunFolder(folder).exists():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")


def prepare_training(
    request: TrainRequest, job_request: JobRequest, config: ClusterConfig, check_active: bool = True
) -> Job:
    """Check everything that can be checked here and write RUN/config.yaml, from which the returned job, and every later
    start of it, resumes. check_active: refuse a run that a job is training; False if the caller has checked."""
    if request.processes:
        raise ValueError(f"--processes {request.processes}: a job has as many as --nodes and --gpus-per-node say")
    if request.again:
        raise ValueError("--again would go back at every start of the job: use `msc train --rollback N --again` once")
    resolved, run = request.resolve(), request.run.absolute()
    if job_request.cluster == "slurm":
        sbatch.check_folder(run)
    if active := active_records(job_records.training_records(run / "jobs")) if check_active else []:
        raise ValueError(f"job {active[-1].id} is training in {run}: wait for it, or end it with `msc cancel {run}`")

    from msc.pretrain import validation
    from msc.pretrain.config import dump

    from ..planning.report import read_planned_step

    if request.plan:
        read_planned_step(request.plan)  # may it be read?
    resolved = validation.validate(resolved, run, request.resumes, job_request.tasks)
    heartbeat.check_not_training(run)
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(RunFolder(run).config, dump(resolved).encode())
    plan = request.plan.absolute() if request.plan else None
    every_start = TrainRequest(run, resume=True, rollback=request.rollback, plan=plan)
    job = make_job(every_start.command_line(), run, run / "jobs", job_request, config)
    resume_command = submit_command_line(job_request, replace(every_start, rollback=None).command_line()[1:])
    return replace(job, resume_command=resume_command)


def make_job(
    arguments: Sequence[str], folder: Path, jobs: Path, job_request: JobRequest, config: ClusterConfig,
    part: tuple[int, int] | None = None,
) -> Job:  # fmt: skip
    code, resume_command = tuple(code_version().items()), submit_command_line(job_request, arguments)
    return Job(tuple(arguments), str(folder), str(jobs), job_request, config, code, resume_command, part)


def submit_command_line(job_request: JobRequest, arguments: Sequence[str]) -> str:
    return shlex.join(["msc", "submit", *job_request.options(), *arguments])


def active_records(records: Sequence[JobRecord]) -> list[JobRecord]:
    """The jobs that are still in the queue or alive; Slurm is asked once."""
    states = sbatch.job_states([record.id for record in records if record.cluster == "slurm"])
    return [
        record for record in records
        if process_of(record) is not None or any(state.active for state in states.get(record.id, []))
    ]  # fmt: skip


def process_of(record: JobRecord) -> psutil.Process | None:
    """The process of a job on this machine; None if it has ended, also where another one has its number now."""
    if record.cluster == "slurm" or record.host != os.uname().nodename:
        return None
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(record.id))
        if abs(process.create_time() - record.created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


# Starting -------------------------------------------------------------------------------------------------


def start_job(job: Job, name: str) -> int:
    """Run a job here, start it in the background, or submit it to Slurm; returns the exit code."""
    jobs, cluster = Path(job.jobs), job.request.cluster
    if cluster == "debug":
        os.environ.update(job.config.variables)
        with collect_signals() as received:  # Ctrl-C reaches the ranks, which save
            return supervisor.run_attempts(job, received)
    try:
        if cluster == "local":
            records = [start_in_background(job)]
        elif job.request.parts:
            records = submit_conversion_in_parts(job, job.request.parts, name)
        else:
            records = [submit_array([job], jobs, name)]
    except sbatch.SubmissionError:
        if not job_records.read_records(jobs):
            shutil.rmtree(jobs, ignore_errors=True)  # what submitit wrote for it
        raise
    for record in records:
        job_records.write_record(jobs, record)
    print(summary(job, records))
    return 0


def start_in_background(job: Job) -> JobRecord:
    """Detached from this terminal. Not submitit's local executor: that one keeps the terminal's pipes, ignores
    CUDA_VISIBLE_DEVICES when it assigns GPUs, and gives its tasks one second to save."""
    jobs = Path(job.jobs)
    jobs.mkdir(parents=True, exist_ok=True)
    starting = jobs / f".starting-{os.getpid()}.log"
    environment = {**launcher.process_environment(os.environ), **job.config.variables}
    with starting.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", supervisor.LOCAL_PROGRAM, supervisor.JOB.dump_json(job.without_secrets())],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
    path = starting.rename(jobs / f"{process.pid}_0_log.out")
    created = psutil.Process(process.pid).create_time()
    return record_of(job, str(process.pid), path, created=created)


def submit_array(jobs: Sequence[Job], folder: Path, name: str, dependency: str = "", parallel: int = 0) -> JobRecord:
    """Submit one job to Slurm, or an array of several, at most `parallel` at a time (0: all). folder: for its logs."""
    first, arguments = jobs[0], [job.without_secrets() for job in jobs]
    number = sbatch.submit_array(
        supervisor.supervise, arguments, folder, name, first.request, first.config, dependency, parallel
    )
    parts = len(jobs) if len(jobs) > 1 else 0
    return record_of(first, number, folder / f"{number}{'_0' if parts else ''}_0_log.out", parts=parts)


def record_of(job: Job, number: str, path: Path, **facts: Any) -> JobRecord:
    tasks, code = job.request.tasks, dict(job.code)
    return JobRecord(number, job.request.cluster, job.arguments, str(path), tasks, code=code, **facts)


def part_records(record: JobRecord, jobs: Sequence[Job]) -> list[JobRecord]:
    """The parts of an array as jobs of their own, for the folders that they work in."""
    if not record.parts:
        return [record]
    return [
        replace(record, id=f"{record.id}_{i}", arguments=job.arguments, log=part_log(record, i), parts=0)
        for i, job in enumerate(jobs)
    ]


def part_log(record: JobRecord, part: int) -> str:
    return record.log.removesuffix("_0_0_log.out") + f"_{part}_0_log.out"


def submit_conversion_in_parts(job: Job, count: int, name: str) -> list[JobRecord]:
    """An array that converts, and the job that merges its parts: both or neither."""
    folder = Path(job.jobs)
    parts = [replace(job, arguments=(*job.arguments, "--part", f"{i}/{count}"), part=(i, count)) for i in range(count)]
    record = submit_array(parts, folder, name)
    try:
        job_records.write_record(folder, record)  # at once: from here on `msc cancel` must know it
        merge = replace(job, arguments=(*job.arguments, "--merge"))
        return [record, submit_array([merge], folder, name, f"afterok:{record.id}")]
    except (ValueError, OSError):
        done = subprocess.run(["scancel", record.id], capture_output=True, text=True)
        if done.returncode:  # while Slurm has it, its record stays, and all that it reads
            log.warning(f"job {record.id} was accepted and could not be taken back: {done.stderr.strip()}")
        else:
            log.info(f"job {record.id} was accepted, and is cancelled, as the job after it could not be sent")
            (folder / f"{record.id}.json").unlink(missing_ok=True)
        raise


def summary(job: Job, records: Sequence[JobRecord]) -> str:
    numbers, folder = " and ".join(record.id for record in records), shlex.quote(job.folder)
    lines = [
        f"job        {numbers}" + (f" ({records[0].parts} parts, then the index)" if records[0].parts else ""),
        f"folder     {job.folder}",
        f"log        {records[0].log}"
        + (", other ranks: logs/rank_N.log in the folder" if job.request.tasks > 1 else ""),
        f"look       msc status {folder}; msc logs {folder} -f",
        f"end        msc cancel {folder}",
        f"go on      {job.resume_command}",
    ]
    return "\n".join(lines)
