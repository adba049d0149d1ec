"""Sharding along causal time equals one process: outputs, input gradients and every parameter gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from context_parallel_ranks import (
    SCALES,
    Case,
    backward,
    causal_on_a_rank,
    change_after,
    compiled_on_a_rank,
    in_double,
    kept_on_a_rank,
    make,
    noise_on_a_rank,
    on_a_rank,
)
from gloo_ranks import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from msc.parallel.context_parallel import required_transfers, shard_bounds
from msc.parallel.mesh import placement_warning
from msc.pretrain.model.past_context import WholeVideo

# Units (of how many frames) per video: shared out evenly, unevenly, and one for each rank
SIZES = {2: [(6, 1), (5, 2), (2, 1)], 4: [(8, 1), (11, 1), (4, 1)], 8: [(16, 1), (19, 1), (8, 1)]}


def on(backend, ranks):
    needed = 1 if backend == "one GPU" else ranks
    gpus = pytest.mark.skipif(torch.cuda.device_count() < needed, reason=f"needs {needed} GPU(s)")
    return pytest.param(backend, ranks, marks=pytest.mark.gloo if backend == "gloo" else gpus)


RECOMPUTE = ["full", "none", "cheap"]
GROUPS = [on(backend, ranks) for ranks in (2, 4) for backend in ("gloo", "nccl")]


def layouts(name, ranks):
    """The layouts that can serve all scales of a model."""
    scales = SCALES[name]
    found = ["halo"]
    if all(scale.heads % ranks == 0 for scale in scales):
        found.append("ulysses")
    if name.startswith("dense"):
        found.append("ring")
    return found


@given(st.integers(1, 50), st.integers(1, 8))
def test_bounds_share_out_every_unit(units, ranks):
    if units < ranks:
        with pytest.raises(ValueError, match=f"{units} units.*{ranks} ranks"):
            shard_bounds(units, ranks)
        return
    edges = shard_bounds(units, ranks)
    shares = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert edges[0] == 0 and edges[-1] == units and max(shares) - min(shares) <= 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 12), st.integers(1, 5))
def test_transfers_bring_exactly_what_is_needed(units, ranks, window, every):
    if units < ranks:
        return
    edges = shard_bounds(units, ranks)

    def before(first):
        return min(window, first // every)

    messages = required_transfers(edges, before, every)
    for target in range(ranks):
        items = [i for source, to, a, b in messages if to == target for i in range(a, b)]
        end = edges[target] // every
        assert items == list(range(end - before(edges[target]), end))
    for source, _, a, b in messages:
        assert edges[source] // every <= a < b <= edges[source + 1] // every
    if every == 1 and all(b - a >= window for a, b in zip(edges, edges[1:], strict=False)):
        # a windowed scale sends the same amount however long the video and however many the ranks
        assert all(b - a == window for _, _, a, b in messages)


def test_rows_that_lie_on_more_machines_than_they_need_are_told():
    blocks, turns = [*"aaaabbbb"], [*"abababab"]
    assert all(not placement_warning(blocks, sp) for sp in (1, 2, 4, 8))
    assert placement_warning(turns, 2).startswith("4 of 4 groups of parallel.sp = 2 ranks span more machines")
    assert placement_warning(turns, 4).startswith("2 of 2") and not placement_warning(turns, 8)
    assert placement_warning([*"aaabbb"], 2).startswith("1 of 3")


@pytest.mark.parametrize("backend, ranks", [*GROUPS, on("nccl", 8)])
def test_sharded_equals_one_process(backend, ranks):
    """Every kind of scale in every layout that serves it; with and without recomputation; all gates."""
    kinds = [(name, layout) for name in SCALES for layout in layouts(name, ranks)]
    mixed = [("default", "ulysses+halo+halo"), ("for every layout", "halo+ring+ulysses")]
    kinds += mixed if ranks == 2 else []
    cases = [
        Case(name, layout, units, frames_per_unit, recompute=RECOMPUTE[index % 5 % 3], known=index % 3 > 0)
        for index, ((name, layout), (units, frames_per_unit)) in enumerate(product(kinds, SIZES[ranks]))
    ]
    results = run_ranks(on_a_rank, ranks, backend, cases)
    for case, *parts in zip(cases, *results, strict=True):
        model, *inputs = case.make()
        out, x_grad, grads = backward(model, *inputs, WholeVideo())
        close(torch.cat([p[0] for p in parts], 1), out, f"{case}: output")
        close(torch.cat([p[1] for p in parts], 1), x_grad, f"{case}: input gradient")
        for parameter, expected in grads.items():
            assert expected is not None, f"{parameter} has no gradient"
            close(sum(p[2][parameter] for p in parts), expected, f"{case}: gradient of {parameter}")


@pytest.mark.gloo
def test_recomputation_changes_no_bit_across_ranks():
    kinds = [("default", "halo"), ("routed", "halo"), ("pooled in time", "halo")]
    kinds += [("dense", "ulysses"), ("dense", "ring")]
    cases = [Case(*kind, 6, dtype=torch.float32, recompute=recompute) for kind in kinds for recompute in RECOMPUTE]
    for results in run_ranks(on_a_rank, 2, "gloo", cases):
        for index, (out, x_grad, grads, *_) in enumerate(results):
            full_out, full_x_grad, full_grads, *_ = results[index - index % 3]
            assert torch.equal(out, full_out) and torch.equal(x_grad, full_x_grad), cases[index]
            for name, grad in grads.items():
                assert torch.equal(grad, full_grads[name]), f"{cases[index]}: {name}"


@pytest.mark.gloo
def test_noise_levels_travel_once_and_only_where_they_are_not_known():
    """As one message for all scales, layouts and layers; training knows those of whole clips."""
    kinds = [("default", "halo"), ("for every layout", "halo+ring+ulysses")]
    cases = [Case(*kind, 5, gate=gate) for kind in kinds for gate in ("logits", "none")]
    for results in run_ranks(noise_on_a_rank, 2, cases):
        for case, (unknown, known, same) in zip(cases, results, strict=True):
            assert (unknown, known, same) == (int(case.gate == "logits"), 0, True), case


def close(actual, expected, what, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


@pytest.mark.gloo
def test_a_compiled_block_is_one_graph_with_its_messages():
    compiled_equals_one_process("gloo", 2, [("one windowed scale", "halo")], units=3)


@pytest.mark.slow  # minutes of tracing
@pytest.mark.parametrize("backend, ranks", [*GROUPS, on("one GPU", 2)])
def test_compiled_blocks_stay_one_graph_across_ranks(backend, ranks):
    """No windows in space: each of their sizes is a kernel to compile."""
    kinds = [("pooled in time", "halo"), ("one windowed scale", "halo"), ("dense", "ulysses"), ("dense", "ring")]
    compiled_equals_one_process(backend, ranks, kinds)


def compiled_equals_one_process(backend, ranks, kinds, units=9):
    cases = [Case(*kind, units, dtype=torch.float32, width=128) for kind in kinds]
    tolerance = 1e-5 if backend == "gloo" else 1e-4  # FlexAttention in fp32, as in test_cuda.py
    for case, *ranks_results in zip(cases, *run_ranks(compiled_on_a_rank, ranks, backend, cases), strict=True):
        model, *inputs = case.make()
        one = summary([backward(model, *inputs, WholeVideo())])
        for way, parts in zip(("eager", "compiled"), zip(*ranks_results, strict=True), strict=True):
            for name, value in summary(parts).items():
                error = (value - one[name]).norm() / one[name].norm()
                assert error < tolerance, f"{case}, {way}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("backend, ranks", GROUPS)
def test_causality_is_bit_identical_on_the_whole_model_across_ranks(backend, ranks):
    cuts = [1, 3, 4, 6]
    cases = [Case(*kind, 7, dtype=torch.float32) for kind in KINDS_OF_LAYOUT]
    results = run_ranks(causal_on_a_rank, ranks, backend, cases, cuts)
    for case, *outs in zip(cases, *results, strict=True):
        before, *after = (torch.cat(parts, 1) for parts in zip(*outs, strict=True))
        for cut, changed in zip(cuts, after, strict=True):
            assert torch.equal(before[:, :cut], changed[:, :cut]), case
            assert not torch.equal(before[:, cut:], changed[:, cut:]), case


@pytest.mark.gloo
def test_with_recomputation_a_rank_keeps_no_more_than_the_inputs_of_its_layers():
    """Messages are nodes of the graph that outlive the recomputed block: they must not keep what they carried."""
    case = Case("default", "halo", 16, recompute="full")
    one = 2 * 8 * (4 * 6) * 64 * 8  # two clips, eight units of a rank, tokens, width, bytes
    for kept in run_ranks(kept_on_a_rank, 2, case):
        assert 5 * one <= kept < 6.5 * one  # two layers, three at the end, and what frames keep; it was 12


KINDS_OF_LAYOUT = [("default", "halo"), ("dense", "ulysses"), ("dense", "ring")]


@pytest.mark.parametrize("backend, ranks", GROUPS)
def test_bf16_errs_no_more_on_many_ranks_than_on_one(backend, ranks):
    """Against the same rounded weights in float64. And the same run twice is bit-identical, gradients included."""
    cases = [Case(*kind, 11, dtype=torch.bfloat16) for kind in KINDS_OF_LAYOUT]
    once, again = ([*zip(*run, strict=True)] for run in zip(*(
        (ranks_results[: len(cases)], ranks_results[len(cases) :])
        for ranks_results in run_ranks(on_a_rank, ranks, backend, cases * 2)
    ), strict=True))  # fmt: skip
    device = "cuda" if backend == "nccl" else "cpu"  # others round otherwise
    for case, parts, same in zip(cases, once, again, strict=True):
        model, *inputs = case.make("sdpa")
        one = summary([backward(model.to(device), *(x.to(device) for x in inputs), WholeVideo())])
        exact = case.make()[0].double()
        truth = summary([backward(exact, *in_double(inputs), WholeVideo())])
        many = summary(parts)
        for name in truth:
            errors = [float((got[name].double() - truth[name]).norm() / truth[name].norm()) for got in (many, one)]
            assert errors[0] <= 1.5 * errors[1] + 1e-3, f"{case}: {name}: {errors}"
        for name, value in summary(same).items():
            assert torch.equal(value, many[name]), f"{case}: {name} changes from run to run"


def summary(parts):
    """Output, input gradient and all parameters' gradients of a model on some ranks."""
    gradients = torch.cat([sum(p[2][name].double() for p in parts).flatten() for name in parts[0][2]])
    return {"output": torch.cat([p[0] for p in parts], 1), "input": torch.cat([p[1] for p in parts], 1),
            "parameters": gradients}  # fmt: skip


def test_causality_is_bit_identical_on_the_whole_model():
    model, x, t, condition, _ = make(SCALES["default"], 9, 1, dtype=torch.float32)
    with torch.no_grad():
        whole = model(x, t, condition)
        for cut in range(1, 9):
            assert torch.equal(model(*change_after(x, t, condition, cut))[:, :cut], whole[:, :cut])
