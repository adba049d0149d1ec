"""What property tests draw at random."""

from typing import get_args

from hypothesis import strategies as st

from msc.pretrain.model.noise_gate import Gate
from msc.pretrain.model.scales import Scale


@st.composite
def scales_and_gate(draw):
    """One to three scales of every kind that fits a grid of even sides, and a place of the gate."""
    scales = tuple(
        Scale(
            draw(st.integers(1, 2)),
            space=draw(st.sampled_from([1, 2])),
            time=draw(st.sampled_from([1, 1, 2, 3])),
            window=draw(st.sampled_from([None, 0, 1, 2, 9])),
            patch_window=draw(st.sampled_from([None, 2, 3])),
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    return scales, draw(st.sampled_from(get_args(Gate)))
