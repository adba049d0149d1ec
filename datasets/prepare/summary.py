"""What a folder of shards holds, in words."""

from pathlib import Path

from ..shards.index import STORES, Index, corrupted_shards, scan
from ..shards.table_of_contents import read_toc, toc_path

SHOWN = 10  # reasons for skipping that are quoted


def describe(folder: str | Path, index: Index) -> str:
    """Splits, sizes, measured statistics and what was skipped, as lines of text; reads no shard."""
    lines = [str(folder)]
    for name, shards in index.splits.items():
        clips = index.samples(name)
        seconds = sum(one.samples(name) * one.video_frames for one in index.by_bucket()) / index.fps
        size = sum(shard.bytes for shard in shards)
        lines.append(f"{name}: {clips} clips ({seconds:.0f} s) in {len(shards)} shards, {size / 1e6:.1f} MB")
    lines += clip_lines(index)
    text = f"text embeddings of width {index.has_text} ({index.settings.get('text')})" if index.has_text else "no text"
    lines.append(f"conditions: {text}, {index.classes or 'no'} classes" + _names(index))
    found = index.statistics
    lines.append(f"statistics of {found.clips} training clips:" if found.measured else "statistics, not measured:")
    lines.append("  " + " ".join(f"{name:>8}" for name in ("side", "R", "D", *(f"rho({lag})" for lag in found.lags))))
    for side in found.spaces:
        detail = f"{found.detail(side):.3g}" if 2 * side <= found.spaces[-1] else "-"
        row = [str(side), f"{found.ratio(side):.3f}", detail]
        row += [f"{found.correlation(side, lag):.3f}" for lag in found.lags]
        lines.append("  " + " ".join(f"{cell:>8}" for cell in row))
    skipped = Path(folder, "skipped.txt")
    lines.append(f"skipped: {index.skipped} videos")
    if skipped.is_file():
        reasons = skipped.read_text("utf-8", "surrogateescape").splitlines()
        lines += [f"  {reason}" for reason in reasons[:SHOWN]]
        if len(reasons) > SHOWN:
            lines.append(f"  and {len(reasons) - SHOWN} more lines in {skipped}")
    return "\n".join(lines)


def clip_lines(index: Index) -> list[str]:
    """Sizes of the clips, as they are and as latents; of every bucket, with its clips, where there are several."""
    stored = f"stored as {index.store} (.{STORES[index.store]})"
    each = f"({index.autoencoder}, {index.temporal_factor} video frames each)"
    lines = []
    for one in index.by_bucket():
        video = f"{one.video_frames} frames at {one.fps:g} fps, {one.video_height}x{one.video_width}"
        latents = f"{one.frames} x {one.channels} x {one.height} x {one.width}"
        if not index.buckets:
            return [f"clip: {video}, {stored}", f"latents: {latents} {each}"]
        counts = ", ".join(f"{one.samples(name)} {name.replace('_', '-')}" for name in sorted(one.splits))
        empty = " (no training with an empty bucket: convert without it)" if not one.samples("train") else ""
        lines.append(f"bucket {one.shape}: {video}; latents {latents}; clips: {counts}{empty}")
    return [*lines, f"{stored}; latents {each}"]


def damaged_shards(folder: str | Path, index: Index) -> list[str]:
    """One line for each shard that is not what was written, or holds what no shard may. Reads every byte."""
    changed = corrupted_shards(folder, index)
    lines = [f"{name}: its checksum is not the one in the index; copy it again" for name in changed]
    for shard in (shard for shards in index.splits.values() for shard in shards):
        try:
            found = scan(Path(folder, shard.name))
            if len(found) != shard.samples:
                lines.append(f"{shard.name}: holds {len(found)} samples, its index says {shard.samples}")
            table = read_toc(Path(folder, shard.name), shard)
            if table is not None and table != found and shard.name not in changed:
                lines.append(f"{toc_path(Path(shard.name))}: is not the contents of {shard.name}; delete it")
        except ValueError as error:
            lines.append(str(error))
    return lines


def _names(index: Index) -> str:
    names = index.settings.get("labels", [])
    return f" ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})" if names else ""
