"""Key blocks: the list of blocks of keys that each query unit attends to, which is all that a kernel needs to know of
causality, windows and pooling."""

from typing import NamedTuple

KeyBlocks = tuple[tuple[int, ...], ...]


class Candidates(NamedTuple):
    """Key blocks, `first` to `end`, among which the query blocks of a unit choose (routed.py)."""

    first: int
    end: int
