# ruff: noqa: F811 - `shards` is a fixture
"""Runs that are killed, stopped, rolled back and resumed, and every fault on the way: real processes, real files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from faults import PROGRAM
from test_tracking import free_port, server
from test_training import SMALL, curve, final_weights, msc, room, shards, wait_for  # noqa: F401

from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.run_folder import RunFolder
from msc.pretrain.tracking.mlflow_store import read_identity


class Run:
    """One run folder and the command that trains in it, `msc` with faults."""

    def __init__(self, folder: Path, shards: Path, *settings: str, processes=2, sp=1, stage=2, steps=60, **faults):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run, self.faults = folder, folder / "run", {"consumed": str(folder), **faults}
        self.arguments = [
            "train", "--run", str(self.run), "--processes", str(processes), f"data.shards={shards}", *SMALL,
            f"parallel.sp={sp}", f"parallel.zero.stage={stage}", f"train.clips={4 * steps}", "checkpoint.every=2",
            *settings,
        ]  # fmt: skip

    def start(self, *arguments: str, **options) -> subprocess.Popen[str]:
        """A process of its own; goes on from what is there."""
        again = (self.run / "config.yaml").exists()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MSC_FAULTS": json.dumps(self.faults)}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            *self.arguments,
            *arguments,
            *(["--resume"] if again else ["--preset=demo"]),
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=environment, **options)  # fmt: skip

    def go(self, *arguments: str, code: int = 0, **options) -> str:
        output, _ = (process := self.start(*arguments, **options)).communicate(timeout=280)
        assert process.returncode == code, output
        return output

    def consumed(self, rank: int = 0) -> list[dict]:
        file = self.folder / f"{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def committed(self, rank: int) -> list[tuple[int, list[int]]]:
        """(clock, samples) of the steps that count: of every start those before the checkpoint of the next start."""
        steps: list[tuple[int, list[int]]] = []
        for line in self.consumed(rank):
            if "from" in line:
                assert not steps or line["from"] <= steps[-1][0] + 4, "a gap"
                steps = [step for step in steps if step[0] < line["from"]]
                assert len(steps) == line["from"] // 4, "a gap"
            else:
                steps.append((line["clock"], line["samples"]))
        return steps

    def writing(self) -> bool:
        return any(RunFolder(self.run).checkpoints.glob(".step-*.writing*"))


def kill_all(launcher: subprocess.Popen[str], chance: random.Random) -> None:
    """SIGKILL to the launcher, its ranks and their workers, in any order; all are gone afterwards."""
    process = psutil.Process(launcher.pid)
    family = [process, *process.children(recursive=True)]
    chance.shuffle(family)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # a rank dies with its launcher
            one.kill()
    launcher.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def killed_again_and_again(whole: Run, run: Run, kills: int, processes: int, seed: int) -> dict[str, int]:
    """Kill `run` at random moments, let it end, and compare it with `whole`, which was left alone."""
    chance = random.Random(seed)
    counts = {"kills": 0, "before the first step": 0, "while a checkpoint was written": 0, "steps redone": 0}
    while counts["kills"] < kills:
        before, launcher = len(run.consumed()), run.start()
        if chance.random() < 0.1:
            time.sleep(chance.uniform(0.3, 3.0))
        else:
            steps = chance.randint(1, 6)
            wait_for(lambda: len(run.consumed()) > before + steps or launcher.poll() is not None, every=0.01)  # noqa: B023
            time.sleep(chance.uniform(0.0, 0.2))
        assert launcher.poll() is None, "the run ended before it was killed often enough: " + launcher.stdout.read()
        counts["while a checkpoint was written"] += run.writing()
        kill_all(launcher, chance)
        counts["kills"] += 1
        counts["before the first step"] += len(run.consumed()) <= before + 1
    run.go()
    whole.go()
    for rank in range(processes):
        lines = [line for line in run.consumed(rank) if "clock" in line]
        counts["steps redone"] += (len(lines) - len(run.committed(rank))) if rank == 0 else 0
        assert run.committed(rank) == whole.committed(rank)
        assert [clock for clock, _ in run.committed(rank)] == list(range(0, 4 * len(run.committed(rank)), 4))
    assert torch.equal(curve(run.run), curve(whole.run))
    expected = final_weights(whole.run)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(run.run).items())
    assert checkpoint_directory.latest(run.run).name == checkpoint_directory.latest(whole.run).name
    return counts


def test_killed_once_and_the_same_run(shards, tmp_path):
    one = {"processes": 1, "steps": 10}
    run = Run(tmp_path / "killed", shards, **one, step_s=0.1, chunk_s=0.005)
    killed_again_and_again(Run(tmp_path / "whole", shards, **one), run, kills=1, processes=1, seed=3)


@pytest.mark.slow
@pytest.mark.gloo
def test_killed_twenty_times_and_the_same_run(shards, tmp_path):
    workers = "data.workers=1"
    run = Run(tmp_path / "killed", shards, workers, step_s=0.1, chunk_s=0.005)
    counts = killed_again_and_again(Run(tmp_path / "whole", shards, workers), run, kills=20, processes=2, seed=2)
    print(counts)
    assert counts["while a checkpoint was written"] >= 5


# Faults ------------------------------------------------------------------------------------------------


@pytest.mark.gloo
def test_nan_on_one_rank_skips_that_step_and_nothing_else(shards, tmp_path):
    run = Run(tmp_path, shards, "data.workers=1", steps=8, nan=[1, [8, 20]])
    output = run.go()
    assert "step 3 is skipped: loss nan" in output and "step 6 is skipped: loss nan" in output
    lines = [json.loads(line) for line in (run.run / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["clock"] for line in lines] == list(range(4, 36, 4)), "the sample clock goes on"
    first = json.loads((run.run / "skipped.jsonl").read_text().splitlines()[0])
    second_rank = next(line["samples"] for line in run.consumed(1) if line.get("clock") == 8)
    assert first["clock"] == 8 and len(first["clips"]) == 4
    assert {clip["sample"] for clip in first["clips"] if clip["error"] is None} == set(second_rank)
    assert all(torch.isfinite(value).all() for value in final_weights(run.run).values())
    assert checkpoint_directory.newest_meta(run.run).adam_steps == 6


@pytest.mark.parametrize("ahead", [-120, pytest.param(600, marks=pytest.mark.slow)])
def test_a_second_training_in_the_same_folder_from_a_node_with_another_clock(ahead, shards, tmp_path):
    run = Run(tmp_path, shards, processes=1, steps=500, step_s=0.2, ahead=ahead)
    process = run.start()
    wait_for(lambda: len(run.consumed()) > 3)
    run.faults.pop("ahead")
    output = run.go(code=2)
    assert f"{run.run} is being trained: process {process.pid} on " in output and len(output.splitlines()) == 2, output
    kill_all(process, random.Random(0))


def test_the_run_folder_is_deleted_during_training(shards, tmp_path):
    """What a resumed run needs is there again at the end; without config.yaml it resumes by the newest checkpoint."""
    whole = Run(tmp_path / "whole", shards, processes=1, steps=12)
    whole.go()
    run = Run(tmp_path / "hurt", shards, processes=1, steps=12, step_s=0.3)
    process = run.start()
    wait_for(lambda: len(run.consumed()) > 5, every=0.01)
    shutil.rmtree(run.run, ignore_errors=True)  # a file may be written meanwhile
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and re.search(r"config.yaml, data.json (was|were) removed from", output), output
    expected = final_weights(whole.run)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(run.run).items())
    (run.run / "config.yaml").unlink()
    done = msc("train", "--resume", "--run", run.run, "--processes", "1", "train.clips=64")
    assert done.returncode == 0, done.stderr
    assert "resuming with the configuration of the checkpoint of step 12" in done.stderr
    assert checkpoint_directory.latest(run.run).name == "step-00000016" and (run.run / "config.yaml").is_file()


@pytest.mark.gloo
def test_too_many_skipped_steps_stop_the_run_and_a_rollback_excludes_all_clips_since(shards, tmp_path):
    run = Run(tmp_path, shards, "guard.stop_after=3", "checkpoint.keep=9", steps=12, sp=2, nan=[1, [16, 20, 24]])
    output = run.go(code=65)
    samples = [sample for line in run.consumed() if line.get("clock") in (16, 20, 24) for sample in line["samples"]]
    assert "3 steps in a row were skipped" in output and "Traceback" not in output
    assert all(re.search(rf"Samples: .*\b{sample}\b", output) for sample in samples)
    assert f"msc train --run {run.run} --rollback N, N one of 6, 4, 2" in output
    newest = checkpoint_directory.latest(run.run)
    assert newest.name == "step-00000006" and not checkpoint_directory.verify(newest)
    assert run.go("--rollback", "5", code=2).startswith("msc: 5 is not a checkpoint of")

    output = run.go("--rollback", "2")
    assert "rolled back to step 2; excluded clips, by sample clock: 8-27; 2 later checkpoints" in output
    assert json.loads((run.run / "left_out.json").read_text()) == {"clips": [[8, 28]], "back_to": "step-00000002"}
    meta = checkpoint_directory.CheckpointMeta.read(checkpoint_directory.latest(run.run))
    assert (meta.step, meta.clock, meta.adam_steps, meta.guard["skipped"]) == (12, 48, 7, 0)
    assert (RunFolder(run.run).checkpoints / "undone-step-00000006").is_dir()

    expected = final_weights(run.run)  # the same command again only resumes, and leaves out the same
    checkpoint_directory.set_latest(run.run, checkpoint_directory.find(run.run, "2"))
    output = run.go("--rollback", "2")
    assert "resuming from the newest" in output and "is skipped" not in output
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(run.run).items())


@pytest.mark.slow
@pytest.mark.gloo
def test_a_rank_is_lost_while_a_checkpoint_is_written(shards, tmp_path):
    """The other one does not wait for that checkpoint, which can never be whole, but ends and says who is missing."""
    run = Run(tmp_path, shards, "parallel.timeout=60", steps=500, step_s=0.05, chunk_s=0.5)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    try:
        with pytest.MonkeyPatch.context() as patched:  # as another launcher starts them, which leaves them alone
            for rank in range(2):
                for name, value in {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
                    patched.setenv(name, value)
                ranks.append(run.start())
        wait_for(lambda: len(list(RunFolder(run.run).checkpoints.glob(".step-*/rank-*"))) == 2, every=0.01)
        ranks[1].kill()
        began = time.monotonic()
        output, _ = ranks[0].communicate(timeout=100)
        assert time.monotonic() - began < 30 and ranks[0].returncode == 1, output
        assert re.search(
            r"msc: (rank 0: )?rank 1 \(process \d+ on .*\) is silent, its last heartbeat was in step", output
        ), output
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
@pytest.mark.gloo
def test_damaged_checkpoints_cost_time_and_no_data(shards, tmp_path):
    """A truncated, a flipped and a missing file in the last three: the run ends as if nothing had been."""
    run = Run(tmp_path, shards, "checkpoint.keep=9", steps=8)
    run.go()
    expected, lines = final_weights(run.run), curve(run.run)
    six, seven, eight = (
        checkpoint_directory.find(run.run, step) / "rank-00001.safetensors" for step in ("4", "6", "8")
    )
    eight.write_bytes(eight.read_bytes()[:-100])
    content = bytearray(seven.read_bytes())
    content[len(content) // 2] ^= 4
    seven.write_bytes(content)
    six.unlink()
    output = run.go()
    assert output.count("training resumes from step-00000002") == 3
    for name in ("bytes", "does not match its checksum", "is missing"):
        assert name in output
    assert torch.equal(curve(run.run), lines) and checkpoint_directory.latest(run.run).name == "step-00000008"
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(run.run).items())
    assert [line["from"] for line in run.consumed() if "from" in line] == [0, 8]


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_written(shards, tmp_path):
    """One: that checkpoint and another of the last step are written. Two: neither, and the one before stays whole."""
    run = Run(tmp_path, shards, processes=1, steps=500, step_s=0.05, chunk_s=0.02)

    def started() -> subprocess.Popen[str]:
        process = run.start()
        before = checkpoint_directory.list_checkpoints(run.run)
        wait_for(lambda: checkpoint_directory.list_checkpoints(run.run) != before and run.writing(), every=0.01)
        return process

    process = started()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    meta = checkpoint_directory.CheckpointMeta.read(checkpoint_directory.latest(run.run))
    last = run.consumed()[-1]["clock"]
    assert meta.clock in (last, last + 4), "all steps taken are in it; the batch after them may have been read"
    assert not run.writing() and not any(
        checkpoint_directory.verify(path) for path in checkpoint_directory.list_checkpoints(run.run)
    )

    process = started()
    newest = checkpoint_directory.latest(run.run).name
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: SIGTERM came twice" in output, output
    assert checkpoint_directory.latest(run.run).name in (
        newest,
        checkpoint_directory.checkpoint_name(int(newest[-8:]) + 2),
    )
    assert checkpoint_directory.step_of(checkpoint_directory.latest(run.run)) % 2 == 0, "no checkpoint of its own"
    assert not checkpoint_directory.verify(checkpoint_directory.latest(run.run))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(shards, tmp_path):
    """Checkpoints on a disk of their own that one fits on, and two do not: the first stays, and the run goes on
    from it when there is room."""
    run = Run(tmp_path, shards, "checkpoint.keep=1", processes=1, steps=8)
    Run(tmp_path / "whole", shards, processes=1, steps=8).go()
    size = sum(file.stat().st_size for file in checkpoint_directory.latest(tmp_path / "whole" / "run").iterdir())
    disk = RunFolder(run.run).checkpoints
    subprocess.run(["mkdir", "-p", disk], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", disk], check=True)
    (run.run / "config.yaml").touch()
    try:
        output = run.go("--preset=demo", code=2)
        assert output.count("No space left on device") >= 2 and "Traceback" not in output
        assert [path.name for path in checkpoint_directory.list_checkpoints(run.run)] == ["step-00000002"]
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", disk], check=True)
        run.go()
        expected = final_weights(tmp_path / "whole" / "run")
        assert all(torch.equal(value, expected[name]) for name, value in final_weights(run.run).items())
        assert run.committed(0) == [(clock, s) for clock, s in Run(tmp_path / "whole", shards).committed(0)]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
@pytest.mark.gloo
def test_another_world_and_stage_at_every_stop(shards, tmp_path):
    """(dp, sp) 1,2 -> 2,1 -> 2,2 -> 1,1 at stages 1, 2, 3 and 1: the losses of one process that was left alone."""
    whole = Run(tmp_path / "whole", shards, processes=1, stage=1, steps=24)
    whole.go()
    legs = [(2, 2, 1), (2, 1, 2), (4, 2, 3) if room(4) else (2, 2, 3), (1, 1, 1)]
    for leg, (processes, sp, stage) in enumerate(legs):
        stop = {"stop_at": 24 * (leg + 1)} if leg < 3 else {}
        run = Run(tmp_path / "parts", shards, processes=processes, sp=sp, stage=stage, steps=24, **stop)
        output = run.go(code=75 if stop else 0)
        assert not stop or "stopped at step" in output
    expected, actual = curve(whole.run), curve(run.run)
    print("largest relative difference of loss, norm:", ((actual - expected).abs() / expected).amax(0).tolist())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.gloo
def test_rank_0_is_stopped_and_the_terminal_shows_the_verdict(shards, tmp_path):
    run = Run(tmp_path, shards, "parallel.timeout=20", steps=500, step_s=0.1)
    launcher = run.start()
    wait_for(lambda: len(run.consumed(1)) > 3)
    ranks = psutil.Process(launcher.pid).children()
    next(one for one in ranks if one.environ().get("RANK") == "0").suspend()
    output, _ = launcher.communicate(timeout=90)
    print(output)
    assert launcher.returncode == 1 and '  File "' not in output, output
    assert re.search(r"\[rank 1\] msc: rank 1: rank 0.*(does not answer|is silent)", output), output


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("what", ["stalled", "killed"])
def test_a_rank_is_lost_and_the_run_goes_on_with_fewer(what, shards, tmp_path):
    """Within the timeout, with a line that names the rank; then one rank goes on, with the losses of a whole run."""
    whole = Run(tmp_path / "whole", shards, processes=1, stage=1, steps=12)
    whole.go()
    fault = {"hang": [1, 24]} if what == "stalled" else {"step_s": 0.3}
    run = Run(tmp_path / "hurt", shards, "parallel.timeout=20", sp=2, stage=3, steps=12, **fault)
    launcher = run.start()
    wait_for(lambda: len(run.consumed(1)) > 6)
    began = time.monotonic()
    if what == "killed":
        ranks = psutil.Process(launcher.pid).children()
        next(one for one in ranks if one.environ().get("RANK") == "1").kill()
    output, _ = launcher.communicate(timeout=60)
    print(output)
    assert launcher.returncode not in (0, 75) and "rank 1" in output and time.monotonic() - began < 30
    Run(tmp_path / "hurt", shards, processes=1, stage=2, steps=12).go()
    assert [line["from"] for line in run.consumed() if "from" in line][-1] > 0
    torch.testing.assert_close(curve(run.run), curve(whole.run), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_the_mlflow_server_is_down_for_a_minute_and_the_run_is_killed_meanwhile(shards, tmp_path):
    """Training goes on; afterwards one run holds every step, also after kill -9 and a resume."""
    from mlflow import MlflowClient

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    settings = f"metrics.tracking_uri={uri}", "checkpoint.every=20"
    run = Run(tmp_path, shards, *settings, processes=1, steps=240, step_s=0.4)

    def steps() -> int:
        return len([line for line in run.consumed() if "clock" in line])

    with server(tmp_path / "server", port):
        first = run.start()
        wait_for(lambda: steps() > 4 and read_identity(run.run).get("run_id"), seconds=120)
    down, before = time.monotonic(), steps()
    wait_for(lambda: steps() > before + 30)
    kill_all(first, random.Random(0))
    second = run.start()
    time.sleep(max(0.0, down + 60 - time.monotonic()))
    assert second.poll() is None and steps() > before + 60, "training went on"
    with server(tmp_path / "server", port):
        output, _ = second.communicate(timeout=200)
        assert second.returncode == 0, output
        assert "cannot be used now" in output and "is back" in output
        client = MlflowClient(uri)
        (mlflow_run,) = client.search_runs([client.get_experiment_by_name("msc").experiment_id])
        history = client.get_metric_history(mlflow_run.info.run_id, "loss")
    assert mlflow_run.info.status == "FINISHED"
    missing = set(range(1, 241)) - {point.step for point in history}
    print("steps of which MLflow holds nothing:", sorted(missing))
    assert not missing
