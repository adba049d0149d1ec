"""Configuration of a conversion."""

from dataclasses import dataclass

from ..shards.index import STORES
from ..signals import MAX_SIGNALS
from .signal_tracks import SignalRequest, parse_request
from .sources import COLUMNS


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert and how. Frames are video frames at `fps`, sizes are pixels.

    sources: files, folders (searched through all levels), tars and manifests (see sources.py).
    stride: frames between the starts of clips, 0 for `frames` (no overlap).
    held_out: share of each source's timeline, at its end, kept from training; of sources too short for that and of
        recordings that lie in pieces, the share that is held out whole.
    store: "video" (mp4), "latent" (safetensors) or "auto" (latents for diffusers autoencoders only, as haar and pixels
        are cheaper to compute than to read).
    max_bad: share of sources that may be unreadable; one unreadable source alone never stops a conversion.
    overwrite: replace `out` if it holds converted shards.
    text: folder of the text encoder for captions, "" for none.
    scenes: change between frames, in [0, 255], that no clip may contain; 0 for no scene detection.
    min_brightness, min_motion: in [0, 1]; clips below are left out.
    crop: "centre", or "random" for a place of each clip's own.
    buckets: (frames, height, width) of several clip shapes, instead of the one of `frames`, `height` and `width`; which
        one a source takes is decided by clip_ranges.best_buckets.
    signals: NAME[,kind=…][,take=…][,shift=ROWS] of each signal (signal_tracks.parse_request).
    """

    sources: tuple[str, ...]
    out: str
    frames: int = 32
    height: int = 128
    width: int = 128
    fps: float = 12.0
    stride: int = 0
    held_out: float = 0.1
    autoencoder: str = "haar"
    store: str = "auto"
    clips_per_shard: int = 256
    max_bad: float = 0.2
    workers: int = 1
    overwrite: bool = False
    text: str = ""
    scenes: float = 0.0
    min_brightness: float = 0.0
    min_motion: float = 0.0
    crop: str = "centre"
    buckets: tuple[tuple[int, int, int], ...] = ()
    signals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no sources: name at least one video or folder of videos")
        for name in ("frames", "height", "width", "clips_per_shard", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for bucket in self.buckets:
            if len(bucket) != 3 or min(bucket) < 1:
                raise ValueError(f"a bucket is frames x height x width, each at least 1, not {bucket}")
            if self.buckets.count(bucket) > 1:
                raise ValueError(f"bucket {'x'.join(map(str, bucket))} is given twice")
        if self.stride < 0:
            raise ValueError(f"stride is {self.stride}, it must be at least 1, or 0 for no overlap")
        if not 0.01 <= self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}, it must be from 0.01 to 1000")
        for name in ("held_out", "max_bad"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 0 and below 1")
        for name, highest in (("scenes", 255), ("min_brightness", 1), ("min_motion", 1)):
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be between 0 and {highest}")
        if self.crop not in ("centre", "random"):
            raise ValueError(f"crop is {self.crop!r}, expected centre or random")
        if self.store not in (*STORES, "auto"):
            raise ValueError(f"store is {self.store!r}, expected video, latent or auto")
        names = [request.name for request in self.signal_requests]
        if len(set(names)) < len(names) or len(names) > MAX_SIGNALS or set(names) & set(COLUMNS):
            raise ValueError(
                f"signals are {', '.join(names)}: expected at most {MAX_SIGNALS} of different names, and none of "
                f"{', '.join(COLUMNS)}, the columns of lists"
            )

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, height and width of the clips of every bucket."""
        return self.buckets or ((self.frames, self.height, self.width),)

    @property
    def signal_requests(self) -> list[SignalRequest]:
        return [parse_request(text) for text in self.signals]

    @property
    def kind(self) -> str:
        """What is stored: "video" or "latent"."""
        if self.store != "auto":
            return self.store
        return "latent" if self.autoencoder.startswith("diffusers:") else "video"
