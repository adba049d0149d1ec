"""Exported weights away from here: with torch and safetensors alone, in diffusers, as a graph, in ONNX."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import fake_checkpoints
import pytest
import torch
from context_parallel_ranks import SIGNALS
from packaging.requirements import Requirement

from msc.pretrain.export.export import export
from msc.pretrain.model.conditioning import Condition

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "small"
    models = fake_checkpoints.write_run(run, 3, "flat", width=64, signals=SIGNALS)
    export(run, max_shard_size=60_000)
    return run / "export", models["ema"]


def required(names: set[str]) -> set[str]:
    """Distributions that a plain installation of these would bring here."""
    found: set[str] = set()
    while names:
        name = names.pop()
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of CUDA, for a build that has none
            continue
        found.add(name)
        wanted = [Requirement(line) for line in lines]
        names |= {one.name for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})} - found
    return found


def bare_python(folder: Path, *names: str) -> Path:
    """A Python with only these packages and what they require, as links to those installed here; of the project it has
    `msc.pretrain` and nothing else."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in required(set(names)):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    (site / "msc").mkdir()
    (site / "msc" / "pretrain").symlink_to(ROOT / "pretrain")
    return folder / "bin" / "python"


def test_torch_and_safetensors_are_enough_to_load_and_compute_the_same(exported, tmp_path):
    folder, model = exported
    moved = shutil.copytree(folder, tmp_path / "moved")
    x, t = torch.randn(1, 6, 3, 16, 24), torch.rand(1, 6)
    with torch.no_grad():
        torch.save((x, t, model(x, t)), tmp_path / "expected.pt")
    program = f"""
import importlib.util, torch
for absent in ("numpy", "yaml", "pydantic", "deepspeed", "einops", "tqdm", "msc.parallel", "msc.datasets"):
    assert importlib.util.find_spec(absent) is None, absent
from msc.pretrain.model.transformer import MSCTransformer
x, t, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = MSCTransformer.from_pretrained({str(moved)!r})
with torch.no_grad():
    assert torch.equal(model(x, t), expected), (model(x, t) - expected).abs().max()
"""
    python = bare_python(tmp_path / "bare", "torch", "safetensors")
    command = [python, "-I", "-W", "ignore", "-c", program]
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=threads)
    assert done.returncode == 0, done.stderr


# diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture
def diffusers(monkeypatch, tmp_path):
    """With its own folder for the modules that it copies."""
    package = pytest.importorskip("diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    return package


def test_a_diffusers_pipeline_computes_and_samples_the_same(exported, diffusers):
    from msc.pretrain.diffusion.sampler import Sampling, generate

    folder, model = exported
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    x, t = torch.randn(1, 6, 3, 16, 24), torch.rand(1, 6)
    with torch.no_grad():
        assert torch.equal(pipe.transformer(x, t), model(x, t))
    pipe.set_progress_bar_config(disable=True)
    shift = fake_checkpoints.configured()[0].diffusion.shift
    latents = torch.cat(list(generate(model, torch.zeros(2, 0, 3, 16, 24), 3, Sampling(2, 5, shift))), 1)
    how = {"units": 3, "batch": 2, "num_inference_steps": 2, "seed": 5}
    assert torch.equal(pipe(**how, output_type="latent").frames, latents)
    raw = {"keys": torch.randn(2, 3, 2), "pose": torch.randn(2, 3, 2)}  # of the three units to come
    condition = Condition(signals=model.normalise_signals(raw))
    steered = generate(model, torch.zeros(2, 0, 3, 16, 24), 3, Sampling(2, 5, shift), condition)
    assert torch.equal(pipe(**how, signals=raw, output_type="latent").frames, torch.cat(list(steered), 1))
    frames = pipe(**how).frames
    assert frames.shape == (2, 3, 16, 24, 3) and 0 <= frames.min() < frames.max() <= 1


def test_a_pipeline_continues_a_video(exported, diffusers):
    from msc.pretrain.export.diffusers_pipeline import MSCPipeline

    pipe = MSCPipeline.from_pretrained(exported[0])
    pipe.set_progress_bar_config(disable=True)
    video = torch.randint(0, 256, (1, 2, 3, 16, 24), dtype=torch.uint8)
    frames = pipe(units=1, video=video, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 3, 3, 16, 24)
    torch.testing.assert_close(frames[:, :2], video / 255)
    other = MSCPipeline.from_pretrained(exported[0], dtype=torch.bfloat16)
    other.set_progress_bar_config(disable=True)
    assert other.transformer.dtype == torch.bfloat16
    assert pipe(units=1, size=(8, 8), num_inference_steps=1).frames.shape == (1, 1, 8, 8, 3)
    with pytest.raises(ValueError, match="needs a multiple|does not divide"):
        pipe(units=1, size=(9, 8), num_inference_steps=1)
    with pytest.raises(ValueError, match="copy the folder"):
        pipe.save_pretrained(exported[0].parent / "again")


def test_diffusers_runs_nothing_of_the_folder_unless_told_so(exported, diffusers, tmp_path):
    from msc.pretrain.export.diffusers_pipeline import MSCPipeline

    folder = shutil.copytree(exported[0], tmp_path / "copy")
    (folder / "pipeline.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(str(folder))
    MSCPipeline.from_pretrained(folder)
    assert not (tmp_path / "boom").exists()


# Graphs -------------------------------------------------------------------------------------------------


class Step(torch.nn.Module):
    """One denoising step of a unit whose past is in a cache: frames, levels and cached tensors in, velocity out."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.first, self.keys = model, cache.first, list(cache._kept)

    def forward(self, x, t, past, keys):
        from msc.pretrain.diffusion.sampler import Cache

        cache = Cache()
        cache.first, cache._kept = self.first, dict(zip(self.keys, past, strict=True))
        return self.model(x, t, Condition(signals={"keys": keys}), cache)


def test_torch_export_of_a_denoising_step():
    model = fake_checkpoints.random_model(fake_checkpoints.configured(width=64, depth=1)[0].model)
    x, t = torch.randn(2, 6, 3, 16, 24), torch.rand(2, 6)
    batch = torch.export.Dim("batch")
    graph = torch.export.export(model, (x, t), dynamic_shapes={"x_BTCHW": {0: batch}, "t_BT": {0: batch}})
    x, t = torch.randn(3, 6, 3, 16, 24), 0.5 + 0.5 * torch.rand(3, 6)  # the velocity divides by t, rounding too
    torch.testing.assert_close(graph.module()(x, t), model(x, t), rtol=1e-5, atol=1e-5)


def test_torch_export_of_a_step_with_a_cached_past():
    from msc.pretrain.diffusion.sampler import Cache, extend_cache

    config = fake_checkpoints.configured(width=64, signals=SIGNALS[:1])[0].model
    model, cache, keys = fake_checkpoints.random_model(config), Cache(), torch.randn(1, 1, 2)
    extend_cache(model, cache, torch.randn(1, 6, 3, 16, 24))
    step, past = Step(model, cache), list(cache._kept.values())
    graph = torch.export.export(step, (torch.randn(1, 1, 3, 16, 24), torch.rand(1, 1), past, torch.randn(1, 1, 2)))
    x, t = torch.randn(1, 1, 3, 16, 24), torch.rand(1, 1)
    expected = model(x, t, Condition(signals={"keys": keys}), cache)
    torch.testing.assert_close(graph.module()(x, t, past, keys), expected, rtol=1e-5, atol=1e-5)


class SteeredStep(torch.nn.Module):
    """A denoising step of a whole clip under a signal."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, keys):
        return self.model(x, t, Condition(signals={"keys": keys}))


@pytest.mark.slow  # a minute and more of the exporter's
def test_onnx_of_a_denoising_step(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    config = fake_checkpoints.configured(width=64, depth=1, signals=SIGNALS[:1])[0].model
    step = SteeredStep(fake_checkpoints.random_model(config))
    step.model.blocks[0].attention.shifted = True  # as in every second layer: windows of several sizes
    # more layers and frames of the same operations take minutes
    inputs = torch.randn(1, 3, 3, 16, 24), torch.rand(1, 3), torch.randn(1, 3, 2)
    torch.onnx.export(step, inputs, dynamo=True, verbose=False).save(tmp_path / "step.onnx")
    session = runtime.InferenceSession(tmp_path / "step.onnx")
    named = {one.name: value.numpy() for one, value in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = step(*inputs)
    torch.testing.assert_close(torch.from_numpy(session.run(None, named)[0]), expected, rtol=1e-4, atol=1e-3)
    assert (expected - step(*inputs[:2], -inputs[2])).abs().max() > 1e-2  # it listens
