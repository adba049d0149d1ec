"""Training, from the first process to the last checkpoint. `train` reads from top to bottom."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from msc.datasets.errors import REQUEUE, DeterministicFailure
from msc.datasets.files import Forgiving, append_jsonl, write_atomically
from msc.datasets.loading.dataloader import loader
from msc.datasets.loading.mixture import Shards, check_shard_sizes, open_shards
from msc.parallel import consistency, control_plane, deepspeed_zero, fp8, process_group
from msc.parallel.mesh import placement_warning
from msc.parallel.signals import STOP_SIGNALS, collect_signals
from msc.parallel.watchdog import is_communication_error, watch_ranks

from . import cost
from .batch_inputs import InputBuilder, micro_batches, noise_beside
from .checkpoints import directory as checkpoint_directory
from .checkpoints import format as checkpoint_format
from .checkpoints import initialize_from, rollback
from .checkpoints.async_writer import Writer
from .config import Config, dump, flat
from .diffusion.autoencoder import open_autoencoder
from .diffusion.rectified_flow import frame_losses, frame_shift
from .evaluation.held_out_loss import LossByNoise, held_out_losses
from .inference.preview import write_preview
from .kernels.compile_helpers import graph_breaks
from .optimizer import set_schedule
from .parallelize import build, clip_shape, make_mesh, own_past_context, parallelize
from .run_folder import LatentSpace, RunFolder
from .tracking import heartbeat, spike_guard
from .tracking.mlflow_store import code_version, read_identity
from .tracking.plan_deviation import PlannedStep, describe_deviation, plan_ratios
from .tracking.throughput import DESCRIPTION, Meter
from .tracking.tracker import State, Tracker
from .tracking.unreadable_clips import UnreadableClips, read_unreadable_clips
from .validation import latent_sizes, resolve

PACKAGES = [Path(__file__).parents[1] / name for name in ("pretrain", "parallel", "datasets", "launch")]


def train(
    config: Config, run: Path, resume: bool, back_to: str | None = None, again: bool = False,
    planned: PlannedStep | None = None,
) -> int:  # fmt: skip
    """Train in this process, one of the world that RANK and WORLD_SIZE describe; returns the exit code.

    back_to: step or folder of a checkpoint to go back to first, leaving out all clips since. again: also if the run
    last went back to that one already. planned: what a plan says of a step; the run says once if it is off.
    """
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)  # "where are you?": all stacks to stderr, also while a C call never returns
    # A second one of a kind interrupts at once. Not so SIGTERM and SIGUSR1 from Slurm, which repeats itself (at a time
    # limit slurmd and srun both send SIGTERM) and has SIGKILL for those who take too long.
    interrupting = (signal.SIGINT,) if "SLURM_STEP_ID" in os.environ else STOP_SIGNALS
    with collect_signals(interrupting) as stopping:
        world = process_group.join_process_group(config.parallel.timeout)
        # Again, and for good: since the command line looked, imports and waiting for all ranks have taken their time.
        control_plane.run_on_rank_0(partial(heartbeat.acquire_run, run, world.world_size, checkpoint_format.say))
        with (
            heartbeat.write_heartbeat(
                run if world.is_rank_0 else None, world.world_size, stall=config.parallel.stall
            ) as beat,
            watch_ranks(
                world.rank, world.world_size, process_group.collective_timeout(config.parallel.timeout)
            ) as watched,
        ):

            def at(step: int, phase: str) -> None:
                beat(step, phase)
                watched(step, phase)

            return _train(config, run, resume, back_to, again, planned, stopping, world, at)


def _train(
    config: Config, run: Path, resume: bool, back_to: str | None, again: bool, planned: PlannedStep | None,
    stopping: list[int], world: process_group.RankInfo, at: Callable[[int, str], None],
) -> int:  # fmt: skip
    # The world: who we are, and which part of every clip is ours ------------------------------------
    shards = open_shards(config.data)
    config = resolve(config, shards.index)
    consistency.check_consistency(
        {**flat(config), **checkpoint_format.library_versions(), "code": consistency.source_digest(PACKAGES),
         "run": str(run.absolute()),
         "resume": resume, "back to": back_to, "again": again,
         "index.json": " ".join(found.digest for found in shards.sets)}
    )  # fmt: skip
    versions = {
        **checkpoint_format.library_versions(),
        **control_plane.run_on_rank_0(code_version),
    }  # git, on a node that is not in a hurry
    control_plane.run_on_rank_0(partial(check_shard_sizes, shards), patient=True)
    mesh = make_mesh(world.world_size, config.parallel.sp, world.device.type)
    if (
        told := placement_warning(control_plane.gather_objects(socket.gethostname()), config.parallel.sp)
    ) and world.is_rank_0:
        checkpoint_format.say(told)
    # of every bucket: where our frames lie in its clips, and which those are
    past_contexts = [
        own_past_context(mesh, config.model, config.parallel, clip_shape(config.model, config.parallel, *size))
        for size in latent_sizes(shards)
    ]
    batch, micro, accumulate = config.train.batch, config.train.micro, config.train.accumulate(mesh.dp)

    # The model, the same on every rank until DeepSpeed shards it -------------------------------------
    torch.manual_seed(config.train.seed)
    if config.train.init_from and not (
        resume and control_plane.run_on_rank_0(lambda: bool(checkpoint_directory.resume_candidates(run)))
    ):
        source = Path(config.train.init_from)
        newest = control_plane.run_on_rank_0(
            partial(checkpoint_directory.latest, source)
        )  # a run that is still training may save meanwhile
        with initialize_from.open_initial_weights(source, config.model, shards.index.autoencoder, newest) as (
            begun,
            fill,
        ):
            model = build(config.model, config.parallel, world.device, fill)
        for line in begun if world.is_rank_0 else []:
            checkpoint_format.say(line)
    else:
        model = build(config.model, config.parallel, world.device)
    engine = parallelize(model, config.parallel, config.optimizer, accumulate)

    # Where we are: the sample clock counts clips over all ranks and is all that order and schedules need
    writer = Writer(run, config.checkpoint, config.parallel.timeout)
    if back_to is not None:
        control_plane.run_on_rank_0(partial(rollback.roll_back, run, back_to, again))
    left_out = control_plane.run_on_rank_0(partial(rollback.read_excluded_ranges, run))
    before = checkpoint_format.load_newest(run, engine) if resume else None
    clock, step = (before.clock, before.step) if before else (0, 0)
    history = spike_guard.History.read(before.guard if before else None)
    if before:
        writer.step = step  # it need not be written again
    writer.reserve(engine)
    if world.is_rank_0:
        for change in checkpoint_format.resume_differences(
            before, shards.samples("train"), order_settings(config, shards)
        ):
            print(f"msc: {change}", file=sys.stderr, flush=True)
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / "config.yaml", dump(config).encode())
        RunFolder(run).write_latent_space(LatentSpace.of(shards.index))
        for name in ("log.jsonl", "skipped.jsonl", "broken.jsonl", "held_out.jsonl"):
            rollback.truncate_jsonl(run / name, step)

    # The data: this rank's rows and frames, from this clock on ---------------------------------------
    autoencoder = open_autoencoder(shards.index.autoencoder, world.device)
    builders = [
        InputBuilder(
            model=model,
            autoencoder=autoencoder,
            diffusion=config.diffusion,
            shift=frame_shift(config.diffusion, height, width),
            seed=config.train.seed,
            units=units,
            all_units=frames // config.model.frames_per_unit,
            text_dropout=config.data.text_dropout,
            device=world.device,
            past_context=past_context,
        )
        for (frames, height, width), (past_context, units) in zip(latent_sizes(shards), past_contexts, strict=True)
    ]
    clips = loader(
        shards,
        "train",
        seed=config.train.seed,
        clock=clock,
        clips=batch,
        rank=mesh.dp_rank,
        ranks=mesh.dp,
        frames=[(builder.frames.start, builder.frames.stop) for builder in builders],
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        window=config.data.window,
        max_bad=config.data.max_bad,
        attach=noise_beside(builders, latent_sizes(shards)),
    )
    known = control_plane.run_on_rank_0(partial(read_unreadable_clips, run))
    broken = UnreadableClips(run, shards.samples("train"), config.data.max_bad, known)
    # What is told, and to whom -----------------------------------------------------------------------
    tracker = Tracker(config.metrics)
    mlflow = (
        None if read_identity(run) else (before.mlflow if before else None)
    )  # the run folder knows better, if it knows
    tracker.start(run, flat(config), dump(config), run.name, resume=mlflow, enabled=world.is_rank_0)
    if step == 0:  # later it is the user's
        tracker.tags({"mlflow.note.content": DESCRIPTION})
    meter = Meter(world.device)
    tokens = [
        frames * cost.tokens_per_frame(config.model, height, width) for frames, height, width in latent_sizes(shards)
    ]
    flops = [cost.step_flops(config.model, *size) / world.world_size for size in latent_sizes(shards)]
    bar = tqdm(
        total=config.train.steps,
        initial=step,
        desc=run.name,
        unit="step",
        disable=not (world.is_rank_0 and sys.stderr.isatty()),
    )
    state: State = "FAILED"
    reports, off_plan = 0, False

    def save() -> None:
        at(step, "checkpoint")
        # the order of clips is a function of the seed and their number; `clock` is the cursor in it
        meta = checkpoint_directory.CheckpointMeta(
            step=step, clock=clock, clips=shards.samples("train"), guard=asdict(history), mlflow=tracker.run_id,
            config=flat(config), versions=versions,
        )  # fmt: skip
        tracker.log(writer.save(engine, meta), step)
        if broken.found and world.is_rank_0:
            tracker.artifact(broken.path)
        tracker.keep()

    def look() -> None:
        """Held-out loss and a preview from the averaged weights; training does not notice."""
        at(step, "held-out loss")
        with deepspeed_zero.averaged_weights(engine):
            losses = held_out_losses(engine.module, config, shards, builders, mesh.dp, mesh.dp_rank)
            pictures = write_preview(engine.module, config, shards, builders, run, step, world.rank) if step else []
        tracker.log(losses.metrics("held_out/"), step)
        for picture in pictures if world.is_rank_0 else []:
            tracker.artifact(picture, "samples")
        if world.is_rank_0:
            append_jsonl(run / "held_out.jsonl", {"step": step, "clock": clock, **losses.metrics("")})
            bar.write(f"step {step}: held-out loss {losses.mean:.4f} (averaged weights)", file=sys.stderr)

    try:
        if step == 0 and config.train.evaluate:
            look()
        losses = LossByNoise.zeros(world.device)
        while clock < config.train.clips:
            # One step: all its clips, their noise, and how many frames count over all ranks
            at(step, "reading clips")
            with meter.waiting():
                clips_of_step = next(clips)
            at(step, "counting frames")
            builder = builders[clips_of_step.bucket]
            supervised, unread = (builder.levels(clips_of_step) > 0).sum(), len(clips_of_step.unreadable)
            counted, stop, bad = process_group.all_reduce_sum(
                torch.tensor([float(supervised), float(bool(stopping)), float(unread)], device=world.device)
            ).tolist()
            if stop:
                break
            if bad:
                met = control_plane.gather_objects(clips_of_step.unreadable)
                broken.note(step, (pair for pairs in met for pair in pairs), world.is_rank_0)
            if rollback.is_excluded(left_out, clock, batch):
                step, clock = step + 1, clock + batch
                bar.update()
                continue
            rate = set_schedule(engine.optimizer.param_groups, config.optimizer, clock, config.train.clips, batch)

            # Forward and backward; a rank's share of the global loss, times the world DeepSpeed averages over
            at(step, "forward and backward")
            of_step, errors_of_step = LossByNoise.zeros(world.device), []
            for clips_of_part in micro_batches(clips_of_step, micro):
                with meter.waiting():
                    part = builder(clips_of_part)
                with fp8.autocast(config.parallel.precision == "fp8"):
                    velocity = engine(part.noisy, part.t, part.text, part.labels, builder.past_context, part.all_t)
                errors = frame_losses(velocity, part.x, part.noise)
                of_step.add(errors.detach(), part.t, part.supervised)
                errors_of_step.append(errors.detach())
                share = (errors * part.supervised).sum() / counted
                deepspeed_zero.backward(engine, share * world.world_size)

            # The update, unless loss or gradient norm speak against it: then nothing has changed but the clock
            of_step.reduce()
            objection = partial(spike_guard.skip_reason, config.guard, history, of_step.mean)
            norm, objected = deepspeed_zero.step(engine, objection)
            history = spike_guard.updated_history(config.guard, history, of_step.mean, norm, objected)
            step, clock = step + 1, clock + batch
            if objected:
                found = control_plane.gather_objects(rollback.clip_losses(clips_of_step, errors_of_step))
                if world.is_rank_0:
                    tracker.log({"skipped": history.skipped}, step)
                    rollback.record_skipped_step(run, step, clock - batch, batch, objected, found)
                if history.in_a_row >= config.guard.stop_after:
                    writer.leave(others_live=True)  # the last checkpoint is one to go back to, once it is whole
                    raise DeterministicFailure(rollback.too_many_skipped_message(run, step, history.in_a_row, objected))
            else:
                losses.merge(of_step)
            meter.step(batch * tokens[clips_of_step.bucket], batch, batch * flops[clips_of_step.bucket])
            bar.update()

            # Reports, checkpoints, held-out loss
            at(step, "report")
            done = clock >= config.train.clips
            if step % config.train.report == 0 or done:
                values = {
                    "loss": losses.mean,
                    "grad_norm": norm,
                    "lr": rate,
                    "clock": clock,
                    "skipped": history.skipped,
                    "broken": len(broken.found),
                    **meter.read(),
                }
                reports += 1  # the first holds compilation and the first allocations
                if reports == 1 and config.parallel.compile and world.is_rank_0 and (why := graph_breaks()):
                    told = f"blocks are compiled in pieces, so that the CPU takes longer to start a step: {why}"
                    bar.write(f"msc: {told}", file=sys.stderr)
                if planned is not None and reports > 1 and world.is_rank_0:
                    tracker.log(plan_ratios(values, planned), step)
                    if not off_plan and (told := describe_deviation(values, planned)):
                        off_plan = True
                        bar.write(f"msc: step {step}: {told}", file=sys.stderr)
                tracker.log({**values, **losses.metrics("loss/")}, step)
                if world.is_rank_0:
                    append_jsonl(run / "log.jsonl", {"step": step, **values})
                    bar.set_postfix(loss=f"{losses.mean:.4f}")
                    if bar.disable:
                        print(progress(step, config.train.steps, values), file=sys.stderr, flush=True)
                losses = LossByNoise.zeros(world.device)
            if step % config.checkpoint.every == 0 and not done:
                save()
            if config.train.evaluate and step % config.train.evaluate == 0 and not done:
                look()
                meter.read()  # its time is not training's
        save()
        writer.finish()
        if clock >= config.train.clips and config.train.evaluate:
            look()
        state = "FINISHED" if clock >= config.train.clips else "KILLED"
        if world.is_rank_0 and state == "KILLED":
            print(f"stopped at step {step}, saved; go on with: msc train --resume --run {run}", file=sys.stderr)
        return 0 if state == "FINISHED" else REQUEUE
    except KeyboardInterrupt:
        state = "KILLED"
        raise
    except Exception as error:
        writer.leave(others_live=not is_communication_error(error))
        raise
    finally:
        bar.close()
        clips.close()
        tracker.finish(state)
        if state != "FAILED":  # after a failure the others may hang in a collective: do not wait for them
            process_group.leave_process_group()


def order_settings(config: Config, shards: Shards) -> dict[str, Any]:
    """What the order of clips depends on, besides the seed and their number, as it is kept in a checkpoint."""
    names = ["data.window", *(["train.batch"] if len(shards.shapes) > 1 else [])]
    names += ["data.shards"] if len(shards.sets) > 1 else []
    return {name: value for name, value in flat(config).items() if name in names}


def progress(step: int, steps: int, values: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
        f"{values['tokens_per_s']:,.0f} tokens/s  {values['clips_per_s']:.2f} clips/s  wait {values['data_wait']:.1%}"
    )
