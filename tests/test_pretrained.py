"""Published models: their weights in ours compute the same, by configuration become causal, and go back unchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import fake_checkpoints
import pytest
import torch
from context_parallel_ranks import Case, backward, on_a_rank
from gloo_ranks import run_ranks

from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.statistics import Statistics
from msc.datasets.synthetic import write_videos
from msc.pretrain import cost, validation
from msc.pretrain.checkpoints import initialize_from, pretrained
from msc.pretrain.diffusion.autoencoder import open_autoencoder
from msc.pretrain.diffusion.sampler import Cache, extend_cache
from msc.pretrain.export.export import export
from msc.pretrain.model.conditioning import Condition
from msc.pretrain.model.past_context import WholeVideo
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.presets import PRESETS

diffusers = pytest.importorskip("diffusers")

T, C, H, W, E = 3, 3, 8, 12, 10
MULTI_SCALE = (Scale(2, 1, 1, 1, 4), Scale(1, 2, 1, 2), Scale(1, 2, 2, None))


def wan(**settings):
    made = {
        "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": C, "out_channels": C, "text_dim": E,
        "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 64, **settings,
    }  # fmt: skip
    return diffusers.WanTransformer3DModel(**made)


def ltx(**settings):
    made = {
        "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": C, "out_channels": C,
        "cross_attention_dim": 64, "caption_channels": E, "num_layers": 2, **settings,
    }  # fmt: skip
    return diffusers.LTXVideoTransformer3DModel(**made)


def run_wan(model, x, t, text, image=None):
    """Velocity of x `[B, T, C, H, W]` by diffusers' class, whose time steps are those of patches."""
    if t.ndim == 2:
        t = t.repeat_interleave(H // 2 * (W // 2), 1)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    return model(x.transpose(1, 2), 1000 * t, padded, image).sample.transpose(1, 2)


def run_ltx(model, x, t, text):
    t = (t if t.ndim == 2 else t[:, None].expand(-1, T)).repeat_interleave(H * W, 1)
    seen = (text != 0).any(-1).float()
    tokens = x.permute(0, 1, 3, 4, 2).flatten(1, 3)
    out = model(tokens, text, 1000 * t, seen, T, H, W, (8 / 25, 32, 32)).sample
    return out.reshape(-1, T, H, W, C).permute(0, 1, 4, 2, 3)


class Published(NamedTuple):
    model: torch.nn.Module
    place: str
    run: object


@pytest.fixture(scope="module", params=["wan", "ltx"])
def published(request, tmp_path_factory):
    """A model of diffusers, saved in several files."""
    torch.manual_seed(0)
    model = {"wan": wan, "ltx": ltx}[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    place = save(model, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return Published(model, place, {"wan": run_wan, "ltx": run_ltx}[request.param])


def save(model, folder):
    """With random values everywhere, as what starts at zero or one would hide mistakes; its place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder, max_shard_size="200KB")
    return f"diffusers:{folder}"


def ours(place, **changes):
    """Our model with its weights, as training would start it."""
    config = replace(pretrained.open_pretrained(place).config, **changes)
    model = MSCTransformer(config)
    with initialize_from.open_initial_weights(place, config, "unknown") as (lines, fill):
        fill("", model)
    return model.eval(), lines


def clip():
    torch.manual_seed(1)
    text = torch.randn(2, 9, E)
    text[1, 6:] = 0  # shorter, and padded
    return torch.randn(2, T, C, H, W), torch.tensor([0.3, 0.9]), text


@torch.no_grad()
def test_full_attention_gives_the_output_of_diffusers(published):
    model, _ = ours(published.place, frames_per_unit=T)
    x, t, text = clip()
    expected = published.run(published.model, x, t, text)
    torch.testing.assert_close(model(x, t[:, None].expand(2, T), Condition(text)), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.3  # and that says something
    t = torch.rand(2, T)  # of every frame its own
    torch.testing.assert_close(
        model(x, t, Condition(text)), published.run(published.model, x, t, text), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("images", [{}, {"image_dim": 20, "added_kv_proj_dim": 64}], ids=["2.2", "2.1"])
def test_image_to_video_gives_the_output_of_diffusers(images, tmp_path):
    """A mask of 4 channels and the latents of the image beside the noisy ones; of 2.1 also the image's embedding."""
    theirs = wan(in_channels=2 * C + 4, **images)
    place = save(theirs, tmp_path)
    model, lines = ours(place, frames_per_unit=T)
    assert not [line for line in lines if "initialised" in line or "not used" in line]
    x, t, text = clip()
    given, image = torch.randn(2, T, C + 4, H, W), torch.randn(2, 5, 20) if images else None
    expected = run_wan(theirs, torch.cat((x, given), 2), t, text, image)
    out = model(x, t[:, None].expand(2, T), Condition(text, given=given, image=image))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    state, sources = model.state_dict(), pretrained.sources(model.config)
    assert all(
        torch.equal(sources[name].of(state[sources[name].name]), value) for name, value in theirs.state_dict().items()
    )

    # what is given follows from the noise levels where it is not said: the first frame here
    levels = torch.tensor([[0.0, 0.5, 0.5]]).expand(2, T)
    first = torch.cat((torch.ones(2, 1, 4, H, W), x[:, :1]), 2)
    given = torch.cat((first, torch.zeros(2, T - 1, C + 4, H, W)), 1)
    said = model(x, levels, Condition(text, given=given, image=image))
    assert torch.equal(model(x, levels, Condition(text, image=image)), said)
    if images:
        _, lines = ours(place, layers=replace(model.config.layers, image_width=0))
        assert any(line.startswith("not used: blocks.0.cross_attention.image_k_norm.weight") for line in lines)


@torch.no_grad()
def test_in_bf16_it_is_as_far_from_fp32_as_diffusers_is(published):
    model, _ = ours(published.place, frames_per_unit=T)
    x, t, text = clip()
    exact, levels = published.run(published.model, x, t, text), t[:, None].expand(2, T)
    rounded = model.bfloat16()(x, levels, Condition(text))
    theirs = type(published.model).from_pretrained(
        published.place.removeprefix("diffusers:"), torch_dtype=torch.bfloat16
    )
    half = published.run(theirs.eval(), x.bfloat16(), t, text.bfloat16()).float()
    assert (rounded - exact).abs().mean() < 1.5 * (half - exact).abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("scales", [(Scale(4),), MULTI_SCALE], ids=["dense", "multi-scale"])
def test_causal_by_configuration_alone(published, scales):
    model, _ = ours(published.place, scales=scales)
    x, _, text = clip()
    t = torch.rand(2, T)
    out, later = model(x, t, Condition(text)), x.clone()
    later[:, 2] += 1
    changed = model(later, t, Condition(text))
    assert torch.equal(out[:, :2], changed[:, :2]) and not torch.allclose(out[:, 2], changed[:, 2])
    if len(scales) == 1:  # the first frame sees itself alone, as in diffusers' model of one frame
        expected = published.run(published.model, x, t, text)
        assert not torch.allclose(out, expected, atol=1e-2)


@torch.no_grad()
def test_a_gate_can_take_the_slowest_channels_of_time(published):
    """Of Wan: with clean frames it is open, and only those channels of all heads are gone. LTX has none to spare."""
    if "ltx" in published.place:
        with pytest.raises(ValueError, match="leaves no channels for a gate"):
            ours(published.place, gate="logits")
        return
    model, lines = ours(published.place, gate="logits")
    x, _, text = clip()
    hidden = x.clone()
    hidden[:, 0] += 1
    noise = torch.tensor([[1.0, 0.5, 0.5]]).expand(2, T)
    assert torch.allclose(model(x, noise, Condition(text))[:, 1:], model(hidden, noise, Condition(text))[:, 1:])
    assert "newly initialised: blocks.0.attention.delta, blocks.1.attention.delta" in lines


def test_all_weights_are_taken_and_said_by_name(published):
    model, lines = ours(published.place)
    assert lines == [f"starting from the published weights in {published.place.removeprefix('diffusers:')}"]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in published.model.parameters())


def test_weights_go_back_unchanged(published):
    model, _ = ours(published.place)
    state, expected = model.state_dict(), published.model.state_dict()
    sources = pretrained.sources(model.config)
    assert sources.keys() == expected.keys()
    assert all(torch.equal(source.of(state[source.name]), expected[name]) for name, source in sources.items())
    again = type(published.model).from_config(pretrained.settings_of(model.config))
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_a_run_is_exported_as_the_class_of_diffusers(published, tmp_path):
    """Averaged weights of a run, in several files, as diffusers loads them: the same function of a whole clip."""
    config = pretrained.open_pretrained(published.place).config
    names = ("layers", "width", "depth", "scales", "patch", "mlp_ratio", "gate", "prediction", "text_width")
    models = fake_checkpoints.write_run(
        tmp_path / "run", 2, "flat", **{name: getattr(config, name) for name in names}, frames_per_unit=3
    )
    report = export(tmp_path / "run", tmp_path / "out", layout="diffusers", max_shard_size=200_000)
    assert type(published.model).__name__ in report and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    back = type(published.model).from_pretrained(tmp_path / "out")
    _, t, text = clip()
    x = torch.randn(2, T, C, H, W)
    with torch.no_grad():
        expected = models["ema"](x, t[:, None].expand(2, T), Condition(text))
        torch.testing.assert_close(published.run(back, x, t, text), expected, rtol=1e-5, atol=1e-5)


def test_models_of_ours_are_not_exported_as_those_of_diffusers(tmp_path):
    fake_checkpoints.write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="none of diffusers': model.layers.rope is 'msc'"):
        export(tmp_path / "run", layout="diffusers")


def test_latents_are_taken_as_diffusers_normalises_them():
    """Which its autoencoders do by their published moments; those measured on the shards are of no use then."""
    measured = replace(Statistics.default(16), mean=[0.5] * 16, std=[2.0] * 16)
    index = replace(validation.ASSUMED_INDEX, has_text=4096, statistics=measured)
    config = PRESETS["wan-1.3b"]()
    assert validation.resolve(config, index).model.latent_std == (2.0,) * 16  # of latents from elsewhere
    model = validation.resolve(config, replace(index, autoencoder="diffusers:wan")).model
    assert model.latent_mean == (0.0,) * 16 and model.latent_std == (1.0,) * 16


@pytest.mark.gloo
@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_sharded_equals_one_process(recompute):
    """Outputs and all gradients, whatever travels: halo, Ulysses (which divides the heads), ring."""
    cases = [
        Case(name, layout, 6, recompute=recompute, gate=gate, layers=layers)
        for layers, gate in (
            (pretrained.WAN_LAYERS, "logits"),
            (pretrained.WAN_LAYERS, "none"),
            (pretrained.LTX_LAYERS, "none"),
        )
        for name, layout in (("dense", "ring"), ("dense", "ulysses"), ("default", "halo"))
    ]
    ranks = run_ranks(on_a_rank, 2, "gloo", cases)
    for index, case in enumerate(cases):
        model, *inputs = case.make()
        out, x_grad, grads = backward(model, *inputs, WholeVideo())
        parts = [rank[index] for rank in ranks]
        torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), out)
        torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), x_grad)
        for name, grad in grads.items():
            torch.testing.assert_close(sum(part[2][name] for part in parts), grad, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize(
    ("name", "settings", "elements"),
    [
        ("wan-1.3b", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1_418_996_800),
        ("wan-14b", {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 14_288_491_584),
        (
            "wan-ti2v-5b",
            {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
            4_999_787_712,
        ),
        ("ltx-2b", {}, 1_923_385_472),
    ],
)
def test_presets_are_of_the_published_shapes(name, settings, elements):
    """Tensor by tensor those of diffusers' class, whose defaults are the rest of the published configurations."""
    kind = diffusers.LTXVideoTransformer3DModel if name == "ltx-2b" else diffusers.WanTransformer3DModel
    with torch.device("meta"):
        theirs = kind(**{"rope_max_seq_len": 8, **settings} if name != "ltx-2b" else {}).state_dict()
    model = PRESETS[name]().model
    with torch.device("meta"):
        shapes = MSCTransformer(model).shapes()
    sources = pretrained.sources(model)
    assert {key: source.part.shape for key, source in sources.items()} == {
        key: tuple(value.shape) for key, value in theirs.items()
    }
    assert shapes.keys() == {source.name for source in sources.values()}
    assert sum(value.numel() for value in theirs.values()) == elements == cost.parameters(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "gate"), [(pretrained.WAN_LAYERS, "logits"), (pretrained.LTX_LAYERS, "none")], ids=["wan", "ltx"]
)
def test_cached_steps_equal_the_full_forward(layers, gate):
    model, x, _, condition, _ = Case("default", "halo", 7, gate=gate, layers=layers).make()
    t = torch.zeros(2, 7, dtype=x.dtype)
    full, cache = model(x, t, condition), Cache()
    for units in (slice(0, 3), slice(3, 4), slice(4, 7)):
        own = model(x[:, units], t[:, units], condition.of_frames(units), cache)
        torch.testing.assert_close(own, full[:, units], rtol=1e-10, atol=1e-10)
        extend_cache(model, cache, x[:, units], condition.of_frames(units), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "gate"), [(pretrained.WAN_LAYERS, "logits"), (pretrained.LTX_LAYERS, "none")], ids=["wan", "ltx"]
)
def test_compiled_blocks_are_one_graph_with_the_same_gradients(layers, gate):
    model, *inputs = Case("default", "halo", 3, gate=gate, layers=layers).make()
    expected = backward(model, *inputs, WholeVideo())
    model.zero_grad(set_to_none=True)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(backward(model, *inputs, WholeVideo()), expected)


@pytest.mark.gloo
@pytest.mark.slow
def test_training_with_zero_3_along_time_has_the_curve_of_one_process(tmp_path):
    """From the weights of a Wan without text, which says what it leaves out; and the run goes back to diffusers."""
    write_videos(tmp_path / "videos", 0, clips=12, frames=4, height=16, width=24)
    save(wan(num_layers=1), tmp_path / "wan")
    config = ConvertConfig(
        sources=(str(tmp_path / "videos"),), out=str(tmp_path / "shards"), frames=4, height=16, width=24, fps=12.0,
        held_out=0.3, autoencoder="pixels",
    )  # fmt: skip
    convert(config, open_autoencoder("pixels").encode, 1)
    settings = [
        f"data.shards={tmp_path / 'shards'}", f"train.init_from=diffusers:{tmp_path / 'wan'}", "model.width=64",
        "model.depth=1", "model.patch=2", "model.mlp_ratio=1.5", "model.scales=[{heads: 2, window: 1}, {heads: 2}]",
        "model.gate=none", "model.prediction=velocity", "train.clips=16", "train.micro=1", "train.evaluate=0",
        "train.report=1", "checkpoint.every=4", "parallel.recompute=full",
        "model.layers={bias: true, qk_norm: width, text_hidden: true, final_table: true, rope: wan}",
    ]  # fmt: skip
    curves = []
    for name, more in (("one", []), ("two", ["--processes", "2", "parallel.sp=2", "parallel.zero.stage=3"])):
        words = ["train", "--preset", "demo", "--run", str(tmp_path / name), *settings, *more]
        done = subprocess.run([Path(sys.executable).with_name("msc"), *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "starting from the published weights" in done.stderr and "not used: blocks.0.cross" in done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        curves.append(torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64))
    torch.testing.assert_close(*curves, rtol=1e-5, atol=0)


def test_missing_and_left_over_tensors_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    wan().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["blocks.0.extra"] = state.pop("blocks.1.ffn.net.2.bias")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"missing: blocks.1.ffn.net.2.bias; left over: blocks.0.extra"):
        pretrained.open_pretrained(f"diffusers:{tmp_path}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qk_norm": None}, "qk_norm is None; only 'rms_norm_across_heads' can be taken"),
        ({"patch_size": [2, 2, 2]}, r"patch_size is \[2, 2, 2\]; only \[1, 2, 2\] can be taken"),
        ({"_class_name": "CogVideoXTransformer3DModel"}, "only WanTransformer3DModel and LTXVideo.* can be taken"),
        ({"num_layers": None}, "does not describe a WanTransformer3DModel"),
    ],
)
def test_what_layers_cannot_express_is_refused(settings, message, tmp_path):
    wan().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ValueError, match=message):
        pretrained.open_pretrained(f"diffusers:{tmp_path}")


def test_other_layers_are_refused_by_name(published):
    config = pretrained.open_pretrained(published.place).config
    other = replace(config, layers=replace(config.layers, bias=False, rope="msc"))
    with pytest.raises(ValueError, match=r"model.layers.bias is False here and True there, model.layers.rope is msc"):
        initialize_from.describe_differences(initialize_from.find_weights(published.place), other, "pixels")


def test_a_rank_reads_one_tensor_at_a_time(published, monkeypatch):
    read = []
    tensor = pretrained.Pretrained.tensor
    monkeypatch.setattr(pretrained.Pretrained, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    config = pretrained.open_pretrained(published.place).config
    with initialize_from.open_initial_weights(published.place, config, "pixels") as (_, fill):
        model = MSCTransformer(config, on_part_built=lambda name, part: (fill(name, part), read.append(f"/{name}")))
    assert read.index("/blocks.0") < read.index("blocks.1.modulation")
    assert sorted(name for name in read if name[0] != "/") == sorted(model.state_dict())
