"""What every layout sends and costs: counted where it leaves a rank, closed forms, and the choice between them."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from context_parallel_ranks import SCALES, Case, events_on_a_rank, on_a_rank
from gloo_ranks import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from msc.parallel.context_parallel import shard_bounds
from msc.parallel.ring import causal_parts, zigzag_units
from msc.pretrain.kernels.sdpa import _calls
from msc.pretrain.layout_planner import (
    RING,
    ClipShape,
    Rates,
    choose_layouts,
    estimates,
    halo_values,
    layout_table,
    ring_values,
    ulysses_values,
)
from msc.pretrain.model.scales import Scale, default_scales
from msc.pretrain.parallelize import ParallelConfig
from msc.pretrain.presets import PRESETS

BATCH, LAYERS, BYTES = 2, 2, 8  # of the sharded test model, in float64


def sent(layout, scale, edges, size):
    """(forward, backward) values that each rank sends in one layer."""
    if layout == "halo":
        values = halo_values(scale, edges, size)
        return [(n, n) for n in values]
    if layout == "ulysses":
        return [(n, n) for n in ulysses_values(edges, size)]
    # backward: keys and values go around once more, and their gradients with them
    return [(placed + passed, placed + 2 * passed) for placed, passed in zip(*ring_values(edges, size), strict=True)]


@pytest.mark.gloo
def test_bytes_sent_equal_the_closed_forms():
    kinds = [(name, "halo") for name in SCALES] + [("dense", "ulysses"), ("dense", "ring")]
    cases = [Case(name, layout, units, gate="none") for name, layout in kinds for units in (8, 11)]
    results = run_ranks(on_a_rank, 4, "gloo", cases)
    for case, *parts in zip(cases, *results, strict=True):
        clip = ClipShape(case.units, 1, (4, 6), 64 // sum(s.heads for s in case.scales))
        edges = shard_bounds(case.units, 4)
        forward, backward = [0] * 4, [0] * 4
        for scale in case.scales:
            size = BATCH * clip.unit_values(scale) * BYTES * LAYERS
            for rank, both in enumerate(sent(case.layout, scale, edges, size)):
                forward[rank] += both[0]
                backward[rank] += both[1]
        assert [part[-2] for part in parts] == forward, case
        # gradients go the other way: as much in all, but from other ranks
        assert sum(part[-1] - part[-2] for part in parts) == sum(backward), case


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 3))
def test_closed_forms_as_the_documentation_gives_them(ranks, units_each, window):
    units, size = ranks * units_each, 7 * ranks * ranks
    edges = shard_bounds(units, ranks)
    if window <= units_each:
        assert halo_values(Scale(1, window=window), edges, size) == [2 * window * size] * (ranks - 1) + [0]
    assert ulysses_values(edges, size) == [4 * units_each * size * (ranks - 1) // ranks] * ranks
    if units_each % 2 == 0:
        placed, passed = ring_values(edges, size)
        assert passed == [2 * units_each * size * (ranks - 1)] * ranks
        assert all(n <= 4 * units_each * size for n in placed)


@given(st.integers(1, 9), st.integers(1, 60))
def test_zigzag_deals_out_every_unit_and_equal_work(ranks, units):
    if units < ranks:
        return
    held = zigzag_units(units, ranks)
    assert sorted(unit for own in held for unit in own) == list(range(units))
    assert all(own and list(own) == sorted(own) for own in held)
    if units % (2 * ranks) == 0:
        assert len({sum(unit + 1 for unit in own) for own in held}) == 1


@given(st.integers(1, 300))
def test_the_parts_of_a_rings_own_units_are_all_earlier_ones_in_few_calls(units):
    parts = causal_parts(units)
    for unit in range(units):
        assert sorted(seen for part in parts for seen in part[unit]) == list(range(unit))
    assert all(len(_calls(part, torch.device("cuda"))) <= 2 for part in parts)


@pytest.mark.gloo
def test_messages_travel_while_own_queries_and_keys_are_placed():
    """Forward and backward: posted before, waited for after."""
    for events in run_ranks(events_on_a_rank, 2, "gloo", Case("one windowed scale", "halo", 6, gate="none")):
        layer = ["post", "place", "wait", "place", "attend"]
        back = ["differentiate", "place back", "post", "place back", "wait"]
        assert [event for event, _ in groupby(events)] == layer * LAYERS + layer * LAYERS + back * LAYERS


def test_contiguous_shards_of_a_global_mask_are_uneven_work():
    """Slowest rank against the mean: (P/2) / (P - 1/2) in the limit of many units (53 % at P = 8)."""
    clip = ClipShape(8000, 1, (8, 8), 64)
    found = estimates(Scale(8), clip, 8, Rates(1e9, 1e12))
    assert found["ulysses"].flops / found["halo"].flops == pytest.approx(4 / 7.5, rel=1e-3)
    assert found["ring"].flops == pytest.approx(found["ulysses"].flops, rel=1e-3)
    assert found["ring"].computing == pytest.approx(RING * found["ulysses"].computing, rel=1e-3)
    windowed = estimates(Scale(8, window=2), clip, 8, Rates(1e9, 1e12))
    assert windowed["halo"].flops == pytest.approx(windowed["ulysses"].flops, rel=1e-3)


def test_auto_takes_halos_for_windows_and_balance_for_dense_scales():
    clip = ClipShape(128, 1, (64, 64), 64)
    rates = ParallelConfig().rates
    assert choose_layouts((*default_scales(16), Scale(16)), clip, 8, "auto", rates)[:2] == ("halo", "halo")
    assert choose_layouts((Scale(16),), clip, 8, "auto", rates) == ("ulysses",)
    assert choose_layouts((Scale(9),), clip, 8, "auto", rates) == ("ring",)
    assert choose_layouts((Scale(9),), clip, 2, "auto", rates) == ("ring",)
    assert choose_layouts((Scale(9),), ClipShape(64, 1, (16, 16), 64), 2, "auto", rates) == ("halo",), (
        "attention in parts is slower"
    )
    assert choose_layouts((Scale(9),), ClipShape(64, 1, (16, 16), 64), 8, "auto", rates) == ("halo",), (
        "keys travel for longer"
    )
    assert choose_layouts((Scale(16), Scale(8, window=1)), clip, 8, "ring", rates) == ("ring", "halo")
    with pytest.raises(ValueError, match="9 heads of scale 1 do not divide by parallel.sp = 8"):
        choose_layouts((Scale(16), Scale(9)), clip, 8, "ulysses", rates)
    with pytest.raises(ValueError, match="time 1, window null and top null"):
        choose_layouts((Scale(16, window=2),), clip, 8, "ring", rates)
    (line,) = layout_table((Scale(16),), clip, 8, "auto", rates)
    assert line[1].startswith("ulysses") and "halo" in line[1] and "ring" in line[1]


def test_where_ranks_wait_long_for_each_other_halos_are_chosen():
    """The coarse scale of `base` on four ranks; what is measured there says so (docs/benchmarks.md)."""
    coarse, clip = PRESETS["base"]().model.scales[-1], ClipShape(2048, 1, (16, 16), 64)
    rates = ParallelConfig().rates
    assert choose_layouts((coarse,), clip, 4, "auto", rates) == ("halo",)
    assert choose_layouts((coarse,), clip, 4, "auto", replace(rates, wait_s=0.0)) == ("ulysses",)
    assert choose_layouts((coarse,), replace(clip, units=16384), 4, "auto", rates) == ("ulysses",), "a longer clip"


def test_a_faster_network_never_makes_a_layout_slower():
    clip = ClipShape(64, 1, (16, 16), 64)
    for scale in default_scales(16) + (Scale(16),):
        slow, fast = (estimates(scale, clip, 4, Rates(rate, 3e14, 8e-5)) for rate in (1e9, 1e12))
        assert all(fast[layout].seconds <= slow[layout].seconds for layout in fast)
        assert torch.isfinite(torch.tensor([e.seconds for e in slow.values()])).all()
