"""Intervals over clips, and the tables that hold them."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from msc.pretrain.evaluation.confidence import Table, concatenate, draw, ratio_over_clips, with_total


def test_equal_counts_give_the_usual_interval_of_a_mean():
    values = torch.tensor([[1.0, 4.0], [2.0, 4.0], [6.0, 4.0]])
    mean, half = ratio_over_clips(values, torch.ones_like(values))
    low, high = stats.t.interval(0.95, 2, loc=3, scale=stats.sem(values[:, 0].numpy()))
    assert mean.tolist() == [3, 4]
    assert half.tolist() == pytest.approx([(high - low) / 2, 0])
    mean, half = ratio_over_clips(5 * values, torch.full_like(values, 5))  # frames that only repeat tell nothing new
    assert half.tolist() == pytest.approx([(high - low) / 2, 0])


def test_clips_without_frames_take_no_part():
    sums, counts = torch.tensor([[2.0, 3.0, 0.0], [4.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    mean, half = ratio_over_clips(sums, counts)
    assert mean[:2].tolist() == [1.5, 3] and math.isnan(mean[2])
    assert half[0] > 0 and half[1:].isnan().all()
    made, true = torch.tensor([[2.0], [4.0], [9.0]]), torch.tensor([[1.0], [3.0], [0.0]])  # the last one is a still
    assert [x.tolist() for x in ratio_over_clips(made, true)] == [
        x.tolist() for x in ratio_over_clips(made[:2], true[:2])
    ]


def test_the_interval_covers_as_often_as_it_says():
    """Clips of other lengths whose frames share a level of their own, longer ones a higher one."""
    random = np.random.default_rng(0)
    draws, clips, most = 1500, 25, 12
    lengths = random.integers(3, most + 1, (draws, clips))
    levels = 1 + 0.1 * lengths + random.standard_normal((draws, clips))
    frames = levels[..., None] + 0.5 * random.standard_normal((draws, clips, most))
    frames *= np.arange(most) < lengths[..., None]
    possible = np.arange(3, most + 1)
    truth = ((1 + 0.1 * possible) * possible).sum() / possible.sum()
    sums, counts = torch.from_numpy(frames.sum(-1).T), torch.from_numpy(lengths.T.astype(float))  # clips, draws
    mean, half = ratio_over_clips(sums, counts)
    covered = float(((mean - truth).abs() <= half).double().mean())
    assert 0.93 < covered < 0.97
    # what one would get by taking frames for independent
    spread = np.sqrt((frames**2).sum((1, 2)) / lengths.sum(1) - mean.numpy() ** 2)
    naive = 1.96 * spread / np.sqrt(lengths.sum(1))
    assert (np.abs(mean.numpy() - truth) <= naive).mean() < 0.7


def test_rows_are_summed_up_and_joined():
    short, long = with_total(torch.tensor([[1.0, 2.0]])), with_total(torch.tensor([[3.0, 4.0, 5.0]]))
    sums, counts = concatenate([short, long])
    assert sums.tolist() == [[3, 1, 2, 0], [12, 3, 4, 5]]
    assert counts.tolist() == [[2, 1, 1, 0], [3, 1, 1, 1]]
    assert ratio_over_clips(sums, counts)[0].tolist() == [3, 2, 3, 5]


def test_a_table_can_be_read_kept_and_drawn():
    values = with_total(torch.rand(4, 30, generator=torch.Generator().manual_seed(0)))
    one = tuple(x[:1] for x in values)
    rows = {"a row": values, "of one clip": one}
    table = Table.of("a title", "frame", "dB", ["mean", *map(str, range(1, 31))], rows, 2)
    text = table.text()
    assert "a title (dB)" in text and "±" in text and "–" in text and "nan" not in text
    assert " 1 " in text and text.splitlines()[1].endswith("30")  # first and last of many columns
    assert max(map(len, text.splitlines())) < 150
    found = json.loads(json.dumps(table.json(), allow_nan=False))
    assert len(found["columns"]) == 31 and found["rows"]["of one clip"]["half_width"] == [None] * 31
    assert found["rows"]["a row"]["mean"][0] == pytest.approx(float(values[0][:, 0].sum() / 120), abs=1e-6)
    metrics = Table.of("t", "x", "u", ["mean", "1"], {"a (b, c)": with_total(torch.ones(2, 1))}, 1).metrics("p/")
    assert metrics == {"p/a _b_ c_/mean": 1, "p/a _b_ c_/1": 1}
    from PIL import Image

    drawn = Image.open(io.BytesIO(draw([table] * 3, "all")))
    assert drawn.format == "PNG" and min(drawn.size) > 300
