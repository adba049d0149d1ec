"""Per-frame signals in the model: what is unknown, where they start, roll-outs steered unit by unit, options."""

import math
from dataclasses import replace

import pytest
import torch
from context_parallel_ranks import SCALES, SIGNALS, make

from msc.datasets.loading.dataloader import Batch
from msc.pretrain.batch_inputs import micro_batches
from msc.pretrain.diffusion.rectified_flow import keep_condition
from msc.pretrain.diffusion.sampler import RollOut, Sampling, generate
from msc.pretrain.inference.signal_options import read_guidance, read_signals
from msc.pretrain.model.conditioning import Condition, SignalConfig
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.transformer import MSCTransformer

KEYS, POSE = SIGNALS


@torch.no_grad()
def test_new_signals_change_nothing_at_first():
    """So that a model trained without signals goes on with them unchanged."""
    model, x, t, condition, _ = make(SCALES["default"], 4, 1)
    plain = MSCTransformer(replace(model.config, signals=())).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    steered = MSCTransformer(model.config).double()
    assert not steered.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert torch.equal(plain(x, t, condition), steered(x, t, condition))


@torch.no_grad()
def test_nan_is_unknown_and_unknown_is_not_zero():
    model, x, t, condition, _ = make(SCALES["default"], 4, 1)
    keys = condition.signals["keys"]
    unknown = replace(condition, signals={**condition.signals, "keys": torch.full_like(keys, math.nan)})
    left_out = replace(condition, signals={"pose": condition.signals["pose"]})
    zero = replace(condition, signals={**condition.signals, "keys": torch.zeros_like(keys)})
    assert torch.equal(model(x, t, unknown), model(x, t, left_out))
    assert model(x, t, unknown).isfinite().all()
    assert not torch.allclose(model(x, t, unknown), model(x, t, zero))


def test_a_continuous_signal_is_normalised_for_every_video_frame():
    model, *_ = make(SCALES["default"], 1, 1)
    raw = {"pose": torch.tensor([[[0.5, 4.5]]]), "keys": torch.tensor([[[3.0, 1.0]]]), "other": torch.zeros(1, 1, 1)}
    normalised = model.normalise_signals(raw)
    assert normalised["pose"].tolist() == [[[0.0, 2.0]]] and normalised["keys"].tolist() == [[[3.0, 1.0]]]
    assert list(normalised) == ["pose", "keys"]


def test_signals_are_left_out_independently_of_each_other_and_of_text():
    clips = [(sample, 3) for sample in range(4000)]
    kept = [keep_condition(0.3, 5, clips), *(keep_condition(0.3, 5, clips, signal=n) for n in range(2))]
    for own in kept:
        assert own.double().mean() == pytest.approx(0.7, abs=0.03)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (kept[a] & kept[b]).double().mean() == pytest.approx(0.49, abs=0.03)


def test_a_batch_is_split_with_its_signals():
    batch = Batch([1, 2, 3], [0] * 3, ["a", "b", "c"], signals={"keys": torch.arange(6.0).reshape(3, 1, 2)})
    first, second = micro_batches(batch, 2)
    assert first.signals["keys"].tolist() == [[[0.0, 1.0]], [[2.0, 3.0]]]
    assert second.samples == [3] and second.signals["keys"].tolist() == [[[4.0, 5.0]]]


def test_a_roll_out_takes_the_signals_of_every_unit_as_it_comes():
    model, x, _, condition, _ = make(SCALES["default"], 5, 2, dtype=torch.float32)
    how, context = Sampling(2, 3), x[:, :4]
    units = [condition.of_frames(slice(first, first + 2)) for first in range(0, 10, 2)]
    whole = list(generate(model, context, 3, how, condition))
    roll_out, steered = RollOut(model, context, how), []
    for unit, known in zip(context.split(2, 1), units[:2], strict=True):
        roll_out.append(unit, known)
    for own in units[2:]:
        steered.append(roll_out.generate(own))
        roll_out.append(steered[-1], own)
    assert all(map(torch.equal, whole, steered))
    other = Condition(condition.text, condition.labels, {"keys": -condition.signals["keys"]})
    assert not torch.equal(whole[0], next(generate(model, context, 1, how, other)))


CONFIG = ModelConfig(channels=3, frames_per_unit=2, signals=(SignalConfig("keys", "discrete", ("left", "up"), 2), POSE))


def test_a_schedule_of_values_is_held_for_its_units():
    values = read_signals(CONFIG, ["keys=up:1,left:2"], None)["keys"]
    up, left = [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]  # of both video frames of a latent frame
    assert values.tolist() == [up, up, left, left, left, left]
    held = read_signals(CONFIG, ["keys=left:1,up"], 3)["keys"]
    assert held.tolist() == [left, left, up, up, up, up]
    assert read_signals(CONFIG, [], 3) == {}
    assert read_guidance(CONFIG, ["keys=2.5"]) == {"keys": 2.5}


def test_a_file_holds_a_row_a_unit(tmp_path):
    keys, pose, timed = (tmp_path / f"{name}.csv" for name in ("keys", "pose", "timed"))
    keys.write_text("action\nup\nleft\n")
    pose.write_text("x\n1.5\n2.5\n")
    timed.write_text("time,x\n0,1.5\n1,2.5\n")
    values = read_signals(CONFIG, [f"keys={keys}", f"pose={pose}"], None)
    up, left = [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]
    assert (
        values["keys"].tolist() == [up, up, left, left] and values["pose"].tolist() == [[1.5] * 2] * 2 + [[2.5] * 2] * 2
    )
    for option, message in ((f"keys={pose}", "fractions"), (f"pose={timed}", "has times"), (f"pose={keys}", "columns")):
        with pytest.raises(ValueError, match=message):
            read_signals(CONFIG, [option], None)
    keys.write_text("action\nup\nbelow\n")
    with pytest.raises(ValueError, match="holds 'below'; keys is one of left, up"):
        read_signals(CONFIG, [f"keys={keys}"], None)


@pytest.mark.parametrize(("options", "units", "message"), [
    (["jump=left"], None, "expected NAME=FILE or NAME=VALUE:UNITS,... and one of keys, pose"),
    (["keys"], None, "expected NAME=FILE"),
    (["keys=down"], None, "'down' is neither a file nor one of the values left, up"),
    (["keys=left:0"], None, "'left:0': after the colon stands for how many units"),
    (["keys=left,up:2"], None, "'left' needs a number of units, as left:8"),
    (["keys=left:2"], 3, "keys is for 2 units, 3 are to be generated"),
    (["keys=left", "keys=up"], None, "keys is given twice"),
    (["pose=left"], None, "the values of a continuous signal need one"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, units, message):
    with pytest.raises(ValueError, match=message):
        read_signals(CONFIG, options, units)


@pytest.mark.parametrize(("values", "message"), [
    ({"name": "a/b"}, "named 'a/b'"),
    ({"columns": ()}, "0 columns"),
    ({"mean": (1.0,)}, "mean is"),
    ({"kind": "continuous", "mean": (0.0, 0.0), "std": (1.0, 0.0)}, "all must be positive"),
    ({"kind": "continuous", "mean": (math.nan, 0.0)}, "mean is"),
])  # fmt: skip
def test_signals_that_no_model_can_have_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SignalConfig(**{"name": "keys", "kind": "discrete", "columns": ("a", "b"), **values})
    with pytest.raises(ValueError, match="their names must differ"):
        ModelConfig(signals=(KEYS, KEYS))
