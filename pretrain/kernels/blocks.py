"""Key blocks: the list of blocks of keys that each query unit attends to, which is all that a kernel needs to know of
causality, windows and pooling."""

KeyBlocks = tuple[tuple[int, ...], ...]
