"""Initialisation from existing weights: which tensors are taken, which are new, what is refused."""

from __future__ import annotations

from dataclasses import replace

import fake_checkpoints
import pytest
import torch

from msc.pretrain import validation
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.checkpoints import initialize_from
from msc.pretrain.export.export import export
from msc.pretrain.model.conditioning import SignalConfig
from msc.pretrain.model.noise_gate import GateConstants
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run, and its models; its weights also exported as bf16."""
    run = tmp_path_factory.mktemp("runs") / "source"
    models = fake_checkpoints.write_run(run, 2, "flat")
    export(run, dtype="bf16", max_shard_size=40_000)
    return run, models


def started(place, **model):
    """A new random model of this shape with initial weights, the lines logged, and its state before."""
    config, _ = fake_checkpoints.configured(**model)
    new = fake_checkpoints.random_model(config.model, seed=7)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with initialize_from.open_initial_weights(place, config.model, "pixels") as (lines, fill):
        fill("", new)
    return new, lines, before


def test_the_averaged_weights_of_a_run_are_taken(source):
    run, models = source
    new, lines, _ = started(run)
    assert all(torch.equal(value, models["ema"].state_dict()[name]) for name, value in new.state_dict().items())
    assert lines == [f"starting from the averaged weights of step 40 of the run {run}"]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in new.parameters())


def test_the_given_checkpoint_is_used_though_a_later_one_appears(tmp_path):
    models = fake_checkpoints.write_run(tmp_path / "run", step=40)
    first = checkpoint_directory.latest(tmp_path / "run")
    fake_checkpoints.write_run(tmp_path / "run", step=50)
    config, _ = fake_checkpoints.configured()
    new = fake_checkpoints.random_model(config.model, seed=7)
    with initialize_from.open_initial_weights(tmp_path / "run", config.model, "pixels", first) as ((line,), fill):
        fill("", new)
    assert "of step 40 " in line and "of step 50 " in initialize_from.find_weights(tmp_path / "run").what
    assert all(torch.equal(value, models["ema"].state_dict()[name]) for name, value in new.state_dict().items())


def test_exported_weights_of_any_dtype_are_taken(source):
    run, models = source
    new, lines, _ = started(run / "export")
    expected = {name: value.bfloat16().float() for name, value in models["ema"].state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in new.state_dict().items())
    assert lines == [f"starting from the exported weights of step 40 in {run / 'export'}"]


def test_dense_weights_initialise_a_multi_scale_model(tmp_path):
    """All weights have the same shapes; only the gate's offsets, which no dense model has had use for, start anew."""
    dense = (Scale(4),)
    models = fake_checkpoints.write_run(tmp_path / "dense", scales=dense, gate="none")
    new, lines, before = started(tmp_path / "dense")
    state, taken = new.state_dict(), models["ema"].state_dict()
    fresh = {name for name in state if name.endswith("delta")}
    assert state.keys() - taken.keys() == fresh and len(fresh) == 2
    assert all(torch.equal(state[name], (before if name in fresh else taken)[name]) for name in state)
    text = "\n".join(lines)
    assert "model.scales is (Scale(heads=2" in text and "model.gate is logits here, and was none" in text
    assert "newly initialised: blocks.0.attention.delta, blocks.1.attention.delta" in text and "not used" not in text


def test_gate_offsets_are_kept_where_heads_have_the_same_scales(source):
    run, models = source
    shorter = tuple(replace(scale, window=1) for scale in fake_checkpoints.SCALES)
    new, lines, _ = started(run, scales=shorter, rope_theta=500.0)
    assert torch.equal(new.blocks[0].attention.delta, models["ema"].blocks[0].attention.delta)
    assert not [line for line in lines if line.startswith("newly")]
    assert "model.rope_theta is 500.0 here, and was 10000.0" in lines
    coarser = (*fake_checkpoints.SCALES[:2], Scale(1, 4, 2, None))
    new, lines, before = started(run, scales=coarser)
    assert torch.equal(new.blocks[0].attention.delta, before["blocks.0.attention.delta"])
    assert [line for line in lines if line.startswith("newly initialised: blocks.0.attention.delta, ")]


def test_label_and_text_layers_are_new_where_there_were_none(source, tmp_path):
    run, models = source
    new, lines, before = started(run, classes=3, text_width=5)
    state, taken = new.state_dict(), models["ema"].state_dict()
    fresh = state.keys() - taken.keys()
    assert {name.split(".")[2 if name.startswith("blocks") else 0] for name in fresh} == {
        "label", "text", "cross_attention"
    }  # fmt: skip
    assert all(torch.equal(state[name], (before if name in fresh else taken)[name]) for name in state)
    assert any(line.startswith("newly initialised: ") and line.endswith(" more") for line in lines)
    fake_checkpoints.write_run(tmp_path / "with", classes=9, text_width=5)
    new, lines, before = started(tmp_path / "with", classes=3)
    assert torch.equal(new.label.weight, before["label.weight"])
    assert "newly initialised: label.weight" in lines
    assert [line for line in lines if line.startswith("not used: blocks.0.cross_attention")]


def test_data_constants_stay_those_of_the_new_data(source):
    run, _ = source
    other = tuple(GateConstants(1.0, 2.0) for _ in fake_checkpoints.SCALES)
    new, lines, _ = started(run, gate_constants=other, latent_mean=(0.1, 0.2, 0.3))
    assert new.config.gate_constants == other
    assert lines[1:] == ["latent_mean are those of the new data", "gate_constants are those of the new data"]
    assert (
        initialize_from.describe_differences(initialize_from.find_weights(run), new.config, "haar")[-1]
        == "the latents are of haar, and were of pixels"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 64}, "model.width is 64 here and 32 there"),
        ({"depth": 3, "patch": 4}, "model.depth is 3 here and 2 there, model.patch is 4 here and 2 there"),
        ({"scales": (Scale(1), Scale(1, 2))}, "model.heads is 2 here and 4 there"),
        ({"mlp_ratio": 2.0}, "model.hidden is 64 here and 128 there"),
    ],
)
def test_other_shapes_are_refused_by_name(model, message, source):
    for place in (source[0], source[0] / "export"):
        with pytest.raises(ValueError, match=message):
            started(place, **model)


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a run folder \(config.yaml\) nor an exported one"):
        initialize_from.find_weights(tmp_path)
    fake_checkpoints.write_run(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    with pytest.raises(FileNotFoundError, match="a run without a checkpoint yet"):
        initialize_from.find_weights(tmp_path / "run")


def test_init_from_is_recorded_as_absolute_path_and_cannot_change(monkeypatch, tmp_path):
    from msc.pretrain.config import flat, load

    monkeypatch.chdir(tmp_path)
    config, _ = fake_checkpoints.configured()
    config = load(config, overrides=["train.init_from=export"])
    index = replace(validation.ASSUMED_INDEX, channels=3)
    resolved = validation.resolve(config, index)
    assert flat(resolved)["train.init_from"] == str(tmp_path / "export")
    assert validation.resolve(resolved, index) == resolved
    with pytest.raises(ValueError, match=r"trained with train.init_from = .*; it cannot go on with /else"):
        validation.check_same_model(load(resolved, overrides=["train.init_from=/else"]), flat(resolved))


def test_a_model_built_part_by_part_takes_the_same_weights(source):
    run, models = source
    config, _ = fake_checkpoints.configured()
    with initialize_from.open_initial_weights(run, config.model, "pixels") as (_, fill):
        new = MSCTransformer(config.model, on_part_built=fill)
    assert all(torch.equal(value, models["ema"].state_dict()[name]) for name, value in new.state_dict().items())


def test_initialised_model_computes_the_same_as_its_source(source):
    run, models = source
    new, _, _ = started(run)
    x, t = torch.randn(1, 6, 3, 16, 16), torch.rand(1, 6)  # another frame size and length than its clips have
    with torch.no_grad():
        assert torch.equal(new.eval()(x, t), models["ema"](x, t))


def test_signals_start_from_those_of_a_model_with_the_same(tmp_path):
    """All of them: the numbers of values must mean the same."""
    keys = SignalConfig("keys", "discrete", ("left", "right"))
    other = SignalConfig("keys", "discrete", ("right", "up"))
    for name, signals in (("with", (keys,)), ("without", ())):
        fake_checkpoints.write_run(tmp_path / name, signals=signals)

    def lines(start, *signals):
        config, space = fake_checkpoints.configured(signals=signals)
        weights = initialize_from.find_weights(tmp_path / start)
        return "\n".join(initialize_from.describe_differences(weights, config.model, space.autoencoder))

    assert "newly initialised" not in lines("with", keys)
    for start, signal in (("with", other), ("without", keys)):
        text = lines(start, signal)
        assert "newly initialised: signals.0.outer.weight, signals.0.unknown" in text
        assert "signals are those of the new data" in text
    assert "not used: signals.0.outer.weight, signals.0.unknown" in lines("with")
