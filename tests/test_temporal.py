"""Sharding along causal time equals one process: outputs, input gradients and every parameter gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks
from sharded import SCALES, backward, causal_on_a_rank, change_after, make, on_a_rank

from msc.parallel.temporal import bounds, transfers
from msc.pretrain.timeline import WholeVideo

GATES = ["logits", "values", "pair", "mix"]


@given(st.integers(1, 50), st.integers(1, 8))
def test_bounds_share_out_every_unit(units, ranks):
    if units < ranks:
        with pytest.raises(ValueError, match=f"{units} units.*{ranks} ranks"):
            bounds(units, ranks)
        return
    edges = bounds(units, ranks)
    shares = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert edges[0] == 0 and edges[-1] == units and max(shares) - min(shares) <= 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 12), st.integers(1, 5))
def test_transfers_bring_exactly_what_is_needed(units, ranks, window, every):
    if units < ranks:
        return
    edges = bounds(units, ranks)

    def before(first):
        return min(window, first // every)

    messages = transfers(edges, before, every)
    for target in range(ranks):
        items = [i for source, to, a, b in messages if to == target for i in range(a, b)]
        end = edges[target] // every
        assert items == list(range(end - before(edges[target]), end))
    for source, _, a, b in messages:
        assert edges[source] // every <= a < b <= edges[source + 1] // every
    if every == 1 and all(b - a >= window for a, b in zip(edges, edges[1:], strict=False)):
        # a windowed scale sends the same amount however long the video and however many the ranks
        assert all(b - a == window for _, _, a, b in messages)


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_equals_one_process(ranks):
    """Even and uneven shares, one unit per rank, windows longer than a share; with and without recomputation."""
    sizes = {2: [(4, 1), (5, 2)], 4: [(4, 1), (11, 1)]}[ranks]
    cases = [
        (name, units, frames_per_unit, GATES[index % len(GATES)], name == "default")
        for index, (name, (units, frames_per_unit)) in enumerate(product(SCALES, sizes))
    ]
    results = run_ranks(on_a_rank, ranks, cases)
    for case, *parts in zip(cases, *results, strict=True):
        name, units, frames_per_unit, gate, _ = case
        model, *inputs = make(SCALES[name], units, frames_per_unit, gate)
        out, x_grad, grads = backward(model, *inputs, WholeVideo())
        close(torch.cat([p[0] for p in parts], 1), out, f"{case}: output")
        close(torch.cat([p[1] for p in parts], 1), x_grad, f"{case}: input gradient")
        for parameter, expected in grads.items():
            assert expected is not None, f"{parameter} has no gradient"
            close(sum(p[2][parameter] for p in parts), expected, f"{case}: gradient of {parameter}")


def close(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_causality_is_bit_identical_on_the_whole_model_across_ranks(ranks):
    cuts = [1, 3, 4, 6]
    results = run_ranks(causal_on_a_rank, ranks, SCALES["default"], 7, cuts)
    before, *after = (torch.cat(parts, 1) for parts in zip(*results, strict=True))
    for cut, changed in zip(cuts, after, strict=True):
        assert torch.equal(before[:, :cut], changed[:, :cut])
        assert not torch.equal(before[:, cut:], changed[:, cut:])


def test_causality_is_bit_identical_on_the_whole_model():
    model, x, t, text, labels, _ = make(SCALES["default"], 9, 1, dtype=torch.float32)
    with torch.no_grad():
        whole = model(x, t, text, labels)
        for cut in range(1, 9):
            y, s = change_after(x, t, cut)
            assert torch.equal(model(y, s, text, labels)[:, :cut], whole[:, :cut])
