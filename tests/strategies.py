"""What property tests draw at random."""

from typing import get_args

from hypothesis import strategies as st

from msc.pretrain.model.noise_gate import Gate
from msc.pretrain.model.scales import Scale


@st.composite
def scales_and_gate(draw):
    """One to three scales of every kind that fits a grid of even sides, and a place of the gate."""
    heads, space, patch_window = st.integers(1, 2), st.sampled_from([1, 2]), st.sampled_from([None, 2, 3])
    pooled = st.builds(
        Scale, heads, space, st.sampled_from([1, 1, 2, 3]), st.sampled_from([None, 0, 1, 2, 9]), patch_window
    )
    routed = st.builds(
        Scale, heads, space, st.just(1), st.sampled_from([None, 2, 3]), patch_window, st.sampled_from([1, 2, 5])
    )
    scales = tuple(draw(st.lists(st.one_of(pooled, pooled, routed), min_size=1, max_size=3)))
    return scales, draw(st.sampled_from(get_args(Gate)))
