"""What clips and their continuations add to the tables of `msc evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fake_checkpoints
import pytest
import torch

from msc.datasets.loading.mixture import DataConfig, ShardSetConfig
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.synthetic import moving_textures, write_videos
from msc.pretrain.diffusion.autoencoder import open_autoencoder
from msc.pretrain.evaluation import evaluate as evaluation
from msc.pretrain.evaluation.confidence import OTHER_RUN, ratio_over_clips
from msc.pretrain.evaluation.evaluate import TABLES, distances, evaluate, table_of, with_differences
from msc.pretrain.evaluation.rollouts import drift, of_clip
from msc.pretrain.inference.load import TrainedModel
from msc.pretrain.requests import EvaluateConfig
from msc.pretrain.tracking.throughput import DESCRIPTION

SHOWN = 4


@pytest.fixture(scope="module")
def truth():
    return moving_textures(0, 1, 10, 24, 32)[0].double() / 255


def estimate(rows, table, name):
    return ratio_over_clips(*rows[table, name])[0]


def test_the_truth_itself_is_perfect_and_does_not_drift(truth):
    rows = of_clip(truth, iter([truth.flip(3), truth]), truth, SHOWN)
    assert estimate(rows, "psnr_by_horizon", "best of 2").tolist() == [100.0] * 7  # a mean and six frames ahead
    assert estimate(rows, "ssim_by_horizon", "mean prediction").tolist() == pytest.approx([1.0] * 7)
    copied = estimate(rows, "psnr_by_horizon", "copy last")
    assert copied[1] > copied[-1] and copied[0] == pytest.approx(float(copied[1:].mean()))
    expected = 10 * torch.log10(1 / (truth[SHOWN - 1] - truth[SHOWN]).square().mean())
    assert copied[1] == pytest.approx(float(expected))
    gained = estimate(rows, "psnr_by_horizon", "mean prediction - copy last")
    torch.testing.assert_close(gained, 100 - copied)
    rows = of_clip(truth, iter([truth]), truth, SHOWN)
    assert ("psnr_by_horizon", "best of 1") not in rows
    for name in ("contrast", "sharpness", "motion", "1/4 to 1/2 c/px", "below 1/4 c/px"):
        torch.testing.assert_close(estimate(rows, "drift", name), torch.tensor([0.0, *[1.0] * 6]).double())


def test_a_made_up_drift_is_found(truth):
    """Contrast that falls by a twentieth per frame: its square's slope is known, motion stands still in a still."""
    still = truth[:1].expand(10, -1, -1, -1)
    mean = still.mean((2, 3), keepdim=True)
    faded = torch.cat([still[:SHOWN], *[mean[:1] + (1 - 0.05 * h) * (still[:1] - mean[:1]) for h in range(1, 7)]])
    rows = of_clip(still, iter([faded, faded]), still, SHOWN)
    fading = 1 - 0.05 * torch.arange(1.0, 7).double()
    contrast = estimate(rows, "drift", "contrast")
    torch.testing.assert_close(contrast, torch.cat((torch.tensor([-0.05]).double(), fading)))
    for name in ("sharpness", "1/4 to 1/2 c/px", "below 1/4 c/px"):
        torch.testing.assert_close(estimate(rows, "drift", name)[1:], fading**2)
    assert estimate(rows, "drift", "motion").isnan().all()  # nothing moves in truth to compare with


def test_a_slope_is_relative_to_what_is_true():
    """Twice a trait that falls itself: the difference falls as fast as the trait."""
    true = torch.tensor([4.0, 3.0, 2.0])
    sums, counts = drift(2 * true, true)
    assert (sums / counts)[0].tolist() == pytest.approx([-1 / 3, 2, 2, 2])


def test_differences_are_paired():
    """Two runs that differ by the same in every clip, however unlike clips are."""
    values = torch.tensor([[1.0], [5.0], [9.0]]).double()
    part = (torch.cat((values, values), 1), torch.ones(3, 2).double())
    worse = (part[0] + 0.25, part[1])
    rows = {("loss_by_position", "model"): part, ("loss_by_position", f"{OTHER_RUN}model"): worse}
    table = table_of("loss_by_position", with_differences(rows))
    assert list(table.rows) == ["model", f"{OTHER_RUN}model", "model - other's"]
    mean, half = table.rows["model - other's"]
    assert mean == pytest.approx([-0.25, -0.25]) and half == pytest.approx([0, 0], abs=1e-12)
    assert table.rows["model"][1][0] > 1


def test_distances_need_more_clips_than_features():
    generator = torch.Generator().manual_seed(0)
    true, made = torch.randn(30, 3, generator=generator), torch.randn(30, 3, generator=generator)
    found = distances({"truth": true, "sample": made, "copy last": true})
    assert found["copy last"] == pytest.approx(0, abs=1e-9) and found["sample"] > 0.01
    assert distances({"truth": true[:3], "sample": made[:3]}) == {}
    assert distances({}) == {}


def test_clips_of_other_buckets_are_measured_but_not_continued(tmp_path, monkeypatch):
    """Three held-out clips: none in the first bucket, two in the one that is continued."""
    write_videos(tmp_path / "in" / "wide", 0, 2, 44, 32, 48)
    write_videos(tmp_path / "in" / "tall", 1, 1, 60, 48, 32)
    settings = {"fps": 12, "held_out": 0.25, "autoencoder": "pixels"}
    buckets = ((4, 16, 24), (8, 16, 24), (8, 24, 16))
    sources, out = (str(tmp_path / "in"),), tmp_path / "shards"
    convert(ConvertConfig(sources, str(out), buckets=buckets, **settings), lambda video: video / 127.5 - 1, 1)
    config, space = fake_checkpoints.configured()
    metrics = dataclasses.replace(config.metrics, tracking_uri="none")
    config = dataclasses.replace(config, data=DataConfig((ShardSetConfig(str(out)),)), metrics=metrics)
    model, autoencoder = fake_checkpoints.random_model(config.model), open_autoencoder("pixels")
    trained = TrainedModel(model, config, space, autoencoder, 7, 28, torch.device("cpu"))
    monkeypatch.setattr(evaluation, "open_run", lambda *_: trained)
    monkeypatch.setattr(evaluation, "open_features", lambda *_: lambda video: video.mean((1, 3, 4))[:, :2].double())
    text = evaluate(tmp_path, EvaluateConfig(steps=1, samples=1))
    assert "3 held-out clips" in text and "PSNR" in text and "nothing to continue" not in text
    assert "2 held-out clips" in evaluate(tmp_path, EvaluateConfig(clips=1, steps=1, samples=1)), (
        "each bucket gives at least one"
    )
    with pytest.raises(ValueError, match="needs more than 2 clips to continue, there are 2"):
        evaluate(tmp_path, EvaluateConfig(steps=1, samples=1, features=Path("network")))


def test_every_table_is_explained_above_the_curves():
    assert [name for name in (*TABLES, "frechet") if f"`{name}`" not in DESCRIPTION] == []
