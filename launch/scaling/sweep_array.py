"""`msc sweep --cluster slurm`: submit the pending runs of a sweep as an array of jobs.

Each of them is what `msc submit` sends for a single run: it saves, requeues and goes on by itself, and `msc status`,
`logs` and `cancel` know its folder. The sweep's folder knows the array.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from msc.pretrain.tracking.tracker import State

from ..slurm import job_records, sbatch, submit
from ..slurm.cluster_config import JobRequest
from .sweep import Sweep
from .sweep_spec import SweepSpec

log = logging.getLogger(__name__)


def submit_sweep(folder: Path, spec: SweepSpec, file: Path, job_request: JobRequest, parallel: int = 0) -> int:
    """Submit an array with a job for every run that is neither finished nor under way; ValueError, and nothing
    submitted, if one of them is invalid. The folders of the sweep and of every run record the job."""
    config = job_request.cluster_config()
    if job_request.tasks_per_node is None and job_request.gpus_per_node is None:
        job_request = replace(job_request, tasks_per_node=max(1, spec.processes // (job_request.nodes or 1)))
    if (tasks := job_request.tasks) != spec.processes:
        raise ValueError(f"the sweep file says processes: {spec.processes}, but {tasks} tasks are asked for")
    folder = folder.absolute()
    sbatch.check_folder(folder)
    sweep = Sweep(folder, spec)
    sweep.register()
    with ExitStack() as locks:
        pending = [run for run in sweep.pending() if (lock := sweep.lock(run)) and locks.enter_context(lock)]
        if not pending:
            log.info("every run is finished or under way: nothing is sent")
            return 0
        new_folders = [sweep.of(run) for run in pending if not sweep.of(run).exists()]
        tracker = sweep.start_parent_run()
        state: State = "FAILED"
        try:
            requests = [sweep.train_request(run) for run in pending]
            parts = [submit.prepare_training(one, job_request, config, check_active=False) for one in requests]
            record = submit.submit_array(parts, folder / "jobs", folder.name, parallel=parallel)
        except (ValueError, OSError):
            for own in new_folders:  # their runs have not begun
                with suppress(OSError):
                    own.config.unlink()
                    own.path.rmdir()
            raise
        else:  # Slurm has it: whatever fails now, its number is known and the runs keep their folders
            sent = f"{len(pending)} of {len(spec.runs)} runs"
            log.info(f"job {record.id}: {sent}, others are finished or under way; {folder}")
            job_records.write_record(folder / "jobs", replace(record, arguments=("sweep", str(file))))
            for part, own_record in zip(parts, submit.part_records(record, parts), strict=True):
                job_records.write_record(Path(part.jobs), own_record)
            state = "FINISHED"
        finally:
            tracker.finish(state)
    return 0
