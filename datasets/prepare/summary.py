"""Summary of a folder of shards as text, and a check of its shards."""

from pathlib import Path

import torch
from torch import Tensor

from ..shards.index import STORES, Index, corrupted_shards, scan
from ..shards.table_of_contents import read_toc, toc_path
from ..signals import Signal
from ..text_table import text_table

SHOWN = 10  # lines of skipped.txt, and names of classes
SHOWN_LENGTH = 500  # characters of a line
SKIPPED_BYTES = 16 << 20  # of skipped.txt that are counted


def describe(folder: str | Path, index: Index) -> str:
    """Splits, sizes, measured statistics and what was skipped, as lines of text; reads no shard."""
    lines = [str(folder)]
    for split, shards in index.splits.items():
        seconds = sum(one.samples(split) * one.video_frames for one in index.by_bucket()) / index.fps
        size = sum(shard.bytes for shard in shards) / 1e6
        clips = index.samples(split)
        lines.append(f"{split}: {clips} clips ({seconds:.0f} s) in {len(shards)} shards, {size:.1f} MB")
    lines += clip_lines(index)
    text = f"text embeddings of width {index.has_text} ({index.settings.get('text')})" if index.has_text else "no text"
    names = index.settings.get("labels", [])
    classes = f" ({', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)})" if names else ""
    lines.append(f"conditions: {text}, {index.classes or 'no'} classes{classes}")
    lines += signal_lines(index)
    measured = index.statistics
    lines.append(
        f"statistics of {measured.clips} training clips:" if measured.measured else "statistics, not measured:"
    )
    rows = [
        (side, f"{measured.ratio(side):.3f}", f"{measured.detail(side):.3g}" if 2 * side in measured.spaces else "-")
        for side in measured.spaces
    ]
    lines.append(text_table(rows, ("side", "R", "D"), align=">", indent="  "))
    lines.append(f"skipped: {index.skipped} videos")
    skipped = Path(folder, "skipped.txt")
    if skipped.is_file():
        with open(skipped, "rb") as file:
            content = file.read(SKIPPED_BYTES)
            whole = not file.read(1)
        reasons = content.decode("utf-8", "surrogateescape").splitlines()
        lines += [f"  {reason[:SHOWN_LENGTH]}" for reason in reasons[:SHOWN]]
        if len(reasons) > SHOWN or not whole:
            lines.append(f"  and {f'{len(reasons) - SHOWN} ' if whole else ''}more lines in {skipped}")
    return "\n".join(lines)


def signal_lines(index: Index) -> list[str]:
    """One line for each signal: its kind, its columns, and how many training clips have it."""
    lines = []
    for signal in index.signals:
        shown = list(signal.columns[:SHOWN])
        if signal.kind == "continuous":
            shown = [f"{x} {m:.3g} ± {s:.3g}" for x, m, s in zip(shown, signal.mean, signal.std, strict=False)]
        names = ", ".join(shown) + ", …" * (signal.width > SHOWN)
        what = "values" if signal.kind == "discrete" else "columns"
        lines.append(
            f"signal {signal.name}: {signal.kind}, take {signal.take}, {signal.width} {what} ({names}), in "
            f"{signal.known:.1%} of the training clips"
        )
    return lines


def signal_bars(signal: Signal, values: Tensor, height: int, width: int) -> Tensor:
    """A signal of video frames [T, C] as bars, uint8 [T, 3, height, width], one for each column: continuous ones from
    two deviations below the mean to two above; grey where it is unknown."""
    share = values
    if signal.kind == "continuous":
        share = (values - torch.tensor(signal.mean)) / (4 * torch.tensor(signal.std)) + 0.5
    columns = torch.arange(width) * signal.width // width
    level = share.nan_to_num(0.5)[:, columns] * height
    filled = (torch.arange(height).flip(0)[:, None] < level[:, None])[:, None]  # T 1 H W
    colours = torch.tensor([[31, 119, 180], [255, 127, 14]])[columns % 2].T[:, None]  # 3 1 W
    colours = torch.where(values[:, columns].isnan()[:, None, None], 200, colours)
    return torch.where(filled, colours, 255).to(torch.uint8)


def clip_lines(index: Index) -> list[str]:
    """Sizes of the clips, as video and as latents; of every bucket, with its clips, where there are several."""
    stored = f"stored as {index.store} (.{STORES[index.store]})"
    each = f"({index.autoencoder}, {index.temporal_factor} video frames each)"
    lines = []
    for one in index.by_bucket():
        video = f"{one.video_frames} frames at {one.fps:g} fps, {one.video_height}x{one.video_width}"
        latents = f"{one.frames} x {one.channels} x {one.height} x {one.width}"
        if not index.buckets:
            return [f"clip: {video}, {stored}", f"latents: {latents} {each}"]
        counts = ", ".join(f"{one.samples(split)} {split.replace('_', '-')}" for split in sorted(one.splits))
        empty = " (no training with an empty bucket: convert without it)" if not one.samples("train") else ""
        lines.append(f"bucket {one.shape}: {video}; latents {latents}; clips: {counts}{empty}")
    return [*lines, f"{stored}; latents {each}"]


def damaged_shards(folder: str | Path, index: Index) -> list[str]:
    """One line for each shard that is not what was written, or has members that no shard may have. Reads every byte."""
    changed = corrupted_shards(folder, index)
    lines = [f"{name}: its checksum is not the one in the index; copy it again" for name in changed]
    for shard in (shard for shards in index.splits.values() for shard in shards):
        path = Path(folder, shard.name)
        try:
            samples = scan(path)
            if len(samples) != shard.samples:
                lines.append(f"{shard.name}: holds {len(samples)} samples, its index says {shard.samples}")
            table = read_toc(path, shard)
            if table is not None and table != samples and shard.name not in changed:
                lines.append(f"{toc_path(path).name}: does not match {shard.name}; delete it")
        except ValueError as error:
            lines.append(str(error))
    return lines
