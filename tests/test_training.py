"""The whole training command in real processes: the same curve at any (dp, sp, ZeRO stage), resume, endings."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.synthetic import write_videos
from msc.launch import cli, commands
from msc.launch.processes import launcher
from msc.launch.processes.launcher import visible_gpus
from msc.pretrain.checkpoints.directory import CheckpointMeta, latest
from msc.pretrain.checkpoints.format import weights
from msc.pretrain.diffusion.autoencoder import open_autoencoder
from msc.pretrain.evaluation import evaluate as evaluation
from msc.pretrain.evaluation.evaluate import evaluate
from msc.pretrain.export import model_card
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.requests import EvaluateConfig

MSC = Path(sys.executable).with_name("msc")
SMALL = [
    "model.width=32",
    "model.depth=2",
    "model.patch=4",
    "model.scales=[{heads: 2, window: 1, patch_window: 3}, {heads: 1, space: 2, window: 3}, "
    "{heads: 1, space: 2, time: 2}]",
    "diffusion.shift=1.0",
    "diffusion.std=1.0",
    "data.workers=0",
    "optimizer.lr=1e-3",
    "optimizer.warmup=8",
    "train.batch=4",
    "train.micro=1",
    "train.report=1",
    "train.evaluate=0",
    "metrics.tracking_uri=none",
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    videos = write_videos(folder / "videos", seed=0, clips=4, frames=20, height=16, width=24)
    for video, word in zip(videos[1:], ("left", "right", "left"), strict=True):  # of the first they are unknown
        video.with_suffix(".actions.csv").write_text("action\n" + f"{word}\nup\n" * 10)
    config = ConvertConfig(
        sources=tuple(map(str, videos)), out=str(folder / "shards"), frames=5, height=16, width=24, fps=12.0,
        stride=2, held_out=0.3, autoencoder="pixels", signals=("actions",),
    )  # fmt: skip
    autoencoder = open_autoencoder("pixels")
    convert(config, autoencoder.encode, 1)
    return folder / "shards"


def train_words(shards, run, *settings, processes=1, sp=1, stage=2, steps=6, resume=False):
    return [
        "train", "--run", run, "--processes", str(processes), f"data.shards={shards}", *SMALL,
        f"parallel.sp={sp}", f"parallel.zero.stage={stage}", f"train.clips={4 * steps}", *settings,
        *(["--resume"] if resume else ["--preset", "demo"]),
    ]  # fmt: skip


def msc_train(*arguments, check=True, **options):
    done = msc(*train_words(*arguments, **options))
    assert not check or done.returncode == 0, done.stderr
    return done


def msc(*words):
    """In a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, [MSC, *words])), capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture
def here(capfd, monkeypatch):
    """`msc` in this process: for what soon ends and does not train, without the seconds that another start takes."""
    for name in (*commands.DISTRIBUTED, launcher.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("msc.pretrain.train.train", lambda *_: pytest.fail("it trains"))

    def command(*words):
        capfd.readouterr()
        code = cli.main(list(map(str, words)))
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return command


def room(processes):
    """Whether this machine can hold so many ranks: any number on CPUs, one on each GPU where there are GPUs."""
    gpus = visible_gpus(os.environ)
    return not gpus or processes <= gpus


def curve(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64)


def same_curve(run, expected):
    """Loss and gradient norm of every step, to rounding."""
    torch.testing.assert_close(curve(run), expected, rtol=1e-5, atol=0, msg=lambda m: f"{run.name}: {m}")


def final_weights(run):
    return dict(weights(latest(run), "raw"))


@pytest.mark.gloo
def test_the_same_curve_at_any_mesh(shards, tmp_path):
    """Same global batch: loss and gradient norm agree to rounding over 20 steps."""
    runs = {"1x1": (1, 1), "1x2": (2, 2), "2x1": (2, 1)}
    for name, (processes, sp) in runs.items():
        msc_train(shards, tmp_path / name, processes=processes, sp=sp, steps=20)
    expected = curve(tmp_path / "1x1")
    assert len(expected) == 20 and expected[-5:, 0].mean() < expected[:5, 0].mean()
    for name in ("1x2", "2x1"):
        same_curve(tmp_path / name, expected)


@pytest.fixture(scope="module")
def a_hundred_steps(shards, tmp_path_factory):
    """Their curve, by one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    msc_train(shards, run, stage=1, steps=100)
    return curve(run)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_curve_at_any_stage_and_mesh(stage, a_hundred_steps, shards, tmp_path):
    """100 optimizer steps in fp32, gradient accumulation and recomputation included."""
    if not room(2):
        pytest.skip("needs two GPUs, or none")
    settings = [f"parallel.recompute={('none', 'full', 'cheap', 'none')[stage]}"]
    for dp, sp in [(1, 2), (2, 1), (2, 2), (1, 4)]:
        if room(dp * sp):
            run = tmp_path / f"{dp}x{sp}"
            msc_train(shards, run, *settings, processes=dp * sp, sp=sp, stage=stage, steps=100)
            same_curve(run, a_hundred_steps)


@pytest.fixture(scope="session")
def bucketed(tmp_path_factory):
    """Landscape clips of 5 and 3 frames and portrait ones of 5."""
    folder = tmp_path_factory.mktemp("bucketed")
    write_videos(folder / "videos" / "wide", seed=0, clips=3, frames=29, height=16, width=24)
    write_videos(folder / "videos" / "tall", seed=1, clips=2, frames=24, height=24, width=16)
    buckets = ((5, 16, 24), (3, 16, 24), (5, 24, 16))
    config = ConvertConfig(
        sources=(str(folder / "videos"),), out=str(folder / "shards"), buckets=buckets, fps=12.0, stride=2,
        held_out=0.25, autoencoder="pixels",
    )  # fmt: skip
    convert(config, open_autoencoder("pixels").encode, 1)
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.gloo
def test_the_same_curve_at_any_mesh_with_shapes_that_change(shards, bucketed, tmp_path):
    """Buckets and a mixture: every mesh sees the same batches and learns the same; a resumed run goes on with them."""
    mixture = f"data.shards=[{{path: {bucketed}, weight: 2}}, {{path: {shards}, weight: 1}}]"
    options = (mixture, "train.batch=2", "train.clips=32", "train.evaluate=8", "train.held_out=4", "checkpoint.every=8")
    for name, processes, sp in (("1x1", 1, 1), ("1x2", 2, 2), ("2x1", 2, 1)):
        msc_train(bucketed, tmp_path / name, *options, processes=processes, sp=sp)
    expected = curve(tmp_path / "1x1")
    assert len(expected) == 16
    for name in ("1x2", "2x1"):
        same_curve(tmp_path / name, expected)
    (tmp_path / "1x1" / "checkpoints" / "latest").write_text("step-00000008")
    msc_train(bucketed, tmp_path / "1x1", *options, resume=True)
    assert torch.equal(curve(tmp_path / "1x1"), expected)
    evaluated = subprocess.run([MSC, "evaluate", tmp_path / "1x1"], capture_output=True, text=True, check=True)
    assert "held-out loss" in evaluated.stdout


@pytest.mark.slow
@pytest.mark.gloo
def test_training_from_an_address_is_training_from_the_folder(shards, tmp_path):
    """Two ranks, one cache, a real server; then a shard is gone, and training does not start."""
    served = tmp_path / "served"
    shutil.copytree(shards, served)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, cache = f"http://127.0.0.1:{server.server_port}", f"data.cache={tmp_path / 'cache'}"
        msc_train(url, tmp_path / "there", cache, processes=2)
        msc_train(shards, tmp_path / "here", processes=2)
        assert torch.equal(curve(tmp_path / "there"), curve(tmp_path / "here"))
        next(served.glob("train-*.tar")).unlink()
        done = msc_train(url, tmp_path / "gone", cache, check=False)
        assert done.returncode == 2
        missing = r"msc: http://127.*/train-.*tar could not be read in 5 tries: the server says 404"
        assert re.search(missing, done.stderr)
        assert not (tmp_path / "gone" / "log.jsonl").exists()
        server.shutdown()


@pytest.mark.slow
@pytest.mark.gloo
def test_the_same_curve_in_any_parallel_layout(shards, tmp_path):
    """Along time, with ZeRO-3 (which gathers parameters in step) and recomputation in the backward pass."""
    scales = "model.scales=[{heads: 2, window: 1, patch_window: 3}, {heads: 2}]"
    msc_train(shards, tmp_path / "one", scales, steps=10)
    expected = curve(tmp_path / "one")
    for layout in ("halo", "ulysses", "ring"):
        for recompute, stage in (("cheap", 2), ("full", 3)):
            settings = [scales, f"parallel.layout={layout}", f"parallel.recompute={recompute}"]
            run = tmp_path / f"{layout}-{recompute}"
            msc_train(shards, run, *settings, processes=2, sp=2, stage=stage, steps=10)
            same_curve(run, expected)


@pytest.mark.gloo
def test_resume_continues_exactly_and_on_another_mesh(shards, tmp_path):
    run = tmp_path / "run"
    msc_train(shards, run, "checkpoint.every=4", processes=2, sp=2, steps=8)
    newest, whole, expected = latest(run), curve(run), final_weights(run)
    assert newest.name == "step-00000008"
    # as if the run had ended right after the checkpoint of step 4
    (newest.parent / "latest").write_text("step-00000004")
    output = msc_train(shards, run, processes=2, sp=2, steps=8, resume=True).stderr
    assert "step 5/8" in output and "step 4/8" not in output
    assert torch.equal(curve(run), whole)
    for name, value in expected.items():
        assert torch.equal(final_weights(run)[name], value), name

    # the same from the same checkpoint in one process at ZeRO stage 0, and in two rows at stage 3
    for processes, stage in ((1, 0), (2, 3)):
        (newest.parent / "latest").write_text("step-00000004")
        msc_train(shards, run, processes=processes, sp=1, stage=stage, steps=8, resume=True)
        same_curve(run, whole)


@pytest.mark.parametrize("setting", ["model.depth=1", "model.gate=none", "train.seed=5"])
def test_a_run_does_not_go_on_as_another_model(shards, finished, setting, here):
    done = here(*train_words(shards, finished, setting, steps=4, resume=True))
    assert done.returncode == 2
    assert re.search(f"was trained with {setting.split('=')[0]} = .*cannot go on", done.stderr), done.stderr


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    msc_train(shards, run, steps=2)
    return run


def test_held_out_evaluation_and_checkpoints_change_nothing(shards, finished, tmp_path):
    """Held-out loss and preview from averaged weights, and a checkpoint on the way: the same curve and weights, bit for
    bit."""
    options = ("train.evaluate=1", "train.held_out=2", "checkpoint.every=1")
    msc_train(shards, tmp_path / "looking", *options, steps=2)
    assert len(list((tmp_path / "looking" / "checkpoints").glob("step-*"))) == 2
    assert len((tmp_path / "looking" / "held_out.jsonl").read_text().splitlines()) == 3
    assert torch.equal(curve(tmp_path / "looking"), curve(finished)[:2])
    averaged, expected = (dict(weights(latest(run), "ema")) for run in (tmp_path / "looking", finished))
    trained_to = final_weights(tmp_path / "looking")
    for name, value in final_weights(finished).items():
        assert torch.equal(trained_to[name], value) and torch.equal(averaged[name], expected[name]), name


def test_a_resumed_run_counts_clips_not_steps(shards, finished):
    """A larger batch on resumption: the end of the run is where its clips are seen."""
    msc_train(shards, finished, "train.batch=8", "train.clips=24", resume=True)
    assert [json.loads(line)["clock"] for line in (finished / "log.jsonl").read_text().splitlines()] == [4, 8, 16, 24]
    done = msc_train(shards, finished, "train.batch=8", "train.clips=8", resume=True)  # nothing left to do
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.gloo
def test_zero_3_shards_parameters_larger_than_its_threshold(shards, tmp_path):
    """DeepSpeed leaves parameters below 100,000 values whole: only a wider model is really partitioned."""
    wide = ["model.width=256", "checkpoint.every=3"]
    for name, stage in (("two", 2), ("three", 3)):
        msc_train(shards, tmp_path / name, *wide, processes=2, sp=2, stage=stage, steps=6)
    same_curve(tmp_path / "three", curve(tmp_path / "two"))
    run = tmp_path / "three"
    (run / "checkpoints" / "latest").write_text("step-00000003")
    msc_train(shards, run, *wide, processes=2, sp=1, stage=3, steps=6, resume=True)
    same_curve(run, curve(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.gloo
def test_bf16_trains_saves_and_resumes(shards, tmp_path):
    for stage in (2, 3):
        run = tmp_path / str(stage)
        bf16 = ["parallel.precision=bf16", "train.evaluate=3", "train.held_out=2", "checkpoint.every=3"]
        msc_train(shards, run, *bf16, processes=2, sp=2, stage=stage, steps=6)
        whole = curve(run)
        (run / "checkpoints" / "latest").write_text("step-00000003")
        msc_train(shards, run, *bf16, processes=2, sp=2, stage=stage, steps=6, resume=True)
        assert torch.equal(curve(run), whole)


@pytest.mark.gloo
def test_a_signal_saves_and_exits_with_requeue(shards, tmp_path):
    run = tmp_path / "run"
    command = [MSC, "train", "--preset", "demo", "--run", run, "--processes", "2", f"data.shards={shards}", *SMALL,
               "parallel.sp=2", "train.clips=40000"]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) > 3)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "--resume" in errors
    steps = len((run / "log.jsonl").read_text().splitlines())
    assert CheckpointMeta.read(latest(run)).step == steps


def wait_for(condition, seconds=180, every=0.2):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(every)


BAD = {
    "more ranks along time than units": (["parallel.sp=6"], 6, "5 units.*parallel.sp = 6"),
    "unknown key": (
        ["optimizer.lerning_rate=1"],
        1,
        "unknown key optimizer.lerning_rate.*did you mean optimizer",
    ),
    "latents that the scales do not divide": (["model.patch=8"], 1, "3 tokens does not divide.*space 2"),
    "a batch that does not divide": (["train.batch=3"], 2, "train.batch 3 does not divide by 2"),
    "no shards": (["data.shards=/nowhere"], 1, "/nowhere"),
    "a value of the wrong type": (["train.seed=many"], 1, "train.seed.*many"),
    "bf16 without sharding": (["parallel.precision=bf16", "parallel.zero.stage=1"], 1, "stage 1 with bf16"),
    "fp8 without TransformerEngine": (["parallel.precision=fp8"], 1, "fp8 needs (TransformerEngine|an NVIDIA GPU)"),
    "Ulysses with one head": (["parallel.layout=ulysses", "parallel.sp=2"], 2, "1 heads of scale 1.*parallel.sp = 2"),
    "a ring without a dense scale": (
        ["parallel.layout=ring", "parallel.sp=2", "model.scales=[{heads: 4, window: 2}]"],
        2,
        "ring serves.*none",
    ),
    "unknown key of a scale": (["model.scales=[{heads: 4, windw: 2}]"], 1, r"unknown key model.scales\[0\].windw"),
    "another number of classes": (["model.classes=10"], 1, "model.classes is 10, but the shards.*have 0"),
    "malformed YAML": (["model.scales=[{heads: 2"], 1, "not valid YAML"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(what, shards, tmp_path, here):
    settings, processes, message = BAD[what]
    start = (
        msc if what in ("unknown key", "another number of classes") else here
    )  # where nothing else is printed, either
    done = start(*train_words(shards, tmp_path / "run", *settings, processes=processes))
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("msc: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_used_run_folder_is_refused(shards, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = msc_train(shards, tmp_path / "run", check=False)
    assert done.returncode == 2 and "--resume" in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_dry_run_prints_the_plan(shards, tmp_path, here):
    done = msc_train(shards, tmp_path / "run", "--dry-run")
    for word in ("parameters", "tokens per clip", "memory per process", "optimizer:"):
        assert word in done.stdout
    assert "scale 0" not in done.stdout
    done = here(*train_words(shards, tmp_path / "run", "--dry-run", processes=2, sp=2))
    for line in (r"scale 0 .* halo  \(per layer: halo .* MB, ulysses .* MB\)", "scale 1 ", "scale 2 "):
        assert re.search(line, done.stdout), done.stdout
    assert not (tmp_path / "run").exists()


# What comes out of a run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "small"
    options = ("train.evaluate=4", "train.held_out=3", "metrics.tracking_uri=")
    # weights are sharded: in previews, of a clip for each rank, all must make the same calls
    msc_train(shards, run, *options, processes=2, sp=2, stage=3, steps=8)
    return run


def test_a_run_writes_the_files_of_the_readme(trained):
    for name in ("config.yaml", "data.json", "log.jsonl", "mlflow.json", "checkpoints/latest"):
        assert (trained / name).is_file(), name
    # two ranks share every clip along time; previews are of a clip each
    assert {p.name for p in (trained / "samples").iterdir()} == {
        f"step-{step:08d}{clip}.{kind}" for step in (4, 8) for clip in ("", "-clip1") for kind in ("mp4", "png")
    }


def test_mlflow_holds_one_finished_run_with_curves_and_files(trained):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "msc")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "32"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 8
    assert {"held_out/mean", "tokens_per_s", "data_wait", "grad_norm", "lr"} <= set(run.data.metrics)
    files = {f.path for f in client.list_artifacts(run.info.run_id, "samples")}
    assert "samples/step-00000008.mp4" in files
    assert "held_out/" in run.data.tags["mlflow.note.content"]


def test_evaluate_measures_a_run_and_another_beside_it(trained, finished):
    """Losses by noise, position and context, roll-outs; a run beside itself differs by nothing at all."""
    done = msc("evaluate", trained, "--clips", "2", "--steps", "2", "--samples", "2", "--against", trained)
    assert done.returncode == 0, done.stderr
    result = json.loads((trained / "evaluation.json").read_text())
    assert result["clips"] == 2 and {"model", "untrained", "mean velocity"} < set(result["loss"])
    assert 1.5 < result["loss"]["mean velocity"] < 2.5
    tables = result["tables"]
    assert tables["psnr_by_horizon"]["columns"] == ["mean", "1", "2", "3"]  # five frames, two of them context
    assert {"sample", "best of 2", "mean prediction", "copy last"} < set(tables["ssim_by_horizon"]["rows"])
    assert len(tables["loss_by_position"]["columns"]) == 6
    assert "without scale 3 (space 2, time 2)" in tables["loss_by_context"]["rows"]
    assert tables["drift"]["rows"]["contrast"]["half_width"][0] > 0
    for table in tables.values():
        for name, row in table["rows"].items():
            if " - other's" in name:
                assert set(row["mean"]) <= {0, None}, name
    card = model_card.results(result)
    assert "| continuations: PSNR, mean (dB) | sample | " in card
    assert "other's" not in card and str(trained) not in card
    assert "PSNR" in done.stdout and done.stdout.strip() == (trained / "evaluation.txt").read_text().strip()
    assert (trained / "evaluation.png").stat().st_size > 10_000
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    kept = client.get_run((trained / "mlflow.json").read_text().split('"run_id": "')[1].split('"')[0])
    expected = tables["loss_by_noise"]["rows"]["model"]["mean"][0]
    assert kept.data.metrics["quality/loss_by_noise/model/mean"] == pytest.approx(expected, abs=1e-6)


def test_evaluate_takes_any_checkpoint_and_rejects_unknown_ones(trained, tmp_path, here):
    (step,) = re.findall(r"step-0*(\d+)", " ".join(p.name for p in (trained / "checkpoints").glob("step-*")))
    assert evaluate(trained, EvaluateConfig(clips=1, steps=1, samples=1, checkpoint=step)).startswith(
        f"{trained}, step {step}, ema"
    )
    for options, message in {
        ("--checkpoint", "7"): f"7 is not a checkpoint of {trained}; it has those of steps: {step}",
        ("--against", str(tmp_path)): f"{tmp_path} is not a run folder",
        ("--features", str(tmp_path / "none.pt2")): "there is no feature network",
    }.items():
        done = here("evaluate", trained, *options)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_an_interrupted_evaluation_prints_its_results_so_far(finished, monkeypatch):
    """Clip by clip; the features of a network are few enough at first, and too few then."""
    seen = []

    def measure(*arguments):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(arguments)
        return measured(*arguments)

    measured = evaluation.measure
    monkeypatch.setattr(evaluation, "MOST_CLIPS", 1)
    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(evaluation, "open_features", lambda *_: lambda video: video.mean((1, 3, 4)).double())
    text = evaluate(finished, EvaluateConfig(clips=4, steps=1, samples=1, features=Path("network")))
    assert "3 held-out clips (interrupted: the clips so far)" in text
    assert "too few clips were continued" in text
    assert json.loads((finished / "evaluation.json").read_text())["clips"] == 3
    seen.clear()
    with pytest.raises(ValueError, match="needs more than 3 clips.*there are 2"):
        evaluate(finished, EvaluateConfig(clips=2, features=Path("network")))


@pytest.mark.parametrize("start", [["--clip", "1"], ["--nothing", "--units", "3"], ["--video"]])
def test_sample_writes_video_and_contact_sheet(trained, shards, start, tmp_path, here):
    if start == ["--video"]:
        start = ["--video", sorted((shards.parent / "videos").iterdir())[0], "--context", "3", "--units", "6"]
    done = (msc if "--video" in start else here)("sample", trained, *start, "--steps", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".mp4", ".png"]
    from msc.datasets.video import decode_frames

    expected = {"--clip": 5, "--nothing": 3, "--video": 9}[start[0]]
    assert len(decode_frames(next(tmp_path.glob("*.mp4")))) == expected


def test_sample_refuses_a_context_that_the_video_does_not_have(trained, here):
    done = here("sample", trained, "--clip", "0", "--context", "50")
    assert done.returncode == 2 and "lower --context" in done.stderr
    done = here("sample", trained, "--clip", "99999")
    assert done.returncode == 2 and "held-out clips" in done.stderr


def test_exported_weights_are_those_of_the_checkpoint(trained, tmp_path):
    done = msc("export", trained, "--out", tmp_path / "out", "--weights", "both", "--max-shard-size", "30KB")
    assert done.returncode == 0 and "every tensor read again and compared" in done.stderr + done.stdout, done.stderr
    for which in ("ema", "raw"):
        model = MSCTransformer.from_pretrained(tmp_path / "out", which)
        for name, value in weights(latest(trained), which):
            assert torch.equal(model.state_dict()[name], value), name
    assert {"config.json", "README.md", "model_index.json", "model.safetensors.index.json"} < {
        path.name for path in (tmp_path / "out").iterdir()
    }  # fmt: skip


def held_out(run):
    """Held-out losses of a run by step."""
    lines = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    return {line["step"]: line["mean"] for line in lines}


LOOK = ("train.evaluate=4", "train.held_out=3")  # as `trained` does


@pytest.mark.slow
def test_a_run_starts_from_exported_weights_and_goes_on_without_them(trained, shards, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    assert msc("export", trained, "--out", out).returncode == 0
    start = f"train.init_from={out}"
    done = msc_train(shards, run, start, "model.width=64", check=False)
    assert done.returncode == 2 and "model.width is 64 here and 32 there" in done.stderr and not run.exists()
    done = msc_train(shards, run, start, *LOOK, steps=2, stage=3)
    assert f"msc: starting from the exported weights of step 8 in {out}\n" in done.stderr
    assert held_out(run)[0] == pytest.approx(held_out(trained)[8], rel=1e-5), "as when training ended"
    assert f"init_from: {out}" in (run / "config.yaml").read_text()
    shutil.rmtree(out)
    done = msc_train(shards, run, start, *LOOK, steps=4, stage=3, resume=True)
    assert "starting from" not in done.stderr and len(curve(run)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), [(0, 2), (1, 4), (3, 4)])
def test_exports_of_every_stage_compute_as_the_run_did(stage, processes, shards, tmp_path):
    """The loss of the sharded model when training ended, against that of a run which starts from its export."""
    processes = processes if room(processes) else 2
    run, evaluated = tmp_path / "run", ("train.evaluate=4", "train.held_out=4")  # a clip for every rank
    msc_train(shards, run, *evaluated, stage=stage, processes=processes, steps=4)
    assert msc("export", run, "--max-shard-size", "30KB").returncode == 0
    msc_train(shards, tmp_path / "next", f"train.init_from={run / 'export'}", *evaluated, steps=1)
    assert held_out(tmp_path / "next")[0] == pytest.approx(held_out(run)[4], rel=1e-5)


def test_export_never_replaces_what_is_not_its_own(trained, tmp_path, here):
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, trained):
        done = here("export", trained, "--out", out)
        assert done.returncode == 2 and "not empty" in done.stderr, done.stderr
    assert (tmp_path / "thesis.txt").exists() and latest(trained) is not None
    assert here("export", trained).returncode == 0 and here("export", trained).returncode == 0


def test_a_short_video_is_continued_from_what_it_has(trained, tmp_path, here):

    (short,) = write_videos(tmp_path, seed=3, clips=1, frames=3, height=16, width=24)
    done = here("sample", trained, "--video", short, "--context", "2", "--units", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    done = here("sample", trained, "--video", short, "--context", "4", "--units", "2", "--steps", "1")
    assert done.returncode == 2 and "lower --context" in done.stderr, done.stderr


def test_commands_reject_a_folder_that_is_no_run(tmp_path, here):
    for command in ("evaluate", "sample", "export"):
        done = here(command, tmp_path)
        assert done.returncode == 2 and "not a run folder" in done.stderr, done.stderr


def test_a_damaged_checkpoint_is_found_by_its_checksum(shards, tmp_path):
    run = tmp_path / "run"
    msc_train(shards, run, steps=2)
    file = next(latest(run).glob("rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    done = msc_train(shards, run, steps=4, resume=True, check=False)
    assert done.returncode == 2 and "checksum" in done.stderr and file.name in done.stderr


def test_a_lock_that_a_killed_process_left_holds_nobody(tmp_path, monkeypatch):
    import deepspeed.accelerator
    from torch.utils import cpp_extension

    from msc.parallel import deepspeed_zero

    class Builder:
        name = "op"
        loaded = False

        def is_compatible(self, verbose):
            return True

        def load(self, verbose):
            assert not (tmp_path / "lock").exists(), "torch would wait for it forever"
            self.loaded = True

    builder = Builder()
    accelerator = type("Accelerator", (), {"create_op_builder": lambda self, name: builder})()
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(cpp_extension, "_get_build_directory", lambda name, verbose: str(tmp_path))
    (tmp_path / "lock").touch()
    deepspeed_zero.load_shm_op()
    assert builder.loaded
