"""Clip ranges: where clips lie on the timeline of a source, and which of them are held out. Pure functions."""

import math
from collections.abc import Sequence
from itertools import pairwise

SPLITS = ("train", "held_out")
# Version of the rule by which clips are chosen and held out. Raise it with every change to that: an unfinished
# conversion under another rule is not continued, as the same frames could end up on both sides.
HELD_OUT_RULE = 5


def frozen_ranges(shown: Sequence[int], first: int, last: int, most: float) -> list[tuple[int, int]]:
    """Ranges of the ticks [first, last) of a timeline in which one frame stands still for more than `most` ticks: from
    the second tick that shows it to where the next frame begins.
    """
    begins = [first, *(tick for tick in range(first + 1, last) if shown[tick] != shown[tick - 1]), last]
    return [(begin + 1, end) for begin, end in pairwise(begins) if end - begin > most]


def split_into_clips(first: int, last: int, lengths: Sequence[int], stride: int = 0) -> list[tuple[int, int]]:
    """(start, frames) of clips inside [first, last): at each place the longest of `lengths` that fits.

    stride: frames between starts, 0 for clips that follow each other without overlap.
    """
    clips = []
    while fitting := [length for length in lengths if length <= last - first]:
        clips.append((first, max(fitting)))
        first += stride or max(fitting)
    return clips


def best_buckets(shapes: Sequence[tuple[int, int, int]], height: int, width: float, ticks: int) -> dict[int, int]:
    """Frames of a clip -> number of its bucket, for a source of `height x width` (square) pixels and `ticks` frames.

    Of the buckets (frames, height, width) whose clips are not longer than the source, those of the nearest aspect
    ratio (in log of width over height); of these, the largest size that needs no upscaling, or else the smallest.
    All clips of a source have this size and may differ in length only. Empty where all buckets are too long.
    """
    fitting = [shape for shape in shapes if shape[0] <= ticks]
    if not fitting:
        return {}

    def distance(shape: tuple[int, int, int]) -> float:
        return round(abs(math.log(width / height * shape[1] / shape[2])), 6)  # rounded, so that equal ratios tie

    least = min(map(distance, fitting))
    near = {shape[1:] for shape in fitting if distance(shape) == least}
    small = [size for size in near if size[0] <= height and size[1] <= width]
    size = max(small, key=math.prod) if small else min(near, key=math.prod)
    return {shape[0]: number for number, shape in enumerate(shapes) if shape[1:] == size}


def held_out_border(shown: Sequence[int], held_out: float, first: int = 0, last: int | None = None) -> tuple[int, int]:
    """(end of train, start of held-out) in the ticks [first, last) of a timeline; the last `held_out` share of them is
    held out.

    `shown` is the source frame at each tick. Where the clock is faster than the source, a frame shows for several
    ticks; those next to the border are left out, so that no frame is on both sides.
    """
    last = len(shown) if last is None else last
    end = start = last - round((last - first) * held_out)
    while first < end and start < last and shown[start] == shown[end - 1]:
        start += 1
    return end, start


def split_ranges(
    shown: Sequence[int], held_out: float, least: int, draw: float,
    part: tuple[int, int] | None = None, span: tuple[int, int] | None = None,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Ticks [first, last) of each split in `part` of a timeline (default: all); a split may be empty.

    The border is that of `span`, in which all parts taken from the timeline lie: overlapping parts never show the same
    frame on both sides. A span too short for a held-out clip of `least` ticks is not divided: all of it is held out
    if `draw`, the source's own number in [0, 1), is less than `held_out`, otherwise all of it is trained on.
    """
    lowest, highest = span or (0, len(shown))
    first, last = part or (lowest, highest)
    end, start = held_out_border(shown, held_out, lowest, highest)
    if highest - start < least:
        end = start = lowest if draw < held_out else highest
    return {"train": (first, max(first, min(last, end))), "held_out": (min(last, max(first, start)), last)}
