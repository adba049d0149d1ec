"""Commands: what each `msc` subcommand does. Heavy imports are inside: `msc --help` must not wait for torch."""

import dataclasses
import inspect as inspection
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msc.pretrain.requests import EvaluateConfig, PlayConfig, SampleConfig
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.training_start import TrainingStart

from .processes import launcher, slurm_env
from .processes.train_request import TrainRequest, split_items

log = logging.getLogger(__name__)

# What torch.distributed and DeepSpeed read in every rank.
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CONTACT_CLIPS = 6


def options_for(function: Callable[..., Any], args: Namespace, **options: Any) -> dict[str, Any]:
    """The given options that a function or dataclass takes, by its parameters' names; its own defaults stand for what
    is None. options: under another name than in `args`."""
    values = {**vars(args), **options}
    names = inspection.signature(function).parameters
    assert names.keys() >= options.keys(), f"{function.__name__} takes no {options.keys() - names.keys()}"
    return {name: values[name] for name in names if values.get(name) is not None}


def convert(args: Namespace) -> None:
    import torch

    from msc.datasets.prepare.clip_defaults import choose_clip_defaults
    from msc.datasets.prepare.convert import ConvertConfig
    from msc.datasets.prepare.convert import convert as convert_videos
    from msc.datasets.prepare.sources import find_sources
    from msc.pretrain.diffusion.autoencoder import open_autoencoder
    from msc.pretrain.diffusion.text_encoder import open_text_encoder

    if args.bucket and (args.size or args.frames):
        raise ValueError("--bucket names frames and size of its clips: leave out --frames and --size")
    if args.fps is None or (args.size is None and not args.bucket):
        chosen = choose_clip_defaults(find_sources(tuple(args.sources)).sources, args.fps, args.size)
        args.fps = chosen.fps
        if not args.bucket:
            args.size = (chosen.height, chosen.width)
            log.info("clips: %s", chosen.text)
    height, width = args.size or (None, None)
    config = ConvertConfig(
        **options_for(
            ConvertConfig, args, sources=tuple(args.sources), out=str(args.out), buckets=tuple(args.bucket or ()),
            signals=tuple(args.signals or ()),
            height=height, width=width,
        )
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = open_autoencoder(config.autoencoder, device, torch.float32)  # on GPUs, too: they are written once
    for shape in config.shapes:
        autoencoder.check(*shape)

    def encode(clip: torch.Tensor) -> torch.Tensor:
        return autoencoder.encode(clip.to(device))  # moved as bytes, a quarter of the floats

    embed = open_text_encoder(config.text) if config.text else None
    report = convert_videos(config, encode, autoencoder.temporal_factor, embed=embed, part=args.part, merge=args.merge)
    print(report.text)
    if args.part is None:
        print(f"a few of the clips: {contact_sheet_of(args.out, autoencoder, args.out / 'contact.png')}")


def inspect(args: Namespace) -> int:
    from msc.datasets.prepare.summary import damaged_shards, describe
    from msc.datasets.shards.index import check_shards, read_index
    from msc.pretrain.diffusion.autoencoder import open_autoencoder

    index = read_index(args.shards)
    check_shards(args.shards, index)
    print(describe(args.shards, index))
    bad = damaged_shards(args.shards, index) if args.verify else []
    if args.verify:
        print("\n".join(bad) if bad else "every shard is whole and what was written")
    picture = args.picture or args.shards / "contact.png"
    if not bad and (args.picture or not picture.is_file()):
        contact_sheet_of(args.shards, open_autoencoder(index.autoencoder), picture)
    print(f"a few of the clips: {picture}" if picture.is_file() else "no picture, as shards are damaged")
    return 1 if bad else 0


def contact_sheet_of(folder: Path, autoencoder: Any, path: Path) -> Path:
    """A picture of random training clips as they were stored, each with its signals as bars below."""
    from msc.datasets.loading.dataloader import loader
    from msc.datasets.loading.mixture import single_set
    from msc.datasets.prepare.summary import signal_bars
    from msc.datasets.shards.index import read_index
    from msc.pretrain.diffusion.autoencoder import to_uint8
    from msc.pretrain.inference.contact_sheet import write_contact_sheet

    rows = []
    buckets = [one for one in read_index(folder).by_bucket() if one.samples("train")]
    for one in buckets:
        clips = min(max(1, CONTACT_CLIPS // len(buckets)), one.samples("train"))
        batch = next(loader(single_set(folder, one), "train", seed=0, clock=0, clips=clips, workers=0))
        videos = batch.video
        if batch.latents is not None:
            videos = to_uint8(autoencoder.decode(batch.latents.float()))
        assert videos is not None
        for i, (key, video) in enumerate(zip(batch.keys, videos, strict=True)):
            rows.append((key, video))
            for signal in one.signals:
                values = (batch.signals or {})[signal.name][i].reshape(-1, signal.width)[-len(video) :]
                rows.append((signal.name, signal_bars(signal, values, max(12, video.shape[2] // 3), video.shape[3])))
    write_contact_sheet(rows, path)
    return path


def train_request(args: Namespace) -> TrainRequest:
    return TrainRequest.from_items(args.items, **options_for(TrainRequest, args))


def train(args: Namespace) -> int:
    request = train_request(args)
    if slurm_env.is_task(os.environ):
        enter_slurm_step(request)
    is_rank = "RANK" in os.environ  # of torchrun, Slurm or our launcher
    if is_rank and (missing := [name for name in DISTRIBUTED if name not in os.environ]):
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: start all ranks alike, or unset RANK")
    gpus = launcher.visible_gpus(os.environ)
    processes = int(os.environ["WORLD_SIZE"]) if is_rank else request.processes or max(1, gpus)
    config, run = request.resolve(), request.run

    from msc.pretrain import validation
    from msc.pretrain.tracking import heartbeat

    if args.dry_run:
        print(validation.describe(config, processes))
        return 0
    if launcher.LAUNCHED not in os.environ:
        config = validation.validate(config, run, request.resumes, processes)
        if os.environ.get("RANK", "0") == "0":
            heartbeat.check_not_training(run)
        if 0 < gpus < processes and not is_rank:
            raise ValueError(
                f"{processes} processes but {gpus} GPUs: start one per GPU, or hide the GPUs with "
                "CUDA_VISIBLE_DEVICES=-1"
            )
    if not is_rank and processes > 1:
        return launcher.run(launcher.msc_command(args.argv), processes, RunFolder(run).logs)
    if not is_rank:
        os.environ.update(launcher.rank_environment(os.environ, 0, 1, launcher.free_port()))
    from msc.pretrain import train as training  # a mistake in the settings need not wait for DeepSpeed

    planned = planned_step(request.plan, config, processes)
    return training.train(TrainingStart(config, run, request.resumes, request.rollback, request.again, planned))


def enter_slurm_step(request: TrainRequest) -> None:
    """Become a rank of a Slurm step; all but the first write into the run's logs, as under `msc train --processes`."""
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    if request.processes not in (None, tasks):
        raise ValueError(f"--processes is {request.processes}, but srun started {tasks} tasks: each of them is a rank")
    interface = slurm_env.choose_interface(os.environ)
    os.environ.update(slurm_env.rank_environment(os.environ, interface))
    rank = int(os.environ["RANK"])
    if rank:
        path = RunFolder(request.run).rank_log(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
    print(f"msc: {slurm_env.describe_rank(os.environ)}", file=sys.stderr, flush=True)  # every rank's, unlike log.info


def planned_step(plan: Path | None, config: Any, processes: int) -> Any:
    """What a plan says of the run: the one named, else the one for this GPU, if it is a known one."""
    if plan is None and not launcher.visible_gpus(os.environ):
        return None
    from .planning import report as plan_report

    if plan is not None:
        return plan_report.read_planned_step(plan)
    import torch

    try:
        return plan_report.planned_step(config, processes, torch.cuda.get_device_name())
    except (RuntimeError, ValueError):  # no GPU after all, or a mesh that the run itself will object to
        return None


def plan(args: Namespace) -> None:
    from msc.pretrain.config import load
    from msc.pretrain.presets import PRESETS, preset

    from .planning.hardware import gpu_kind
    from .planning.report import report_plan

    file, overrides = split_items(args.items)
    if file is None and not overrides:
        raise ValueError(f"nothing to plan: name a configuration file, or a preset ({', '.join(PRESETS)})")
    named = str(file) if str(file) in PRESETS else None
    config = load(preset(named) if named else None, None if named else file, overrides)
    device = gpu_kind(args.kind)
    if any(value is not None and value <= 0 for value in (args.memory, args.network)):
        raise ValueError(f"--memory {args.memory} and --network {args.network} must be positive")
    changes = {name: value * 1e9 for name in ("memory", "network") if (value := getattr(args, name)) is not None}
    changes |= {"node": args.node} if args.node else {}
    keys = [override.partition("=")[0] for override in overrides]
    device = dataclasses.replace(device, **changes)
    options = options_for(
        report_plan, args, config=config, device=device, fixed=keys, units=args.roll_out, out=args.json
    )
    print(report_plan(**options))


def sweep(args: Namespace) -> int:
    from .scaling import sweep as sweeping
    from .scaling.sweep_spec import read_sweep_spec
    from .slurm.cluster_config import JobRequest

    plan = read_sweep_spec(args.file)
    folder = args.out or Path("runs") / args.file.stem
    job_request = JobRequest(**options_for(JobRequest, args, cluster="slurm"))
    if args.dry_run:
        print("\n".join(f"{run.name}: {' '.join(run.overrides)}" for run in plan.runs))
        return 0
    if args.cluster != "slurm" and (unused := job_request.options()):
        raise ValueError(f"{unused[0]} is for jobs: add --cluster slurm, or leave it out")
    if args.status:
        code = 0
    elif args.cluster == "slurm":
        code = sweeping.submit_sweep(folder, plan, args.file, job_request, args.jobs or 0)
    else:
        code = sweeping.run_all(folder, plan, args.jobs or 1)
    print(sweeping.table(folder, plan))
    return code


def fit(args: Namespace) -> int:
    from .scaling.report import report_fit

    text, usable = report_fit(**options_for(report_fit, args, path=args.points))
    print(text)
    return 0 if usable else 1


def checkpoints(args: Namespace) -> int:
    from msc.pretrain.checkpoints import directory as checkpoint_directory

    text, whole = checkpoint_directory.checkpoint_table(args.run, args.verify)
    print(text)
    return 0 if whole else 1


def evaluate(args: Namespace) -> None:
    request = EvaluateConfig(**options_for(EvaluateConfig, args))

    from msc.pretrain.evaluation.evaluate import evaluate as evaluate_run

    for run in args.run:
        print(evaluate_run(run, request))


def sample(args: Namespace) -> None:
    repeated = {name: tuple(getattr(args, name) or ()) for name in ("prompt", "label", "signal", "signal_guidance")}
    request = SampleConfig(**options_for(SampleConfig, args, **repeated))

    from msc.pretrain.inference.sample import sample as sample_run

    print(sample_run(args.run, request))


def play(args: Namespace) -> None:
    request = PlayConfig(**options_for(PlayConfig, args))

    from msc.pretrain.inference.play import play as play_run

    play_run(args.run, request)


def export(args: Namespace) -> None:
    from msc.pretrain.export.export import export as export_run

    options = options_for(export_run, args, step=args.checkpoint, push_to=args.push_to_hub)
    print(export_run(**options))


def doctor(args: Namespace) -> int:
    from .doctor import as_json, as_text, is_healthy, run_checks

    checks = run_checks()
    print(as_json(checks) if args.json else as_text(checks))
    return 0 if is_healthy(checks) else 1


def submit(args: Namespace) -> int:
    from .slurm import submit as submission
    from .slurm.cluster_config import JobRequest

    job_request, inner = JobRequest(**options_for(JobRequest, args)), args.inner
    if inner.command == "train" and inner.dry_run:
        return train(Namespace(**{**vars(inner), "processes": job_request.tasks}))
    if inner.command == "train":
        return submission.submit_training(train_request(inner), job_request)
    if inner.command == "evaluate" and len(inner.run) > 1:
        options = [f"--{name}={value}" for name, value in options_for(EvaluateConfig, inner).items()]
        return submission.submit_evaluations(inner.run, options, job_request)
    run = inner.run[0] if inner.command == "evaluate" else getattr(inner, "run", None)
    return submission.submit_command(inner.argv, run or inner.out, job_request, getattr(inner, "part", None))


def status(args: Namespace) -> None:
    from .slurm.jobs import status_table

    print(status_table(args.runs))


def logs(args: Namespace) -> None:
    from .slurm.jobs import show_log

    show_log(args.run, args.rank, args.follow, args.lines)


def cancel(args: Namespace) -> None:
    from .slurm.jobs import cancel as cancel_jobs

    print(cancel_jobs(args.run))
