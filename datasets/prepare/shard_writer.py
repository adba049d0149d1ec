"""Shard writer, the part of a conversion that its main process does: clips from workers into shards, group by group."""

import dataclasses
import json
import logging
import sys
import time
import zlib
from collections.abc import Callable, Generator
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
from .clip_extraction import Clip, Extraction, ExtractionTask, extract_in_order
from .clip_ranges import SPLITS
from .convert_config import ConvertConfig
from .progress import WORK, GroupRecord, SourceResult, finish_group, write_shared_json
from .signal_tracks import SignalPlan
from .sources import Source, find_copies

Encode = Callable[[Tensor], Tensor]
Embed = Callable[[str], Tensor]
ALWAYS_ALLOWED = 4  # unreadable videos of one part: fewer say nothing about its machine, as it may have few in all
LOG_SECONDS = 10  # between lines of progress where there is no terminal
CRF = 8  # near lossless: 41 to 47 dB on real clips at 128 x 128, 5 to 9 % of the raw size
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardWriter:
    """Converts groups of sources; `own` is a folder for unfinished files, `partial` for finished ones.

    `encode` maps one clip, uint8 [T, 3, H, W], to latents [T', C, h, w], `embed` a caption to [L, E]; `no_text` is the
    embedding of a missing caption.
    """

    config: ConvertConfig
    encode: Encode
    embed: Embed | None
    no_text: Tensor | None
    sources: list[Source]
    partial: Path
    own: Path
    signals: tuple[SignalPlan, ...] = ()

    def write_groups(
        self, part: list[int], groups: list[range], finished: dict[int, GroupRecord]
    ) -> dict[int, GroupRecord]:
        """Records of a part's groups that are not finished yet, each kept as soon as its shards are written."""
        todo = [group for group in part if group not in finished]
        if not todo:
            return {}
        records = {}
        kinds = [(split, bucket) for split in SPLITS for bucket in range(len(self.config.shapes))]
        with closing(self._extractions(part, groups, finished)) as extractions:
            for group in todo:
                shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
                pending: dict[tuple[str, int], list[tuple[Source, Clip]]] = {kind: [] for kind in kinds}
                results = []
                for number, (result, clips) in zip(groups[group], extractions, strict=False):
                    results.append(result)
                    for clip in clips:
                        pending[clip.split, clip.bucket].append((self.sources[number], clip))
                    last = number == groups[group][-1]
                    for split, bucket in kinds:
                        queue = pending[split, bucket]
                        while queue and (last or len(queue) >= self.config.clips_per_shard):
                            batch = queue[: self.config.clips_per_shard]
                            del queue[: self.config.clips_per_shard]
                            number_of_kind = sum(shard.bucket == bucket for shard in shards[split])
                            shards[split].append(self._write_shard(group, split, bucket, number_of_kind, batch))
                records[group] = GroupRecord(shards, results)
                finish_group(self.own, self.partial, group, records[group])
        return records

    def _extractions(
        self, part: list[int], groups: list[range], finished: dict[int, GroupRecord]
    ) -> Generator[Extraction, None, None]:
        """Results and clips of all sources of a part's unfinished groups, in order; logs progress. ValueError as
        soon as too many sources are unreadable, of all or of the part's.
        """
        config, todo = self.config, [group for group in part if group not in finished]
        unreadable, of_part = (
            [result for record in records for result in record.results if result.unreadable]
            for records in (finished.values(), [finished[group] for group in part if group in finished])
        )
        copies = self._copies()
        numbers = [number for group in todo for number in groups[group]]
        (self.own / "spool").mkdir()
        tasks = [self._task(number) for number in numbers if number not in copies]
        progress = tqdm(total=len(numbers), unit="video", desc="convert", disable=not sys.stderr.isatty())
        clip_count, logged = 0, time.monotonic()
        with progress, closing(extract_in_order(tasks, config.workers)) as extractions:
            for done, number in enumerate(numbers, 1):
                if number in copies:
                    reason = f"has the content of {copies[number]}"
                    result = SourceResult(self.sources[number].name, 0, dict.fromkeys(SPLITS, 0), reason)
                    clips: list[Clip] = []
                else:
                    result, clips = next(extractions)
                clip_count += len(clips)
                if result.skipped:
                    log.info("skipped %s: %s", result.name, result.skipped)
                progress.update()
                progress.set_postfix(clips=clip_count)
                if progress.disable and time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    log.info("%d of %d videos, %d clips", done, len(numbers), clip_count)
                if result.unreadable:
                    unreadable.append(result)
                    of_part.append(result)
                    check_unreadable(config, unreadable, len(self.sources))
                    if len(of_part) > ALWAYS_ALLOWED:
                        check_unreadable(config, of_part, sum(len(groups[group]) for group in part))
                yield result, clips

    def _task(self, number: int) -> ExtractionTask:
        config, source = self.config, self.sources[number]
        return ExtractionTask(
            number=number,
            source=source,
            spool=self.own / "spool",
            shapes=config.shapes,
            fps=config.fps,
            stride=config.stride,
            held_out=float(source.draw < config.held_out) if source.group else config.held_out,
            scenes=config.scenes,
            min_brightness=config.min_brightness,
            min_motion=config.min_motion,
            random_crop=config.crop == "random",
            crf=0 if config.kind == "latent" else CRF,  # latents are made from the spooled clip
            threads=0 if config.workers == 1 else 1,
            signals=self.signals,
        )

    def _write_shard(
        self, group: int, split: str, bucket: int, number: int, clips: list[tuple[Source, Clip]]
    ) -> ShardInfo:
        """Write shard `number` of a group's split and bucket; its clips leave the spool."""
        prefix = f"{split}-{bucket}-{group:06d}" if len(self.config.shapes) > 1 else f"{split}-{group:06d}"
        first = number * self.config.clips_per_shard
        samples = ((f"{prefix}-{i:06d}", self._sample(*clip)) for i, clip in enumerate(clips, first))
        shard = write_shard(self.own / f"{prefix}-{number:06d}.tar", samples)
        write_toc(self.own / shard.name, shard)
        for _, clip in clips:
            clip.file.unlink()
            clip.signals.unlink(missing_ok=True)
        return dataclasses.replace(shard, bucket=bucket)

    def _sample(self, source: Source, clip: Clip) -> dict[str, bytes]:
        """The members of one sample. Checksums let every rank judge a sample alike, whichever frames it decodes."""
        config = self.config
        frames, *size = config.shapes[clip.bucket]
        content = clip.file.read_bytes()
        if config.kind == "latent":
            latents = self.encode(decode_frames(content, name=source.name))
            latents = latents.detach().to("cpu", torch.float16).contiguous()
            if not torch.isfinite(latents).all():
                raise ValueError(f"{source.name} at frame {clip.start}: latents overflow 16-bit floats")
            content = save({"latent": latents})
        metadata = {
            "source": source.name,
            "start": clip.start,
            "fps": config.fps,
            "frames": frames,
            "size": size,
            "caption": source.caption,
            "licence": source.licence,
            "crc32": zlib.crc32(content),
        }
        if source.label is not None:
            metadata["label"] = source.label
        members = {STORES[config.kind]: content}
        if self.embed is not None:
            text = self.embed(source.caption) if source.caption else self.no_text
            assert text is not None
            members["text.safetensors"] = save({"text": text.detach().to("cpu").contiguous()})
            metadata["text_crc32"] = zlib.crc32(members["text.safetensors"])
        if clip.signals.is_file():
            members["signals.safetensors"] = clip.signals.read_bytes()
            metadata["signals_crc32"] = zlib.crc32(members["signals.safetensors"])
        return {"json": json.dumps(metadata, sort_keys=True).encode(), **members}

    def _copies(self) -> dict[int, str]:
        """Sources with the content of earlier ones. Only the first process reads the files for it; others wait."""
        path = self.partial / WORK / "copies.json"
        with locked(path.with_suffix(".lock")):
            if not path.is_file():
                write_shared_json(self.own, path, find_copies(self.sources))
        return {int(number): name for number, name in json.loads(path.read_text()).items()}


def check_unreadable(config: ConvertConfig, unreadable: list[SourceResult], sources: int) -> None:
    """ValueError where more than `max_bad` of the sources, and more than one, are unreadable."""
    if len(unreadable) > max(1, config.max_bad * sources):
        raise ValueError(
            f"{len(unreadable)} of {sources} sources are unreadable, at most {config.max_bad:.0%} may "
            f"be (--max-bad), among them: {'; '.join(f'{x.name}: {x.skipped}' for x in unreadable[:5])}"
        )
