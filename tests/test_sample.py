"""`msc sample` on a model with text and classes: its options, its files, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msc.datasets import video as decode
from msc.launch import cli
from msc.pretrain import config as configuration
from msc.pretrain.diffusion.autoencoder import open_autoencoder
from msc.pretrain.inference import sample
from msc.pretrain.inference.load import TrainedModel
from msc.pretrain.inference.progress import progress
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.latent_space import LatentSpace
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.presets import preset
from msc.pretrain.run_folder import RunFolder

PROMPTS = {"red disc": 3, "two blue bars": 5}


def untrained(run: Path, **model) -> TrainedModel:
    """A run folder of a model with random weights, as `open_run` would open it."""
    scales = (Scale(2, 1, 1, 2), Scale(2, 2, 2, None))
    base = preset("demo")
    settings = replace(
        base,
        model=ModelConfig(width=32, depth=1, scales=scales, patch=2, channels=3, **model),
        metrics=replace(base.metrics, tracking_uri="none"),
    )
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(configuration.dump(settings))
    space = LatentSpace("pixels", 8, 8, 16, 8, 16, 10.0)
    RunFolder(run).write_latent_space(space)
    torch.manual_seed(0)
    network = MSCTransformer(settings.model).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return TrainedModel(network, settings, space, open_autoencoder("pixels"), 7, 28, torch.device("cpu"))


@pytest.fixture
def conditioned_run(tmp_path, monkeypatch):
    """A run whose model knows texts (of 5 numbers a token) and three classes."""
    trained = untrained(tmp_path / "run", text_width=5, classes=3)
    monkeypatch.setattr(sample, "open_run", lambda run, weights: trained)
    encode = {text: torch.randn(length, 5).half() for text, length in PROMPTS.items()}
    monkeypatch.setattr(sample, "open_text_encoder", lambda folder: encode.__getitem__)
    return tmp_path / "run"


def videos_in(folder: Path) -> dict[str, torch.Tensor]:
    return {path.stem: decode.decode_frames(path) for path in sorted(folder.glob("*.mp4"))}


def test_prompts_and_labels_give_the_same_videos_in_any_batch(conditioned_run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("red disc\n\n  two blue bars\n", encoding="utf-8")
    common = ["sample", str(conditioned_run), "--prompts", str(tmp_path / "prompts.txt"), "--text", "encoder",
              "--label", "2", "--units", "20", "--steps", "2", "--guidance", "2", "--count", "3",
              "--solver", "heun"]  # fmt: skip
    for batch in (1, 2):
        assert cli.main([*common, "--out", str(tmp_path / str(batch)), "--batch", str(batch)]) == 0
    assert "0 frames of context and 20 generated" in capsys.readouterr().out
    one, two = (videos_in(tmp_path / str(batch)) for batch in (1, 2))
    assert list(one) == [f"nothing-seed0-{i:04d}" for i in range(3)]
    for name, video in one.items():
        assert video.shape == (20, 3, 8, 16)
        # equal to rounding before 8 bits and H.264
        assert (video.int() - two[name].int()).abs().float().mean() < 0.5, name
    first, second, third = one.values()
    assert not torch.equal(first, second) and not torch.equal(first, third)
    assert (tmp_path / "1" / "nothing-seed0.png").is_file()


def test_a_video_is_continued_under_a_prompt(conditioned_run, tmp_path):
    from msc.datasets.synthetic import write_videos

    (video,) = write_videos(tmp_path / "in", seed=3, clips=1, frames=30, height=16, width=32)
    command = ["sample", str(conditioned_run), "--video", str(video), "--context", "6", "--units", "12", "--steps", "1",
             "--prompt", "red disc", "--text", "x", "--reach", "4", "--context-level", "0.1"]  # fmt: skip
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    (frames,) = videos_in(tmp_path / "out").values()
    assert len(frames) == 18
    truth = decode.decode_frames(video, fps=10.0, stop=6, size=(8, 16))
    assert (frames[:6].int() - truth.int()).abs().float().mean() < 12, "the context comes first, as H.264 keeps it"


def test_no_file_is_overwritten(conditioned_run, tmp_path, capsys):
    """Neither the video that is continued, nor what was made before, nor what another process is making."""
    from msc.datasets.synthetic import write_videos

    (video,) = write_videos(tmp_path / "clips", seed=3, clips=1, frames=30, height=16, width=32)
    own, before = video.stem, video.read_bytes()
    common = ["--out", str(video.parent), "--units", "2", "--steps", "1", "--text", "encoder"]
    for options in (
        ["--video", str(video)],
        *(["--prompt", prompt] for prompt in PROMPTS),
        ["--label", "0", "--count", "2"],
    ):
        assert cli.main(["sample", str(conditioned_run), *options, *common]) == 0
    videos = videos_in(video.parent)
    again, several = ["nothing-seed0", "nothing-seed0-2"], ["nothing-seed0-3-0000", "nothing-seed0-3-0001"]
    assert videos.keys() == {own, f"{own}-2", *again, *several} and video.read_bytes() == before
    assert not torch.equal(videos["nothing-seed0"], videos["nothing-seed0-2"])
    sheets = {path.stem for path in video.parent.glob("*.png")}
    assert sheets == {f"{own}-2", *again, "nothing-seed0-3"}
    assert "nothing-seed0-2.png" in capsys.readouterr().out


def test_concurrent_processes_take_different_names(tmp_path):
    def free_name(*_):
        return sample.free_names(tmp_path / "out", "a[1].b", 1)[0][0].name

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(free_name, range(40)))) == 40
    paths, sheet = sample.free_names(tmp_path / "new", "a[1].b", 2)
    assert [path.name for path in (*paths, sheet)] == ["a[1].b-0000.mp4", "a[1].b-0001.mp4", "a[1].b.png"]
    assert sample.free_names(tmp_path / "new", "a[1].b", 1)[1].name == "a[1].b-2.png"


@pytest.mark.parametrize(("options", "message"), [
    (["--prompt", "red disc", "--prompt", "two blue bars", "--label", "0", "--label", "1", "--label", "2"],
     "2 prompts and 3 labels"),
    (["--label", "3"], "--label 3: it must be a number from 0 to 2"),
    (["--prompt", "red disc", "--label", "1", "--label", "2", "--count", "1"], "--count 1 is less than the 2"),
    (["--nothing", "--guidance", "3"], "--guidance 3 needs something to guide by"),
    (["--nothing", "--guidance", "-3"], "guidance is -3.0"),
    (["--nothing", "--seed", "-1"], "seed is -1"),
    (["--nothing", "--context-level", "1"], "context_level is 1.0"),
    (["--video", "none.mp4"], "none.mp4 does not exist"),
    (["--prompts", "none.txt"], "none.txt: No such file"),
    (["--prompts", "a.txt", "--prompt", "b"], "give one of them"),
])  # fmt: skip
def test_invalid_options_are_refused_before_the_model_is_loaded(options, message, conditioned_run, monkeypatch, capsys):
    monkeypatch.setattr(sample, "open_run", lambda *_: pytest.fail("opened"))
    assert cli.main(["sample", str(conditioned_run), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_prompts_must_be_text(conditioned_run, tmp_path, capsys):
    for content, message in ((b"\xff\xfe\x00", "is not a text file in UTF-8"), (b"\n \n", "holds no prompt")):
        (tmp_path / "prompts").write_bytes(content)
        assert cli.main(["sample", str(conditioned_run), "--prompts", str(tmp_path / "prompts")]) == 2
        assert message in capsys.readouterr().err


def test_conditions_need_a_model_trained_with_them(tmp_path, capsys):
    untrained(tmp_path / "run")
    for options, message in (["--prompt", "x"], "knows no text"), (["--label", "0"], "knows no classes"):
        assert cli.main(["sample", str(tmp_path / "run"), *options]) == 2
        assert message in capsys.readouterr().err


def test_another_text_encoder_is_refused(conditioned_run, monkeypatch, capsys):
    monkeypatch.setattr(sample, "open_text_encoder", lambda folder: lambda text: torch.zeros(2, 7))
    assert cli.main(["sample", str(conditioned_run), "--prompt", "x", "--text", "y"]) == 2
    assert "embeddings of 7 numbers, the model was trained with 5" in capsys.readouterr().err


ENDLESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a shell
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sample import untrained
from msc.launch import cli
from msc.pretrain.inference import sample
run = Path(sys.argv[2])
trained = untrained(run)
sample.open_run = lambda *_: trained
sys.exit(cli.main(["sample", str(run), "--nothing", "--units", "1000000", "--steps", "1"]))
"""


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGKILL])
def test_a_video_interrupted_or_killed_can_be_played(stop_signal, tmp_path):
    program = [sys.executable, "-P", "-c", ENDLESS, str(Path(__file__).parent), str(tmp_path / "run")]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial = tmp_path / "run" / "samples" / "nothing-seed0.partial.mp4"
    deadline = time.monotonic() + 60
    try:
        while not (partial.is_file() and partial.stat().st_size > 20_000) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(stop_signal)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert len(decode.decode_frames(partial)) > 20
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    if stop_signal == signal.SIGINT:
        assert process.returncode == 130 and f"made so far: {partial}" in err, err
        assert "Traceback" not in err


def test_without_a_terminal_progress_is_logged(caplog):
    caplog.set_level("INFO")
    assert list(progress("abc", 3, "sample 3-4 of 9", "unit")) == list("abc")
    assert "sample 3-4 of 9: 3 of 3 units, " in caplog.text
