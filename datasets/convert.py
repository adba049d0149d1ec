"""Videos to shards: decode, cut into clips, encode, measure.

Everything is written in a folder beside the result and renamed at the end, so that a result is whole or not
there. Workers decode one source each; what they find is put together in the order of the sources, so that
the bytes of the result do not depend on their number.
"""

import dataclasses
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from msc.datasets.clips import SPLITS
from msc.datasets.cut import Cut, Task, cut_all, find_sources
from msc.datasets.decode import frames
from msc.datasets.files import check_replaceable, partial_folder, publish, write_atomically
from msc.datasets.shards import STORES, Index, ShardInfo, read_part, scan, write_index, write_shard
from msc.datasets.statistics import measure

Encode = Callable[[Tensor], Tensor]
CRF = 8  # near lossless: 41 to 47 dB on real clips at 128 x 128, 5 to 9 % of the raw size
MEASURED_CLIPS = 1024  # evenly over the training clips; more would not change the third digit


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert and how. `frames`, `height`, `width`, `stride` count video frames and pixels.

    sources: files and folders (searched through all levels). stride: frames between the starts of clips, 0
    for `frames` (no overlap). held_out: share of each source's timeline, at its end, kept from training.
    store: "video" (mp4), "latent" (safetensors) or "auto" (latents for diffusers autoencoders only, as
    haar and pixels are cheaper to compute than to read). max_bad: share of sources that may be broken; one
    broken source alone never stops a conversion. overwrite: replace `out` if it holds converted shards.
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

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no sources: name at least one video or folder of videos")
        for name in ("frames", "height", "width", "clips_per_shard", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.stride < 0:
            raise ValueError(f"stride is {self.stride}, it must be at least 1, or 0 for no overlap")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}, it must be above 0 and at most 1000")
        for name in ("held_out", "max_bad"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 0 and below 1")
        if self.store not in (*STORES, "auto"):
            raise ValueError(f"store is {self.store!r}, expected video, latent or auto")

    @property
    def kind(self) -> str:
        """What is stored: "video" or "latent"."""
        if self.store != "auto":
            return self.store
        return "latent" if self.autoencoder.startswith("diffusers:") else "video"


@dataclass(frozen=True)
class Report:
    """What came of a conversion: clips per split, seconds of video in them, (source, reason) skipped."""

    clips: dict[str, int]
    seconds: float
    skipped: tuple[tuple[str, str], ...]
    text: str


def convert(config: ConvertConfig, encode: Encode, temporal_factor: int) -> Report:
    """Write shards, `index.json` and `skipped.txt` into `config.out`.

    `encode` maps one clip, uint8 [T, 3, H, W], to latents [T', C, h, w]; it is called in this process only.
    Raises ValueError or FileNotFoundError for sources that do not exist, hold no video or are broken in too
    great a number, and FileExistsError where `out` is not empty (see `overwrite`).
    """
    out = Path(config.out).expanduser().resolve()
    check_replaceable(out, config.overwrite, proof="index.json")
    sources = find_sources(config.sources)
    # Before any work, so that a size the autoencoder refuses is refused here.
    latents = encode(torch.zeros(config.frames, 3, config.height, config.width, dtype=torch.uint8))
    with partial_folder(out) as partial:
        shards, results = _write_shards(config, encode, partial, sources)
        _check_clips(config, results)
        index = Index(
            store=config.kind,
            autoencoder=config.autoencoder,
            temporal_factor=temporal_factor,
            frames=latents.shape[0],
            channels=latents.shape[1],
            height=latents.shape[2],
            width=latents.shape[3],
            video_frames=config.frames,
            video_height=config.height,
            video_width=config.width,
            fps=config.fps,
            splits=shards,
            statistics=measure(_some_latents(partial, shards["train"], encode)),
            settings=_settings(config),
            skipped=sum(bool(result.skipped) for result in results),
        )
        lines = [f"{result.name}: {result.skipped}\n" for result in results if result.skipped]
        write_atomically(partial / "skipped.txt", "".join(lines).encode("utf-8", "surrogateescape"))
        write_index(partial, index)
        publish(partial, out)
    return _report(config, out, index, results)


# --- from clips to shards ----------------------------------------------------------------------------------


def _write_shards(
    config: ConvertConfig, encode: Encode, partial: Path, sources: list[tuple[str, Path]]
) -> tuple[dict[str, list[ShardInfo]], list[Cut]]:
    """Shards of both splits in the order of the sources; each is written as soon as it is full."""
    spool = partial / "spool"
    spool.mkdir()
    shards: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
    pending: dict[str, list[tuple[str, int, Path]]] = {name: [] for name in SPLITS}
    written = dict.fromkeys(SPLITS, 0)

    def flush(name: str) -> None:
        full = config.clips_per_shard
        batch, pending[name] = pending[name][:full], pending[name][full:]
        samples = ((f"{name}-{written[name] + i:09d}", _parts(config, encode, *clip)) for i, clip in enumerate(batch))
        shards[name].append(write_shard(partial / f"{name}-{len(shards[name]):06d}.tar", samples))
        written[name] += len(batch)
        for _, _, file in batch:
            file.unlink()

    results: list[Cut] = []
    broken: list[Cut] = []
    progress = _Progress(len(sources))
    for result in cut_all(_tasks(config, spool, sources), config.workers):
        results.append(result)
        if result.broken:
            broken.append(result)
            if len(broken) > max(1, config.max_bad * len(sources)):
                raise ValueError(
                    f"{len(broken)} of {len(sources)} sources are broken, at most {config.max_bad:.0%} may "
                    f"be (max_bad), among them: {'; '.join(f'{x.name}: {x.skipped}' for x in broken[:5])}"
                )
        for name in SPLITS:
            pending[name] += [(result.name, start, file) for start, file in result.clips[name]]
            while len(pending[name]) >= config.clips_per_shard:
                flush(name)
        progress.step(result)
    progress.bar.close()
    for name in SPLITS:
        if pending[name]:
            flush(name)
    spool.rmdir()
    return shards, results


def _tasks(config: ConvertConfig, spool: Path, sources: list[tuple[str, Path]]) -> list[Task]:
    return [
        Task(
            number=number,
            name=name,
            path=path,
            spool=spool,
            frames=config.frames,
            size=(config.height, config.width),
            fps=config.fps,
            stride=config.stride or config.frames,
            held_out=config.held_out,
            crf=0 if config.kind == "latent" else CRF,  # latents are made from the spooled clip
            threads=0 if config.workers == 1 else 1,
        )
        for number, (name, path) in enumerate(sources)
    ]


def _parts(config: ConvertConfig, encode: Encode, source: str, start: int, file: Path) -> dict[str, bytes]:
    """The members of one sample. The checksum lets every rank judge a sample alike, whatever it decodes."""
    content = file.read_bytes()
    if config.kind == "latent":
        latents = encode(frames(content, name=source)).detach().to("cpu", torch.float16).contiguous()
        if not torch.isfinite(latents).all():
            raise ValueError(f"{source} at frame {start}: latents overflow 16-bit floats")
        content = save({"latent": latents})
    about = {
        "source": source,
        "start": start,
        "fps": config.fps,
        "frames": config.frames,
        "size": [config.height, config.width],
        "caption": None,
        "licence": None,
        "crc32": zlib.crc32(content),
    }
    return {"json": json.dumps(about, sort_keys=True).encode(), STORES[config.kind]: content}


def _some_latents(folder: Path, shards: list[ShardInfo], encode: Encode) -> Iterator[Tensor]:
    """Up to MEASURED_CLIPS training clips, evenly spaced, as latents [T', C, h, w] read from the shards."""
    total = sum(shard.samples for shard in shards)
    chosen = {i * total // min(total, MEASURED_CLIPS) for i in range(min(total, MEASURED_CLIPS))}
    number = 0
    for shard in shards:
        for sample in scan(folder / shard.name):
            if number in chosen:
                if "mp4" in sample.parts:
                    yield encode(frames(read_part(folder / shard.name, sample, "mp4"), name=sample.key))
                else:
                    yield load(read_part(folder / shard.name, sample, STORES["latent"]))["latent"]
            number += 1


def _check_clips(config: ConvertConfig, results: list[Cut]) -> None:
    counts = {name: sum(len(result.clips[name]) for result in results) for name in SPLITS}
    longest = max(result.ticks for result in results)
    if not any(counts.values()):
        reasons = "; ".join(f"{x.name}: {x.skipped}" for x in results[:5])
        raise ValueError(f"no clip of {config.frames} frames in {len(results)} sources ({reasons})")
    for name, share in (("train", 1 - config.held_out), ("held_out", config.held_out)):
        if share and not counts[name]:
            raise ValueError(
                f"no {name} clip: {share:.0%} of the longest source are {round(longest * share)} frames at "
                f"{config.fps:g} fps, a clip needs {config.frames}; change held_out ({config.held_out:g}; 0 "
                "for no held-out clips), or frames"
            )


def _settings(config: ConvertConfig) -> dict[str, Any]:
    """What the result depends on; not how or where it was made."""
    fields = dataclasses.asdict(config) | {"sources": list(config.sources)}
    return {name: fields[name] for name in fields if name not in ("out", "workers", "overwrite")}


# --- telling -----------------------------------------------------------------------------------------------


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, sources: int) -> None:
        self.bar = tqdm(total=sources, unit="video", desc="convert", disable=not sys.stderr.isatty())
        self.sources, self.done, self.clips, self.told = sources, 0, 0, time.monotonic()

    def step(self, result: Cut) -> None:
        self.done += 1
        self.clips += sum(map(len, result.clips.values()))
        if result.skipped:
            tqdm.write(f"convert: skipped {result.name}: {result.skipped}", file=sys.stderr)
        if not self.bar.disable:
            self.bar.update()
            self.bar.set_postfix(clips=self.clips)
        elif time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            print(f"convert: {self.done} of {self.sources} videos, {self.clips} clips", file=sys.stderr)


def _report(config: ConvertConfig, out: Path, index: Index, results: list[Cut]) -> Report:
    clips = {name: index.samples(name) for name in SPLITS}
    seconds = sum(clips.values()) * config.frames / config.fps
    skipped = tuple((result.name, result.skipped) for result in results if result.skipped)
    statistics = index.statistics
    size = sum(shard.bytes for shards in index.splits.values() for shard in shards)
    lines = [
        f"{out}: {clips['train']} training and {clips['held_out']} held-out clips, {seconds:.0f} s",
        f"from {len(results) - len(skipped)} of {len(results)} videos, {size / 1e6:.1f} MB as {index.store}",
        f"clip: {config.frames} frames at {config.fps:g} fps, {config.height}x{config.width}",
        f"latents: {index.frames} x {index.channels} x {index.height} x {index.width} ({config.autoencoder})",
        "variance left after pooling, by side: "
        + ", ".join(f"{s}: {statistics.ratio(s):.3f}" for s in statistics.spaces),
    ]
    lines += [f"skipped {name}: {why}" for name, why in skipped[:10]]
    if len(skipped) > 10:
        lines.append(f"and {len(skipped) - 10} more: see {out / 'skipped.txt'}")
    return Report(clips, seconds, skipped, "\n".join(lines))
