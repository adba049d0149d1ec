"""Training: from joining the process group to the last checkpoint. `_train` reads from top to bottom."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from msc.datasets.errors import REQUEUE, DeterministicFailure
from msc.datasets.files import append_jsonl, write_atomically
from msc.datasets.loading.dataloader import loader
from msc.datasets.loading.mixture import Shards, check_shard_sizes, open_shards
from msc.parallel import consistency, control_plane, deepspeed_zero, fp8, process_group
from msc.parallel.console import configure_logging
from msc.parallel.mesh import make_mesh, placement_warning
from msc.parallel.progress import Progress
from msc.parallel.signals import STOP_SIGNALS, collect_signals
from msc.parallel.watchdog import is_communication_error, watch_ranks

from . import cost
from .batch_inputs import InputBuilder, NoiseSource, draw_noise, micro_batches
from .checkpoints import directory as checkpoint_directory
from .checkpoints import format as checkpoint_format
from .checkpoints import initialize_from, rollback
from .checkpoints.async_writer import CheckpointWriter
from .config import Config, dump, flat, plain
from .diffusion.autoencoder import open_autoencoder
from .diffusion.loss import Loss
from .evaluation.held_out_loss import LossByNoise, held_out_losses
from .inference.preview import write_preview
from .kernels.compile_helpers import graph_breaks
from .model.latent_space import LatentSpace
from .model.transformer import MSCTransformer
from .optimizer import set_schedule
from .parallelize import build_model, clip_shape, own_past_context, parallelize
from .run_folder import RunFolder
from .tracking import heartbeat, spike_guard
from .tracking.mlflow_store import code_version, read_identity
from .tracking.plan_deviation import describe_deviation, plan_ratios
from .tracking.throughput import DESCRIPTION, Meter
from .tracking.tracker import State, Tracker
from .tracking.unreadable_clips import UnreadableClips, read_unreadable_clips
from .training_start import TrainingStart
from .validation import latent_sizes, resolve

log = logging.getLogger(__name__)
PACKAGES = [Path(__file__).parents[1] / name for name in ("pretrain", "parallel", "datasets", "launch")]


def train(start: TrainingStart) -> int:
    """Train in this process, one of the world that RANK and WORLD_SIZE describe; returns the exit code."""
    configure_logging()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)  # all stacks to stderr on request, also while a C call never returns
    config, run = start.config, start.run
    # A second signal of a kind interrupts at once. Not so SIGTERM and SIGUSR1 from Slurm, which repeats itself (at a
    # time limit slurmd and srun both send SIGTERM) and has SIGKILL for those who take too long.
    interrupting = (signal.SIGINT,) if "SLURM_STEP_ID" in os.environ else STOP_SIGNALS
    with collect_signals(interrupting) as stop_signals:
        world = process_group.join_process_group(config.parallel.timeout)
        # A second time: since the command line checked, imports and waiting for all ranks have taken their time.
        control_plane.run_on_rank_0(partial(heartbeat.acquire_run, run, world.world_size))
        progress, timeout = Progress(), process_group.collective_timeout(config.parallel.timeout)
        heartbeat_run, stall = (run, config.parallel.stall) if world.is_rank_0 else (None, 0.0)
        with (
            heartbeat.write_heartbeat(heartbeat_run, world.world_size, progress),
            watch_ranks(world.rank, world.world_size, timeout, progress, stall),
        ):
            return _train(start, world, stop_signals, progress.at)


def _train(
    start: TrainingStart,
    world: process_group.RankInfo,
    stop_signals: list[int],
    enter_phase: Callable[[int, str], None],
) -> int:
    # --- the world: which rank this is, and which part of every clip is its own ------------------------------
    folder = RunFolder(start.run)
    shards = open_shards(start.config.data)
    config = resolve(start.config, shards.index)
    versions = checkpoint_format.library_versions()
    consistency.check_consistency(
        {**flat(config), **versions, "code": consistency.source_digest(PACKAGES), "run": str(folder.path.absolute()),
         "resume": start.resume, "rollback": start.rollback, "again": start.again,
         "index.json": " ".join(shard_set.digest for shard_set in shards.sets)}
    )  # fmt: skip
    versions |= control_plane.run_on_rank_0(code_version)  # calls git, which takes its time on a busy node
    control_plane.run_on_rank_0(partial(check_shard_sizes, shards), slow=True)
    mesh = make_mesh(world.world_size, config.parallel.sp, world.device.type)
    if warning := placement_warning(control_plane.gather_objects(socket.gethostname()), config.parallel.sp):
        log.info(warning)
    if world.device.type == "cpu" and config.parallel.precision != "fp32":
        log.info("parallel.precision is %s, on a CPU several times slower than fp32", config.parallel.precision)
    batch_size, accumulate = config.train.batch, config.train.accumulate(mesh.dp)

    # --- the model: the same on every rank until DeepSpeed shards it -----------------------------------------
    torch.manual_seed(config.train.seed)
    model = initial_model(start, config, shards, world.device)
    engine = parallelize(model, config.parallel, config.optimizer, accumulate)

    # --- resume: the sample clock counts clips over all ranks; order and schedules depend on nothing else ----
    writer = CheckpointWriter(folder.path, config.checkpoint, config.parallel.timeout)
    if start.rollback is not None:
        control_plane.run_on_rank_0(partial(rollback.roll_back, folder.path, start.rollback, start.again))
    excluded_ranges = control_plane.run_on_rank_0(partial(rollback.read_excluded_ranges, folder.path))
    checkpoint = checkpoint_format.load_newest(folder.path, engine) if start.resume else None
    clock, step = (checkpoint.clock, checkpoint.step) if checkpoint else (0, 0)
    history = spike_guard.History.read(checkpoint.guard if checkpoint else None)
    if checkpoint:
        writer.step = step  # it need not be written again
        log.info("resuming from step %d: %d of %d clips seen", step, clock, config.train.clips)
        now = plain(flat(config))
        if changed := [name for name, value in plain(checkpoint.config).items() if now.get(name, value) != value]:
            was = [f"{name} {checkpoint.config[name]} -> {now[name]}" for name in changed]
            log.info("settings that changed since then: %s", "; ".join(was))
    writer.reserve(engine)
    if world.is_rank_0:
        order = order_settings(config, shards)
        for difference in checkpoint_format.resume_differences(checkpoint, shards.samples("train"), order):
            log.info(difference)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.config, dump(config).encode())
        folder.write_latent_space(LatentSpace.of(shards.index))
        for path in folder.step_logs:
            rollback.truncate_jsonl(path, step)
    settings = folder.read_settings() if world.is_rank_0 else {}

    # --- data: this rank's clips and frames, from this clock on ----------------------------------------------
    autoencoder = open_autoencoder(shards.index.autoencoder, world.device)
    builders, tokens, flops = [], [], []  # of every bucket
    for size in latent_sizes(shards):
        clip = clip_shape(config.model, config.parallel, *size)
        past_context, units = own_past_context(mesh, config.model, config.parallel, clip)
        noise = NoiseSource(
            config.diffusion, config.train.seed, size, config.model.channels, config.model.frames_per_unit, units
        )
        builders.append(
            InputBuilder(
                model,
                autoencoder,
                noise,
                world.device,
                config.data.text_dropout,
                config.data.signal_dropout,
                past_context,
            )
        )
        tokens.append(size[0] * cost.tokens_per_frame(config.model, *size[1:]))
        flops.append(cost.step_flops(config.model, *size) / world.world_size)
    batches = loader(
        shards, "train", seed=config.train.seed, clock=clock, clips=batch_size, rank=mesh.dp_rank, ranks=mesh.dp,
        frames=[(builder.frames.start, builder.frames.stop) for builder in builders],
        workers=config.data.workers, prefetch=config.data.prefetch, window=config.data.window,
        max_bad=config.data.max_bad, draw=partial(draw_noise, [builder.noise for builder in builders]),
    )  # fmt: skip
    reasons = control_plane.run_on_rank_0(partial(read_unreadable_clips, folder.path))
    unreadable = UnreadableClips(folder.path, shards.samples("train"), config.data.max_bad, reasons)

    # --- reports ---------------------------------------------------------------------------------------------
    tracker, meter = Tracker(config.metrics), Meter(world.device)
    # of a checkpoint copied here without its MLflow run; otherwise the run folder names the newer one
    mlflow_run = checkpoint.mlflow if checkpoint and not read_identity(folder.path) else None
    name = folder.path.name
    tracker.start(folder.path, flat(config), dump(config), name, resume=mlflow_run, enabled=world.is_rank_0)
    if step == 0:  # later the note is the user's
        tracker.tags({"mlflow.note.content": DESCRIPTION})
    show_bar = world.is_rank_0 and sys.stderr.isatty()
    bar = tqdm(total=config.train.steps, initial=step, desc=name, unit="step", disable=not show_bar)
    reports, has_deviated = 0, False
    state: State = "FAILED"

    def save_checkpoint() -> None:
        enter_phase(step, "checkpoint")
        if control_plane.run_on_rank_0(partial(folder.restore_settings, settings)):
            writer.step = None  # where the run folder was deleted, the last checkpoint is gone as well
        # the order of clips is a function of the seed and their number; `clock` is the position in it
        meta = checkpoint_directory.CheckpointMeta(
            step=step, clock=clock, clips=shards.samples("train"), guard=asdict(history), mlflow=tracker.run_id,
            config=flat(config), versions=versions,
        )  # fmt: skip
        tracker.log(writer.save(engine, meta), step)
        if unreadable.reasons and world.is_rank_0:
            tracker.artifact(unreadable.path)
        tracker.keep()

    def held_out_evaluation() -> None:
        """Held-out loss and previews of the averaged weights; training is as without."""
        enter_phase(step, "held-out evaluation")
        with deepspeed_zero.averaged_weights(engine):
            held_out = held_out_losses(engine.module, config, shards, builders, mesh.dp, mesh.dp_rank)
            previews = []
            if step:
                previews = write_preview(engine.module, config, shards, builders, folder.path, step, world.rank)
        tracker.log(held_out.metrics("held_out/"), step)
        if world.is_rank_0:
            for preview in previews:
                tracker.artifact(preview, "samples")
            append_jsonl(folder.held_out, {"step": step, "clock": clock, **held_out.metrics("")})
            log.info("step %d: held-out loss %.4f (averaged weights)", step, held_out.mean)

    try:
        loss = Loss()
        if step == 0 and config.train.evaluate:
            held_out_evaluation()
        since_report = LossByNoise.zeros(world.device)
        while clock < config.train.clips:
            # --- one batch; supervised frames, stop signals and unreadable clips are counted over all ranks --
            enter_phase(step, "reading clips")
            with meter.waiting():
                batch = next(batches)
            enter_phase(step, "counting frames")
            builder = builders[batch.bucket]
            own = [float(loss.supervised(builder.own_t(batch)).sum()), bool(stop_signals), len(batch.unreadable)]
            sums = process_group.all_reduce_sum(torch.tensor(own, device=world.device))
            supervised_frames, stopping, unreadable_count = sums.tolist()
            if stopping:
                break
            if unreadable_count:
                all_unreadable = control_plane.gather_objects(batch.unreadable)
                unreadable.add(step, (clip for clips in all_unreadable for clip in clips), world.is_rank_0)
            if rollback.is_excluded(excluded_ranges, clock, batch_size):
                step, clock = step + 1, clock + batch_size
                bar.update()
                continue
            rate = set_schedule(engine.optimizer.param_groups, config.optimizer, clock, config.train.clips, batch_size)

            # --- forward and backward --------------------------------------------------------------------------
            enter_phase(step, "forward and backward")
            of_step, errors_of_step = LossByNoise.zeros(world.device), []
            for micro_batch in micro_batches(batch, config.train.micro):
                with meter.waiting():
                    inputs = builder(micro_batch)
                with fp8.autocast(config.parallel.precision == "fp8"):
                    velocity = engine(inputs.noisy, inputs.t, inputs.condition, builder.past_context, inputs.all_t)
                errors = loss.per_frame(velocity, inputs.x, inputs.noise)
                of_step.add(errors.detach(), inputs.t, inputs.supervised)
                errors_of_step.append(errors.detach())
                # DeepSpeed averages gradients over the world, of which this is a rank's part of a sum
                part = loss.mean(errors, inputs.t, supervised_frames)
                deepspeed_zero.backward(engine, part * world.world_size)

            # --- update, unless the spike guard skips it: then nothing has changed but the clock ---------------
            of_step.reduce()
            guard = partial(spike_guard.skip_reason, config.guard, history, of_step.mean)
            norm, skip_reason = deepspeed_zero.step(engine, guard)
            history = spike_guard.updated_history(config.guard, history, of_step.mean, norm, skip_reason)
            step, clock = step + 1, clock + batch_size
            if skip_reason:
                clip_losses = control_plane.gather_objects(rollback.clip_losses(batch, errors_of_step))
                if world.is_rank_0:
                    tracker.log({"skipped": history.skipped}, step)
                    rollback.record_skipped_step(
                        folder.path, step, clock - batch_size, batch_size, skip_reason, clip_losses
                    )
                if history.in_a_row >= config.guard.stop_after:
                    writer.wait_after_failure(others_live=True)  # the last checkpoint is one to roll back to
                    raise DeterministicFailure(
                        rollback.too_many_skipped_message(folder.path, step, history.in_a_row, skip_reason)
                    )
            else:
                since_report.merge(of_step)
            meter.step(batch_size * tokens[batch.bucket], batch_size, batch_size * flops[batch.bucket])
            bar.update()

            # --- report, checkpoint, held-out evaluation -------------------------------------------------------
            enter_phase(step, "report")
            done = clock >= config.train.clips
            if step % config.train.report == 0 or done:
                values = {
                    "loss": since_report.mean, "grad_norm": norm, "lr": rate, "clock": clock,
                    "skipped": history.skipped, "broken": len(unreadable.reasons), **meter.read(),
                }  # fmt: skip
                reports += 1  # the first holds compilation and the first allocations
                tracker.log({**values, **since_report.metrics("loss/")}, step)
                if world.is_rank_0:
                    if reports == 1 and config.parallel.compile and (breaks := graph_breaks()):
                        log.info(
                            "compiled blocks have graph breaks, so that the CPU launches a step slower: %s", breaks
                        )
                    if start.planned is not None and reports > 1:
                        tracker.log(plan_ratios(values, start.planned), step)
                        if not has_deviated and (deviation := describe_deviation(values, start.planned)):
                            has_deviated = True
                            log.info("step %d: %s", step, deviation)
                    append_jsonl(folder.log, {"step": step, **values})
                    bar.set_postfix(loss=f"{values['loss']:.4f}")
                    if bar.disable:
                        log.info(progress_line(step, config.train.steps, values))
                since_report = LossByNoise.zeros(world.device)
            if step % config.checkpoint.every == 0 and not done:
                save_checkpoint()
            if config.train.evaluate and step % config.train.evaluate == 0 and not done:
                held_out_evaluation()
                meter.read()  # its time is not training's
        save_checkpoint()
        writer.finish()
        done = clock >= config.train.clips
        if done and config.train.evaluate:
            held_out_evaluation()
        state = "FINISHED" if done else "KILLED"
        if done:
            log.info(
                "finished at step %d; next: msc evaluate %s, msc sample %s, msc export %s", step, *[folder.path] * 3
            )
        else:
            log.info("stopped at step %d, saved; go on with: msc train --resume --run %s", step, folder.path)
        return 0 if done else REQUEUE
    except KeyboardInterrupt:
        state = "KILLED"
        raise
    except Exception as error:
        writer.wait_after_failure(others_live=not is_communication_error(error))
        raise
    finally:
        bar.close()
        batches.close()
        tracker.finish(state)
        if state != "FAILED":  # after a failure the others may hang in a collective: do not wait for them
            process_group.leave_process_group()


def initial_model(start: TrainingStart, config: Config, shards: Shards, device: torch.device) -> MSCTransformer:
    """A new model, with random weights or those of train.init_from, which a run that resumes does not read again."""
    candidates = partial(checkpoint_directory.resume_candidates, start.run)
    if not config.train.init_from or (start.resume and control_plane.run_on_rank_0(candidates)):
        return build_model(config.model, config.parallel, device)
    source = Path(config.train.init_from)
    with ExitStack() as stack:
        # one for all ranks, as a run that is still training may save and prune meanwhile
        newest = control_plane.run_on_rank_0(
            lambda: stack.enter_context(checkpoint_directory.held(source)) if RunFolder(source).exists() else None
        )
        autoencoder = shards.index.autoencoder
        weights = initialize_from.open_initial_weights(source, config.model, autoencoder, newest)
        lines, fill = stack.enter_context(weights)
        model = build_model(config.model, config.parallel, device, fill)
    for line in lines:
        log.info(line)
    return model


def order_settings(config: Config, shards: Shards) -> dict[str, Any]:
    """The settings that the order of clips depends on, besides the seed and their number, to compare on resume."""
    names = ["data.window", *(["train.batch"] if len(shards.shapes) > 1 else [])]
    names += ["data.shards"] if len(shards.sets) > 1 else []
    return {name: value for name, value in flat(config).items() if name in names}


def progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
        f"{values['tokens_per_s']:,.0f} tokens/s  {values['clips_per_s']:.2f} clips/s  wait {values['data_wait']:.1%}"
    )
