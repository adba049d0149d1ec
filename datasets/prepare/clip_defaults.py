"""Size and frame rate of clips that the user does not give: those that most of the videos have."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..video import Video, probe
from .sources import Source

PROBED = 16  # files, spread evenly over all
MULTIPLE = 16  # haar halves sides, a patch is 2 or 4, and scales pool up to 4 tokens: what all presets take
SHORTER_SIDE = 256  # at most, as much larger clips are rarely meant


class ClipDefaults(NamedTuple):
    """fps, height and width; text: what was chosen and what it costs, for the user."""

    fps: float
    height: int
    width: int
    text: str


def choose_clip_defaults(
    sources: Sequence[Source], fps: float | None = None, size: tuple[int, int] | None = None
) -> ClipDefaults:
    """The commonest frame rate and size of the videos, the size as even as clips need it. fps, size: given, and kept.
    ValueError where none of those looked at can be read."""
    files = list({source.path: source for source in sources}.values())
    picked = [files[i * len(files) // min(PROBED, len(files))] for i in range(min(PROBED, len(files)))]
    videos, reason = [], ""
    for source in picked:
        try:
            videos.append(probe(source.path, source.name))
        except ValueError as error:
            reason = str(error)
    if not videos:
        raise ValueError(f"no size and frame rate can be taken from the videos ({reason}): give --size and --fps")
    rate = Counter(video.fps for video in videos).most_common(1)[0][0]
    shown = Counter(map(_shown, videos)).most_common(1)[0][0]
    fps, chosen = float(rate) if fps is None else fps, clip_size(*shown) if size is None else size
    (height, width), (tall, wide) = chosen, shown
    scale = max(height / tall, width / wide)
    cropped = 1 - height * width / (tall * wide * scale**2)
    text = f"{tall}x{wide} at {float(rate):g} fps, as most videos have, become {height}x{width} at {fps:g} fps"
    details = [f"scaled by {scale:.2f}"] * (abs(scale - 1) > 0.005) + [f"{cropped:.0%} cropped"] * (cropped >= 0.005)
    return ClipDefaults(fps, height, width, text + (f" ({', '.join(details)})" if details else ""))


def clip_size(height: int, width: int) -> tuple[int, int]:
    """The largest size within a video's of which both sides are multiples of MULTIPLE."""
    scale = min(1.0, SHORTER_SIDE / min(height, width))
    return tuple(max(MULTIPLE, round(side * scale) // MULTIPLE * MULTIPLE) for side in (height, width))  # type: ignore[return-value]


def _shown(video: Video) -> tuple[int, int]:
    """Height and width in square pixels."""
    return video.height, round(video.height * video.aspect)
