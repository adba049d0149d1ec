"""Where clips lie on the timeline of a source, and which of them are held out. Pure functions."""

from collections.abc import Sequence

SPLITS = ("train", "held_out")


def starts(first: int, last: int, frames: int, stride: int) -> list[int]:
    """Starts of clips of `frames` frames inside [first, last), `stride` frames apart."""
    return list(range(first, last - frames + 1, stride))


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


def split(shown: Sequence[int], frames: int, stride: int, held_out: float) -> dict[str, list[int]]:
    """Starts of the clips of each split on one source's timeline; none straddles the border."""
    end, start = border(shown, held_out)
    return {
        "train": starts(0, end, frames, stride),
        "held_out": starts(start, len(shown), frames, stride),
    }
