"""Which checkpoints a run has, whether they are whole, and which goes next: files only, nothing of tensors.

run/checkpoints/step-00000500/   rank-00000.safetensors ...  meta.json
run/checkpoints/latest           the name of the newest one that training goes on from
run/checkpoints/damaged-step-…   found damaged by a resumed run, which went on from the one before
run/checkpoints/undone-step-…    left behind by `msc train --rollback`
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from msc.datasets.files import sha256_of, sync_folder, write_atomically

FORMAT = 2  # 1: rotary embedding paired other channels of a head, so that its weights would compute something else
NAME = re.compile(r"step-\d{8,}")


def folder(run: Path) -> Path:
    return run / "checkpoints"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """All published checkpoints, oldest first, whole or not."""
    there = folder(run).glob("step-*") if folder(run).is_dir() else ()
    return sorted((path for path in there if NAME.fullmatch(path.name)), key=step_of)


def candidates(run: Path) -> list[Path]:
    """What training may go on from, best first: the one that `latest` names, then ever older ones."""
    pointer = folder(run) / "latest"
    named = pointer.read_text().strip() if pointer.is_file() else ""
    newest = int(named.removeprefix("step-")) if NAME.fullmatch(named) else None
    return [path for path in reversed(checkpoints(run)) if newest is None or step_of(path) <= newest]


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, None where there is none; ValueError if it is not complete."""
    pointer = folder(run) / "latest"
    if not pointer.is_file():
        return None
    path = folder(run) / pointer.read_text().strip()
    if not (path / "meta.json").is_file():
        raise ValueError(
            f"{pointer} names {path.name}, which is not a complete checkpoint; `msc train --resume` finds an older one"
        )
    return path


def named(wanted: str) -> str:
    """The name of the checkpoint that a user names by step or folder."""
    return name_of(int(wanted)) if wanted.isdecimal() else Path(wanted).name


def find(run: Path, wanted: str) -> Path:
    """The checkpoint of a run that a user names by step or folder; ValueError if there is no such."""
    name = named(wanted)
    for path in checkpoints(run):
        if path.name == name and (wanted.isdecimal() or path.resolve() == Path(wanted).resolve()):
            return path
    steps = ", ".join(str(step_of(path)) for path in checkpoints(run)) or "none"
    raise ValueError(f"{wanted} is not a checkpoint of {run}; it has those of steps: {steps}")


# What a checkpoint says of itself ------------------------------------------------------------------------


def sealed(meta: dict[str, Any]) -> bytes:
    """The text of meta.json, which carries a checksum of its own."""
    return json.dumps({**meta, "sha256": _digest(meta)}, indent=1).encode()


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(path: Path) -> dict[str, Any]:
    """What meta.json says; ValueError if it is missing, damaged or of another version."""
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except ValueError:
        raise ValueError(f"{file} is truncated or damaged") from None
    if not isinstance(meta, dict) or meta.pop("sha256", None) not in (None, _digest(meta)):
        raise ValueError(f"{file} does not match its checksum")
    if meta["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {meta['format']}, and this version reads {FORMAT}: use the msc that wrote it"
        )
    return meta


def newest_meta(run: Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint says; a damaged one is passed over here, as it is when loading."""
    for path in candidates(run):
        with suppress(ValueError):
            return read_meta(path)
    return None


def damage(path: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, nothing if it is whole. share: (n, parts), to read only that part of it."""
    try:
        meta = read_meta(path)
    except ValueError as error:
        return [str(error)]
    found = []
    for i, (name, sha) in enumerate(meta["files"].items()):
        if i % share[1] != share[0]:
            continue
        file, size = path / name, meta.get("bytes", {}).get(name)
        if not file.is_file():
            found.append(f"{file} is missing")
        elif size is not None and file.stat().st_size != size:
            found.append(f"{file} does not match its checksum: it has {file.stat().st_size:,} of {size:,} bytes")
        elif sha256_of(file) != sha:
            found.append(f"{file} does not match its checksum")
    return found


# What becomes of them ------------------------------------------------------------------------------------


def publish(run: Path, aside: Path, step: int) -> Path:
    """Give a finished checkpoint its name, then let `latest` name it: a crash between leaves the previous one."""
    target, old = folder(run) / name_of(step), folder(run) / f".{name_of(step)}.old"
    if target.exists():  # of the same step, before the run went back
        target.rename(old)
    aside.rename(target)
    sync_folder(target.parent)
    point_to(run, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def point_to(run: Path, path: Path) -> None:
    write_atomically(folder(run) / "latest", path.name.encode())


def superseded(steps: list[int], step: int, keep: int, keep_every: int) -> list[int]:
    """Which checkpoints go when that of `step` is whole: all but the last `keep` and those of every
    `keep_every`-th step (0: none). Later ones than `step` are not counted: the run has gone back before them."""
    until = sorted(s for s in steps if s <= step)
    return [s for s in until[:-keep] if not keep_every or s % keep_every]


def prune(run: Path, step: int, keep: int, keep_every: int) -> None:
    for old in superseded([step_of(path) for path in checkpoints(run)], step, keep, keep_every):
        shutil.rmtree(folder(run) / name_of(old), ignore_errors=True)


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint to `why-step-…`, so that nothing goes on from it."""
    target = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def remove_unfinished(run: Path) -> None:
    """What a killed run was writing."""
    if folder(run).is_dir():
        for pattern in (".step-*.writing*", ".step-*.old"):
            for aside in folder(run).glob(pattern):
                shutil.rmtree(aside, ignore_errors=True)


# `msc checkpoints` ---------------------------------------------------------------------------------------


def table(run: Path, verify: bool = False) -> tuple[str, bool]:
    """The checkpoints of a run as text, and whether all are whole as far as was looked."""
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml")
    next_one = next(iter(candidates(run)), None)
    lines = [
        f"{'step':>9} {'clips seen':>12} {'of':>12} {'written':<19} {'world':>5} {'sp':>3} {'zero':>4} {'MB':>9}  state"
    ]
    good = True
    for path in checkpoints(run):
        problems = damage(path) if verify else []
        try:
            meta = read_meta(path)
        except ValueError as error:
            lines.append(f"{step_of(path):>9} {'':>78}  {error}")
            good = False
            continue
        config = meta["config"]
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / "meta.json").stat().st_mtime))
        state = "; ".join(problems) or ("whole" if verify else "") + (", next" if path == next_one else "")
        lines.append(
            f"{meta['step']:>9} {meta['clock']:>12,} {config['train.clips']:>12,} {written:<19} {meta['world']:>5} "
            f"{config['parallel.sp']:>3} {config['parallel.zero.stage']:>4} {size:>9,.1f}  {state.removeprefix(', ')}"
        )
        good &= not problems
    return "\n".join(lines if len(lines) > 1 else [f"{run} has no checkpoint yet"]), good
