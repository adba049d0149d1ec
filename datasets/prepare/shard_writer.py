"""The part of a conversion that its process does: clips from workers into shards, group by group."""

import dataclasses
import json
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ..files import locked
from ..shards.index import STORES, ShardInfo, write_shard
from ..shards.table_of_contents import write_toc
from ..video import decode_frames
from .clip_extraction import Clip, Cut, Task, cut_all
from .clip_ranges import SPLITS
from .convert_config import ConvertConfig
from .progress import WORK, Outcome, Record, finish_group, keep
from .sources import Listing, Source, copies

Encode = Callable[[Tensor], Tensor]
Embed = Callable[[str], Tensor]
Pending = dict[tuple[str, int], list[tuple[Source, Clip]]]  # clips by split and bucket
FEW = 4  # broken videos of a part that say nothing of its machine yet, as it may have few in all
CRF = 8  # near lossless: 41 to 47 dB on real clips at 128 x 128, 5 to 9 % of the raw size


@dataclass(frozen=True)
class Writer:
    """Converts groups of sources; `own` is a folder for unfinished files, `partial` for finished ones.

    `encode` maps one clip, uint8 [T, 3, H, W], to latents [T', C, h, w], `embed` a caption to [L, E].
    """

    config: ConvertConfig
    encode: Encode
    embed: Embed | None
    unknown: Tensor | None  # embedding of no caption
    listing: Listing
    partial: Path
    own: Path

    def __call__(self, part: list[int], all_groups: list[range], done: dict[int, Record]) -> dict[int, Record]:
        """Records of a part's groups that are not `done`, each kept as soon as its shards are written, in the order of
        the sources.
        """
        config, sources = self.config, self.listing.sources
        mine = [group for group in part if group not in done]
        if not mine:
            return {}
        broken, of_part = (
            [outcome for record in records for outcome in record.outcomes if outcome.broken]
            for records in (done.values(), [done[group] for group in part if group in done])
        )
        in_part = sum(len(all_groups[group]) for group in part)
        spool = self.own / "spool"
        spool.mkdir()
        double = self._copies()
        numbers = [number for group in mine for number in all_groups[group]]
        tasks = _tasks(config, spool, [(number, sources[number]) for number in numbers if number not in double])
        progress = _Progress(len(numbers))
        records = {}
        with closing(cut_all(tasks, config.workers)) as results:
            for group in mine:
                shards: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
                kinds = [(name, bucket) for name in SPLITS for bucket in range(len(config.shapes))]
                pending: Pending = {kind: [] for kind in kinds}
                outcomes: list[Outcome] = []
                for number in all_groups[group]:
                    if number in double:
                        why = f"has the content of {double[number]}"
                        outcome = Outcome(sources[number].name, 0, dict.fromkeys(SPLITS, 0), why)
                    else:
                        found = next(results)
                        outcome = _outcome(config, found)
                        for name in SPLITS:
                            for clip in found.clips[name]:
                                pending[name, clip.bucket].append((found.source, clip))
                        for kind in kinds:
                            while len(pending[kind]) >= config.clips_per_shard:
                                self._flush(group, kind, pending, shards)
                    outcomes.append(outcome)
                    if outcome.broken:
                        broken.append(outcome)
                        of_part.append(outcome)
                        check_broken(config, broken, len(sources))
                        if len(of_part) > FEW:
                            check_broken(config, of_part, in_part)
                    progress.step(outcome)
                for kind in kinds:
                    if pending[kind]:
                        self._flush(group, kind, pending, shards)
                records[group] = Record(shards, outcomes)
                finish_group(self.own, self.partial, group, records[group])
        progress.bar.close()
        return records

    def _flush(self, group: int, kind: tuple[str, int], pending: Pending, shards: dict[str, list[ShardInfo]]) -> None:
        """Write the next shard of a group's split and bucket."""
        split, bucket = kind
        full, number = self.config.clips_per_shard, sum(shard.bucket == bucket for shard in shards[split])
        batch, pending[kind] = pending[kind][:full], pending[kind][full:]
        name = f"{split}-{bucket}-{group:06d}" if len(self.config.shapes) > 1 else f"{split}-{group:06d}"
        samples = ((f"{name}-{number * full + i:06d}", _parts(self, *clip)) for i, clip in enumerate(batch))
        written = write_shard(self.own / f"{name}-{number:06d}.tar", samples)
        write_toc(self.own / written.name, written)
        shards[split].append(dataclasses.replace(written, bucket=bucket))
        for _, clip in batch:
            clip.file.unlink()

    def _copies(self) -> dict[int, str]:
        """Sources that are copies of earlier ones; found, as files are read, by whoever comes first. Others wait."""
        path = self.partial / WORK / "copies.json"
        with locked(path.with_suffix(".lock")):
            if not path.is_file():
                keep(self.own, path, copies(self.listing.sources))
        return {int(number): name for number, name in json.loads(path.read_text()).items()}


def _outcome(config: ConvertConfig, found: Cut) -> Outcome:
    clips = {name: len(found.clips[name]) for name in SPLITS}
    length = sum(config.shapes[clip.bucket][0] for some in found.clips.values() for clip in some)
    return Outcome(found.source.name, found.ticks, clips, found.skipped, found.broken, found.left_out, length)


def check_broken(config: ConvertConfig, broken: list[Outcome], sources: int) -> None:
    if len(broken) > max(1, config.max_bad * sources):
        raise ValueError(
            f"{len(broken)} of {sources} sources are broken, at most {config.max_bad:.0%} may "
            f"be (--max-bad), among them: {'; '.join(f'{x.name}: {x.skipped}' for x in broken[:5])}"
        )


def _tasks(config: ConvertConfig, spool: Path, sources: list[tuple[int, Source]]) -> list[Task]:
    return [
        Task(
            number=number,
            source=source,
            spool=spool,
            shapes=config.shapes,
            fps=config.fps,
            stride=config.stride,
            held_out=config.held_out,
            scenes=config.scenes,
            min_brightness=config.min_brightness,
            min_motion=config.min_motion,
            random_crop=config.crop == "random",
            crf=0 if config.kind == "latent" else CRF,  # latents are made from the spooled clip
            threads=0 if config.workers == 1 else 1,
        )
        for number, source in sources
    ]


def _parts(writer: Writer, source: Source, clip: Clip) -> dict[str, bytes]:
    """The members of one sample. Checksums let every rank judge a sample alike, whatever it decodes."""
    config = writer.config
    shape = config.shapes[clip.bucket]
    content = clip.file.read_bytes()
    if config.kind == "latent":
        latents = writer.encode(decode_frames(content, name=source.name)).detach().to("cpu", torch.float16).contiguous()
        if not torch.isfinite(latents).all():
            raise ValueError(f"{source.name} at frame {clip.start}: latents overflow 16-bit floats")
        content = save({"latent": latents})
    about = {
        "source": source.name,
        "start": clip.start,
        "fps": config.fps,
        "frames": shape[0],
        "size": list(shape[1:]),
        "caption": source.caption,
        "licence": source.licence,
        "crc32": zlib.crc32(content),
    }
    if source.label is not None:
        about["label"] = source.label
    parts = {STORES[config.kind]: content}
    if writer.embed is not None:
        text = writer.embed(source.caption) if source.caption else writer.unknown
        assert text is not None
        parts["text.safetensors"] = save({"text": text.detach().to("cpu").contiguous()})
        about["text_crc32"] = zlib.crc32(parts["text.safetensors"])
    return {"json": json.dumps(about, sort_keys=True).encode(), **parts}


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, sources: int) -> None:
        self.bar = tqdm(total=sources, unit="video", desc="convert", disable=not sys.stderr.isatty())
        self.sources, self.done, self.clips, self.told = sources, 0, 0, time.monotonic()

    def step(self, result: Outcome) -> None:
        self.done += 1
        self.clips += sum(result.clips.values())
        if result.skipped:
            tqdm.write(f"convert: skipped {result.name}: {result.skipped}", file=sys.stderr)
        if not self.bar.disable:
            self.bar.update()
            self.bar.set_postfix(clips=self.clips)
        elif time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            print(f"convert: {self.done} of {self.sources} videos, {self.clips} clips", file=sys.stderr)
