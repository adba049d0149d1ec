"""`msc submit`: a command of msc as a job, on Slurm or detached on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from .. import commands
from ..processes import launcher
from . import cluster_config, job_records, sbatch, supervisor
from .cluster_config import Site
from .job_records import Record
from .supervisor import Job

# Of the command line over the site's own, by the names that both have.
OVER_SITE = ("partition", "account", "qos", "constraint", "time", "mem", "cpus_per_task")
OPTIONS = ("cluster", "nodes", "gpus_per_node", "tasks_per_node", *OVER_SITE, "site")


def submit(args: Namespace) -> int:
    site = settings(args)
    per_node = args.tasks_per_node or args.gpus_per_node or 1
    tasks = (args.nodes or 1) * per_node
    if args.cluster != "slurm" and (args.nodes or 1) > 1:
        raise ValueError(f"--nodes is {args.nodes}, but --cluster {args.cluster} is this machine alone")
    inner = args.inner
    if args.parts and inner.command != "convert":
        raise ValueError(f"--parts divides a conversion, not `msc {inner.command}`")
    if args.parts and args.cluster != "slurm":
        raise ValueError("--parts needs Slurm; on one machine `msc convert --workers N` does the same")
    if inner.command == "train":
        if inner.dry_run:
            return commands.train(Namespace(**{**vars(inner), "processes": tasks}))
        folder, words, again = prepare_training(inner, args, tasks)
        name, where = folder.name, folder / "jobs"
    else:
        if tasks > 1:
            more = "; --parts N makes an array of jobs" if inner.command == "convert" else ""
            raise ValueError(f"`msc {inner.command}` is one process, but {tasks} tasks were asked for{more}")
        if inner.command == "evaluate" and len(inner.run) > 1:
            return evaluate_each(inner, args, site)
        run = inner.run[0] if inner.command == "evaluate" else getattr(inner, "run", None)
        folder = (run or inner.out).absolute()
        where = folder / "jobs" if run else folder.with_name(f"{folder.name}.jobs")
        if run:
            check_run(folder)
        words, again = tuple(inner.argv), shlex.join(["msc", "submit", *options(args), *inner.argv])
        name = f"{inner.command}-{folder.name}"
    made = job_of(args, site, words, folder, where, tasks, again, getattr(inner, "part", None))
    if args.cluster == "debug":
        os.environ.update(site.variables)
        with launcher.caught_signals() as received:  # Ctrl-C reaches the ranks, which save
            return supervisor.attempts(made, received)
    if args.cluster == "local":
        records = [start_here(made, site)]
    else:
        try:
            records = send_one(made, args, site, name, per_node)
        except ValueError:
            if not job_records.records(where):
                shutil.rmtree(where, ignore_errors=True)  # what submitit wrote for it
            if inner.command == "train" and not (inner.resume or inner.rollback):
                (folder / "config.yaml").unlink()  # a new run is still none
            raise
    for record in records:
        job_records.write(where, record)
    print(report(made, records))
    return 0


def job_of(
    args: Namespace, site: Site, words: Sequence[str], folder: Path, where: Path, tasks: int = 1, again: str = "",
    part: tuple[int, int] | None = None,
) -> Job:  # fmt: skip
    from msc.pretrain.tracking.mlflow_store import code_version

    return Job(
        words=tuple(words), folder=str(folder), jobs=str(where), cluster=args.cluster, tasks=tasks, starts=site.starts,
        python=site.python or sys.executable, container=site.container, srun=site.srun,
        code=tuple(code_version().items()), again=again, part=part,
    )  # fmt: skip


def evaluate_each(inner: Namespace, args: Namespace, site: Site) -> int:
    """Several evaluations: an array with a job for each run."""
    if args.cluster != "slurm":
        raise ValueError("several runs make an array, which needs Slurm; `msc evaluate` does them one after another")
    chosen = commands.given(**{name: getattr(inner, name) for name in commands.EVALUATE_OPTIONS})
    asked = [f"--{name}={value}" for name, value in chosen.items()]
    parts = []
    for run in map(Path.absolute, inner.run):
        check_run(run)
        words = ["evaluate", str(run), *asked]
        again = shlex.join(["msc", "submit", *options(args), *words])
        parts.append(job_of(args, site, words, run, run / "jobs", again=again))
    record = send(parts, Path(parts[0].jobs), args, site, "evaluate", 1)
    for part, own in zip(parts, each(record, parts), strict=True):
        job_records.write(Path(part.jobs), own)
        print(report(part, [own]))
    return 0


def check_run(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")


def settings(args: Namespace) -> Site:
    """The site's file, and what the command line lays over it."""
    site = cluster_config.read(cluster_config.find(args.site))
    given = {name: value for name in OVER_SITE if (value := getattr(args, name)) is not None}
    return replace(site, **given)


def options(args: Namespace) -> list[str]:
    """The options of `msc submit` as they were given, to repeat them."""
    found = []
    for name in (*OPTIONS, "parts"):
        value = getattr(args, name, None)
        if value and (name, value) != ("cluster", "slurm"):
            found += ["--" + name.replace("_", "-"), str(value)]
    return found


def prepare_training(
    inner: Namespace, args: Namespace, tasks: int, idle: bool = False
) -> tuple[Path, tuple[str, ...], str]:
    """Check everything that can be checked here and write RUN/config.yaml, from which the job, and every later start
    of it, resumes: (run folder, what the ranks run, the command that goes on). idle: no job is at the run, as the
    caller knows of many at once."""
    if inner.processes:
        raise ValueError(f"--processes {inner.processes}: a job has as many as --nodes and --gpus-per-node say")
    if inner.again:
        raise ValueError("--again would go back at every start of the job: use `msc train --rollback N --again` once")
    asked = commands.training_request(inner)
    run = asked.run.absolute()
    if args.cluster == "slurm":
        sbatch.check_path(run)
    if active := ([] if idle else still_active(job_records.trainings(run / "jobs"))):
        raise ValueError(f"job {active[-1].id} is training in {run}: wait for it, or end it with `msc cancel {run}`")

    from msc.datasets.files import write_atomically
    from msc.pretrain import validation
    from msc.pretrain.config import dump
    from msc.pretrain.tracking import heartbeat

    from ..planning import report as plan_report

    words = ["--resume", "--run", str(run)]
    if inner.plan:
        plan_report.read_planned_step(inner.plan)
        words += ["--plan", str(inner.plan.absolute())]
    config = validation.validate(asked.config, run, asked.resume, tasks)
    heartbeat.check_not_training(run, commands.said)
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "config.yaml", dump(config).encode())
    again = shlex.join(["msc", "submit", *options(args), *words])
    return run, ("train", *words, *(("--rollback", asked.back_to) if asked.back_to else ())), again


def still_active(records: Sequence[Record]) -> list[Record]:
    """Of jobs those that are still in the queue or alive; Slurm is asked once."""
    states = sbatch.states([record.id for record in records if record.cluster == "slurm"])
    return [
        record for record in records
        if process_of(record) is not None or any(state.active for state in states.get(record.id, []))
    ]  # fmt: skip


def process_of(record: Record) -> psutil.Process | None:
    """The process of a job on this machine; None if it has ended, also where another one has its number now."""
    if record.cluster == "slurm" or record.host != os.uname().nodename:
        return None
    try:
        process = psutil.Process(int(record.id))
        alive = abs(process.create_time() - record.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if alive else None
    except psutil.NoSuchProcess:
        return None


# Sending --------------------------------------------------------------------------------------------------


def send(
    parts: Sequence[Job], where: Path, args: Namespace, site: Site, name: str, per_node: int, dependency: str = "",
    parallel: int = 0,
) -> Record:  # fmt: skip
    """To Slurm: one job, or an array of several, at most `parallel` of them at a time (0: all). where: for its logs."""
    sbatch.check_path(where)
    gpus = args.gpus_per_node or 0
    chosen = sbatch.parameters(site, name, args.nodes or 1, per_node, gpus, dependency, parallel)
    number = sbatch.send(parts, where, chosen, site.variables)
    several = len(parts) > 1
    log = str(where / f"{number}{'_0' if several else ''}_0_log.out")
    first = parts[0]
    return Record(number, "slurm", first.words, log, first.tasks, several * len(parts), code=dict(first.code))


def each(record: Record, parts: Sequence[Job]) -> list[Record]:
    """The parts of an array as jobs of their own, for the folders that they work in."""
    if not record.parts:
        return [record]
    return [
        replace(record, id=f"{record.id}_{i}", words=part.words, log=part_log(record, i), parts=0)
        for i, part in enumerate(parts)
    ]


def part_log(record: Record, part: int) -> str:
    return record.log.removesuffix("_0_0_log.out") + f"_{part}_0_log.out"


def send_one(made: Job, args: Namespace, site: Site, name: str, per_node: int) -> list[Record]:
    """A job, or a conversion in parts and the job that merges them: both or neither."""
    where, parts = Path(made.jobs), args.parts
    if not parts:
        return [send([made], where, args, site, name, per_node)]
    cut = [replace(made, words=(*made.words, "--part", f"{i}/{parts}"), part=(i, parts)) for i in range(parts)]
    first = send(cut, where, args, site, name, per_node)
    try:
        job_records.write(where, first)  # at once: from here on `msc cancel` must find it
        merge = replace(made, words=(*made.words, "--merge"))
        return [first, send([merge], where, args, site, name, per_node, dependency=f"afterok:{first.id}")]
    except (ValueError, OSError):
        take_back(where, first)
        raise


def take_back(where: Path, record: Record) -> None:
    """Cancel a job whose successor could not be sent. While Slurm has it, its record stays, and all that it reads."""
    done = subprocess.run(["scancel", record.id], capture_output=True, text=True)
    if done.returncode:
        commands.said(f"job {record.id} was accepted and could not be taken back: {done.stderr.strip()}")
        return
    commands.said(f"job {record.id} was accepted, and is cancelled, as the job after it could not be sent")
    (where / f"{record.id}.json").unlink(missing_ok=True)


def start_here(made: Job, site: Site) -> Record:
    """Detached from this terminal. Not submitit's local executor: that one keeps the terminal's pipes, chooses GPUs
    over the head of CUDA_VISIBLE_DEVICES, and gives its tasks one second to save."""
    where = Path(made.jobs)
    where.mkdir(parents=True, exist_ok=True)
    starting = where / f".starting-{os.getpid()}.log"
    environment = {**launcher.process_environment(os.environ), **site.variables}
    with starting.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", supervisor.LOCAL_PROGRAM, supervisor.to_json(made)], stdin=subprocess.DEVNULL,
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
    log = starting.rename(where / f"{process.pid}_0_log.out")
    created = psutil.Process(process.pid).create_time()
    return Record(str(process.pid), "local", made.words, str(log), made.tasks, created=created, code=dict(made.code))


def report(made: Job, records: Sequence[Record]) -> str:
    numbers = " and ".join(record.id for record in records)
    place = shlex.quote(str(Path(made.folder)))
    lines = [
        f"job        {numbers}" + (f" ({records[0].parts} parts, then the index)" if records[0].parts else ""),
        f"folder     {made.folder}",
        f"log        {records[0].log}" + (", other ranks: logs/rank_N.log in the folder" if made.tasks > 1 else ""),
        f"look       msc status {place}; msc logs {place} -f",
        f"end        msc cancel {place}",
        f"go on      {made.again}",
    ]
    return "\n".join(lines)
