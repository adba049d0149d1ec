"""`msc sweep --cluster slurm`: the runs of a sweep that are to do, as an array of jobs.

Each of them is what `msc submit` sends for a single run: it saves, requeues and goes on by itself, and `msc status`,
`logs` and `cancel` know its folder. The sweep's folder knows the array.
"""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from msc.pretrain.tracking.tracker import State

from .. import cli
from ..commands import said
from ..slurm import job_records, sbatch, submit
from . import sweep
from .sweep_spec import SweepSpec


def send(folder: Path, plan: SweepSpec, args: Namespace) -> int:
    """Send an array with a job for every run that is neither finished nor under way; ValueError, and nothing sent, if
    one of them cannot be. Where it was sent is in the folders of the sweep and of every run."""
    site = submit.settings(args)
    per_node = args.tasks_per_node or args.gpus_per_node or max(1, plan.processes // (args.nodes or 1))
    if (tasks := (args.nodes or 1) * per_node) != plan.processes:
        raise ValueError(f"the sweep file says processes: {plan.processes}, but {tasks} tasks are asked for")
    folder = folder.absolute()
    sbatch.check_path(folder)
    plan = sweep.prepare(folder, plan)
    todo = sweep.pending(folder, plan)
    held = {run.name: lock for run in todo if (lock := sweep.take(folder, run)) is not None}
    todo = [run for run in todo if run.name in held]
    if not todo:
        said("every run is finished or under way: nothing is sent")
        return 0
    fresh = [folder / run.name for run in todo if not (folder / run.name / "config.yaml").is_file()]
    tracker, uri = sweep.open_parent(folder, plan)
    state: State = "FAILED"
    try:
        parts = []
        for run in todo:
            inner = cli.parse(sweep.words(folder, plan, run, tracker.run_id, uri))
            own, words, again = submit.prepare_training(inner, args, tasks, idle=True)
            parts.append(submit.job_of(args, site, words, own, own / "jobs", tasks, again))
        record = submit.send(parts, folder / "jobs", args, site, folder.name, per_node, parallel=args.jobs or 0)
    except (ValueError, OSError):
        for own in fresh:  # they are still to be begun
            with suppress(OSError):
                (own / "config.yaml").unlink()
                own.rmdir()
        raise
    else:  # Slurm has it: whatever fails now, its number is known and the runs keep their folders
        said(f"job {record.id}: {len(todo)} of {len(plan.runs)} runs, the others are finished or under way; {folder}")
        job_records.write(folder / "jobs", replace(record, words=("sweep", str(args.file))))
        for part, own_record in zip(parts, submit.each(record, parts), strict=True):
            job_records.write(Path(part.jobs), own_record)
        state = "FINISHED"
    finally:
        tracker.finish(state)
        for lock in held.values():
            os.close(lock)
    return 0
