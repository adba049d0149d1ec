"""What each `msc` subcommand does. Heavy imports are inside: `msc --help` must not wait for torch."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from msc.pretrain.requests import EvaluateConfig, SampleConfig

# What a rank runs. Not `-m msc.launch.cli`: under -m cloudpickle sends classes by value.
PROGRAM = "import sys; from msc.launch.cli import main; sys.exit(main())"

# What torch.distributed and DeepSpeed read in every rank.
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CONTACT_CLIPS = 6
EVALUATE_OPTIONS = tuple(field.name for field in fields(EvaluateConfig))


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the function called knows its own defaults."""
    return {name: value for name, value in options.items() if value is not None}


def convert(args: Namespace) -> int:
    import torch

    from msc.datasets.prepare.convert import ConvertConfig
    from msc.datasets.prepare.convert import convert as convert_videos
    from msc.pretrain.diffusion.autoencoder import open_autoencoder
    from msc.pretrain.diffusion.text_encoder import open_text_encoder

    height, width = args.size or (None, None)
    if args.bucket and (args.size or args.frames):
        raise ValueError("--bucket names frames and size of its clips: leave out --frames and --size")
    names = ["frames", "fps", "stride", "held_out", "autoencoder", "store", "workers", "clips_per_shard"]
    names += ["text", "scenes", "min_brightness", "min_motion", "crop", "max_bad"]
    config = ConvertConfig(
        sources=tuple(args.sources),
        out=str(args.out),
        overwrite=args.overwrite,
        buckets=tuple(args.bucket or ()),
        **given(height=height, width=width, **{name: getattr(args, name) for name in names}),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = open_autoencoder(config.autoencoder, device, torch.float32)  # on GPUs, too: they are written once
    for shape in config.shapes:
        autoencoder.check(*shape)

    def encode(clip: torch.Tensor) -> torch.Tensor:
        return autoencoder.encode(clip.to(device))  # moved as bytes, a quarter of the floats

    embed = open_text_encoder(config.text) if config.text else None
    how = {"embed": embed, "part": args.part, "merge": args.merge}
    report = convert_videos(config, encode, autoencoder.temporal_factor, **how)
    print(report.text)
    if args.part is None:
        print(f"a few of the clips: {write_contact_sheet(args.out, autoencoder, args.out / 'contact.png')}")
    return 0


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
        write_contact_sheet(args.shards, open_autoencoder(index.autoencoder), picture)
    print(f"a few of the clips: {picture}" if picture.is_file() else "no picture, as shards are damaged")
    return 1 if bad else 0


def write_contact_sheet(folder: Path, autoencoder: Any, path: Path) -> Path:
    """A picture of random training clips as they were stored."""
    from msc.datasets.loading.dataloader import loader
    from msc.datasets.loading.mixture import single_set
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
        rows += list(zip(batch.keys, videos, strict=True))
    write_contact_sheet(rows, path)
    return path


@dataclass(frozen=True)
class TrainingRequest:
    """What a `msc train` command line asks for. config: not yet checked against its shards."""

    config: Any
    run: Path
    resume: bool
    back_to: str | None


def training_request(args: Namespace) -> TrainingRequest:
    file, overrides = split_items(args.items)
    run = args.run or default_run(args.preset, file)
    back_to = rollback(args, run)
    resume = args.resume or args.rollback is not None
    if resume and file is None and args.preset is None:
        file = run / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(f"cannot resume: there is no {file}; name the run folder with --run")

    from msc.pretrain.config import load
    from msc.pretrain.presets import preset

    config = load(preset(args.preset) if args.preset else None, file, overrides)
    return TrainingRequest(config, run, resume, back_to)


def train(args: Namespace) -> int:
    from .processes import launcher, slurm_env

    if slurm_env.is_task(os.environ):
        enter_step(args)
    started = "RANK" in os.environ  # by torchrun, Slurm or ourselves: this process is one of the ranks
    if started and (missing := [name for name in DISTRIBUTED if name not in os.environ]):
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: start all ranks alike, or unset RANK")
    processes = args.processes or max(1, launcher.visible_gpus(os.environ))
    if started:
        processes = int(os.environ["WORLD_SIZE"])
    asked = training_request(args)
    config, run, resume = asked.config, asked.run, asked.resume

    from msc.pretrain import validation
    from msc.pretrain.tracking import heartbeat

    if args.dry_run:
        print(validation.describe(config, processes))
        return 0
    if launcher.LAUNCHED not in os.environ:
        config = validation.validate(config, run, resume, processes)
        if os.environ.get("RANK", "0") == "0":
            heartbeat.check_not_training(run, said)
        if 0 < launcher.visible_gpus(os.environ) < processes and not started:
            raise ValueError(
                f"{processes} processes but {launcher.visible_gpus(os.environ)} GPUs: start one per GPU, or hide "
                "the GPUs with CUDA_VISIBLE_DEVICES=-1"
            )
    if not started and processes > 1:
        return launcher.run([sys.executable, "-c", PROGRAM, *args.argv], processes, run / "logs")
    if not started:
        os.environ.update(launcher.rank_environment(os.environ, 0, 1, launcher.free_port()))
    from msc.pretrain import train as training  # a mistake in the settings need not wait for DeepSpeed

    planned = planned_step(args.plan, config, processes)
    how = given(back_to=asked.back_to, again=args.again or None, planned=planned)
    return training.train(config, run, resume, **how)


def said(text: str) -> None:
    print(f"msc: {text}", file=sys.stderr, flush=True)


def enter_step(args: Namespace) -> None:
    """Become a rank of a Slurm step; all but the first write into the run's logs, as under `msc train --processes`."""
    from .processes import slurm_env

    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    if args.processes not in (None, tasks):
        raise ValueError(f"--processes is {args.processes}, but srun started {tasks} tasks: each of them is a rank")
    interface = slurm_env.choose_interface(os.environ)
    os.environ.update(slurm_env.rank_environment(os.environ, interface))
    rank = int(os.environ["RANK"])
    if rank:
        logs = (args.run or default_run(args.preset, split_items(args.items)[0])) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = os.open(logs / f"rank_{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
    print(slurm_env.told(os.environ), file=sys.stderr, flush=True)


def planned_step(plan: Path | None, config: Any, processes: int) -> Any:
    """What a plan says of the run: the one named, else the one for this GPU, if it is a known one."""
    from .processes import launcher

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


def plan(args: Namespace) -> int:
    from dataclasses import replace

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
    giga = {"memory": args.memory, "network": args.network}
    changes = {**{name: value * 1e9 for name, value in given(**giga).items()}, **given(node=args.node)}
    keys = [override.partition("=")[0] for override in overrides]
    options = given(price=args.price, units=args.roll_out, steps=args.steps, out=args.json)
    print(report_plan(config, args.gpus, replace(device, **changes), keys, **options))
    return 0


def rollback(args: Namespace, run: Path) -> str | None:
    """The checkpoint to go back to; ValueError if there is no such. Whether the run has already done so, and only goes
    on, rank 0 decides for all (rollback.py)."""
    if args.rollback is None:
        if args.again:
            raise ValueError("--again goes back once more to the checkpoint of --rollback: name it with --rollback N")
        return None
    if "RANK" not in os.environ:
        from msc.pretrain.checkpoints import directory as checkpoint_directory
        from msc.pretrain.checkpoints import rollback

        if args.again or not rollback.is_already_rolled_back(run, args.rollback):  # it may have been pruned since
            checkpoint_directory.find(run, args.rollback)
    return str(args.rollback)


def split_items(items: Sequence[str]) -> tuple[Path | None, list[str]]:
    """What follows `msc train`: at most one configuration file, and `section.key=value` settings."""
    overrides = [item for item in items if "=" in item]
    files = [item for item in items if "=" not in item]
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1]}: one configuration file at most, settings are section.key=value")
    return (Path(files[0]) if files else None), overrides


def default_run(preset: str | None, file: Path | None) -> Path:
    """Where a run goes that was not told: the same in every rank, so nothing random and no time of day."""
    name = file.stem if file is not None else preset
    if name is None:
        raise ValueError("nothing to train: name a configuration file, --preset NAME, or --resume --run DIR")
    return Path("runs") / name


def sweep(args: Namespace) -> int:
    from .scaling import sweep as sweeping
    from .scaling import sweep_array
    from .scaling.sweep_spec import read_sweep_spec
    from .slurm.submit import OPTIONS

    plan = read_sweep_spec(args.file)
    folder = args.out or Path("runs") / args.file.stem
    if args.dry_run:
        print("\n".join(f"{run.name}: {' '.join(run.overrides)}" for run in plan.runs))
        return 0
    if args.cluster != "slurm" and (unused := [name for name in OPTIONS if name != "cluster" and getattr(args, name)]):
        raise ValueError(f"--{unused[0].replace('_', '-')} is for jobs: add --cluster slurm, or leave it out")
    if args.status:
        code = 0
    elif args.cluster == "slurm":
        code = sweep_array.send(folder, plan, args)
    else:
        code = sweeping.run_all(folder, plan, **given(jobs=args.jobs))
    print(sweeping.table(folder, plan))
    return code


def fit(args: Namespace) -> int:
    from .scaling.fit import fit_file

    names = ("out", "loss", "hold_out", "compute", "delta", "draws", "tracking", "only")
    text, found = fit_file(args.points, **given(**{name: getattr(args, name) for name in names}))
    print(text)
    return 0 if found else 1


def checkpoints(args: Namespace) -> int:
    from msc.pretrain.checkpoints import directory as checkpoint_directory

    text, whole = checkpoint_directory.checkpoint_table(args.run, args.verify)
    print(text)
    return 0 if whole else 1


def evaluate(args: Namespace) -> int:
    from msc.pretrain.evaluation.evaluate import evaluate as evaluate_run

    request = EvaluateConfig(**given(**{name: getattr(args, name) for name in EVALUATE_OPTIONS}))
    for run in args.run:
        print(evaluate_run(run, request))
    return 0


def sample(args: Namespace) -> int:
    values = {field.name: getattr(args, field.name) for field in fields(SampleConfig)}
    for name in ("prompt", "label"):
        values[name] = tuple(values[name] or ())
    request = SampleConfig(**given(**values))

    from msc.pretrain.inference.sample import sample as sample_run

    print(sample_run(args.run, request))
    return 0


def export(args: Namespace) -> int:
    from msc.pretrain.export.export import export as export_run

    names = ("weights", "dtype", "max_shard_size")
    options = given(step=args.checkpoint, push_to=args.push_to_hub, **{name: getattr(args, name) for name in names})
    print(export_run(args.run, args.out, **options))
    return 0


def doctor(args: Namespace) -> int:
    from . import doctor as examination

    checks = examination.examine()
    print(examination.as_json(checks) if args.json else examination.as_text(checks))
    return 0 if examination.healthy(checks) else 1


def submit(args: Namespace) -> int:
    from .slurm.submit import submit as submit_job

    return submit_job(args)


def status(args: Namespace) -> int:
    from .slurm import jobs as views

    print(views.table(args.runs or views.runs_here()))
    return 0


def logs(args: Namespace) -> int:
    from .slurm import jobs as views

    views.show_log(args.run, args.rank, args.follow, args.lines)
    return 0


def cancel(args: Namespace) -> int:
    from .slurm import jobs as views

    print(views.cancel(args.run))
    return 0
