"""Where clips lie on the timeline of a source, and which of them are held out. Pure functions."""

import math
from collections.abc import Sequence
from itertools import pairwise

SPLITS = ("train", "held_out")
# Of which clips there are and which of them are held out. Raise it with every change to that: work that was begun under
# another rule is not gone on with, as the same frames could come to be on both sides.
RULE = 3


def holds(shown: Sequence[int], first: int, last: int, most: float) -> list[tuple[int, int]]:
    """Where in the ticks [first, last) of a timeline a frame shows for more than `most` of them: from behind the first
    of these to where the next frame begins.
    """
    begins = [first, *(tick for tick in range(first + 1, last) if shown[tick] != shown[tick - 1]), last]
    return [(begin + 1, end) for begin, end in pairwise(begins) if end - begin > most]


def pieces(first: int, last: int, lengths: Sequence[int], stride: int = 0) -> list[tuple[int, int]]:
    """(start, frames) of clips inside [first, last): at each place the longest of `lengths` that fits.

    stride: frames between starts, 0 for clips that follow each other without overlap.
    """
    found = []
    while fitting := [length for length in lengths if length <= last - first]:
        found.append((first, max(fitting)))
        first += stride or max(fitting)
    return found


def best_buckets(shapes: Sequence[tuple[int, int, int]], height: int, width: float, ticks: int) -> dict[int, int]:
    """Frames of a clip -> number of its bucket, for a source of `height x width` (square) pixels and `ticks` frames.

    Of the buckets (frames, height, width) whose clips are not longer than the source, those whose shape is nearest
    to the source's (in log of width over height); of these, those of the largest size that needs no enlarging, or
    else of the smallest: one size, of which a source's clips may differ in length. Empty where all are too long.
    """
    fitting = [shape for shape in shapes if shape[0] <= ticks]
    if not fitting:
        return {}

    def distance(shape: tuple[int, int, int]) -> float:
        return round(abs(math.log(width / height * shape[1] / shape[2])), 6)  # equal shapes are equal

    least = min(map(distance, fitting))
    near = {shape[1:] for shape in fitting if distance(shape) == least}
    small = [size for size in near if size[0] <= height and size[1] <= width]
    size = max(small, key=math.prod) if small else min(near, key=math.prod)
    return {shape[0]: number for number, shape in enumerate(shapes) if shape[1:] == size}


def border(shown: Sequence[int], held_out: float) -> tuple[int, int]:
    """(end of train, start of held-out) on a timeline; the last `held_out` share is held out.

    `shown` names the source frame behind each tick. Where the clock is faster than the source, a frame shows
    for several ticks; those next to the border are left out, so that no frame is on both sides.
    """
    end = len(shown) - round(len(shown) * held_out)
    start = end
    while end > 0 and start < len(shown) and shown[start] == shown[end - 1]:
        start += 1
    return end, start


def runs(
    shown: Sequence[int], held_out: float, least: int, draw: float,
    part: tuple[int, int] | None = None, span: tuple[int, int] | None = None,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Ticks [first, last) of each split in `part` of a timeline (default: all); a split may be empty.

    The border is that of `span`, in which all parts taken from the timeline lie: parts that overlap never show
    the same frame on both sides. A span too short for a held-out clip of `least` ticks is not divided: all of it is
    held out if `draw`, a number in [0, 1) of the source's own, is less than `held_out`, and else trained on.
    """
    lowest, highest = span or (0, len(shown))
    first, last = part or (lowest, highest)
    end, start = (lowest + tick for tick in border(shown[lowest:highest], held_out))
    if highest - start < least:
        end = start = lowest if draw < held_out else highest
    return {"train": (first, max(first, min(last, end))), "held_out": (min(last, max(first, start)), last)}
