"""Checkpoint directory of a run: which checkpoints it has, their facts and checksums; publishing and pruning them.

run/checkpoints/step-00000500/   rank-00000.safetensors ...  meta.json
run/checkpoints/latest           the name of the newest one to resume from
run/checkpoints/damaged-step-…   renamed by a resumed run, which continued from an older one
run/checkpoints/undone-step-…    renamed by `msc train --rollback`
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from msc.datasets.files import retry, sha256_of, sync_folder, try_lock, write_atomically
from msc.datasets.text_table import text_table

from ..run_folder import RunFolder

log = logging.getLogger(__name__)

FORMAT = 2  # 1: rotary embedding paired other channels of a head, so that its weights would compute something else
NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class CheckpointMeta:
    """A checkpoint's facts, stored in its meta.json.

    step, clock: optimizer steps and clips so far. clips: in the training set. guard, mlflow: the spike guard's
    history and the MLflow run. config: dotted settings. adam_steps, world, parameters (their shapes): of the engine.
    files, bytes: sha256 and size of each file.
    """

    step: int
    clock: int
    clips: int | None = None
    guard: dict[str, Any] | None = None
    mlflow: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    adam_steps: int = 0
    world: int = 1
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Write meta.json, with a checksum of its own."""
        facts = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**facts, "sha256": _checksum(facts)}, indent=1)
        write_atomically(checkpoint / "meta.json", text.encode())

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointMeta:
        """Read a checkpoint's meta.json; ValueError if it is missing, damaged or of another format."""
        file = checkpoint / "meta.json"
        try:
            facts = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{file} is missing") from None
        except ValueError:
            raise ValueError(f"{file} is truncated or damaged") from None
        if not isinstance(facts, dict) or facts.pop("sha256", None) not in (None, _checksum(facts)):
            raise ValueError(f"{file} does not match its checksum")
        if (number := facts.get("format")) != FORMAT:
            remedy = f"this version reads {FORMAT}: use the msc that wrote it"
            raise ValueError(f"{checkpoint} has checkpoint format {number}, and {remedy}")
        if missing := {"step", "clock"} - facts.keys():
            raise ValueError(f"{file} has no {' and no '.join(sorted(missing))}")
        facts["parameters"] = {name: tuple(shape) for name, shape in facts.get("parameters", {}).items()}
        return cls(**{each.name: facts[each.name] for each in fields(cls) if each.name in facts})


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# Reading --------------------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """All published checkpoints, oldest first, damaged or not."""
    return sorted((p for p in RunFolder(run).checkpoints.glob("step-*") if NAME.fullmatch(p.name)), key=step_of)


def resume_candidates(run: Path) -> list[Path]:
    """The checkpoints to resume from, in order of preference: the one that `latest` names, then older ones."""
    pointer = RunFolder(run).checkpoints / "latest"
    name = pointer.read_text().strip() if pointer.is_file() else ""
    newest = step_of(Path(name)) if NAME.fullmatch(name) else None
    return [path for path in reversed(list_checkpoints(run)) if newest is None or step_of(path) <= newest]


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, None where there is none; ValueError if it is not complete."""
    pointer = RunFolder(run).checkpoints / "latest"
    if not pointer.is_file():
        return None
    path = pointer.with_name(pointer.read_text().strip())
    if not (path / "meta.json").is_file():
        remedy = "`msc train --resume` takes an older one"
        raise ValueError(f"{pointer} names {path.name}, which is not a complete checkpoint; {remedy}")
    return path


def requested_name(requested: str) -> str:
    """The name of the checkpoint that a user requests by step or folder."""
    return checkpoint_name(int(requested)) if requested.isdecimal() else Path(requested).name


def find(run: Path, requested: str | None = None) -> Path:
    """The checkpoint that a user requests by step or folder (None: the latest); an error if there is no such."""
    if requested is None:
        if (path := latest(run)) is None:
            raise FileNotFoundError(f"{run} has no checkpoint yet; train longer, or set checkpoint.every lower")
        return path
    for path in list_checkpoints(run):
        same_folder = requested.isdecimal() or path.resolve() == Path(requested).resolve()
        if path.name == requested_name(requested) and same_folder:
            return path
    steps = ", ".join(str(step_of(path)) for path in list_checkpoints(run)) or "none"
    raise ValueError(f"{requested} is not a checkpoint of {run}; it has those of steps: {steps}")


@contextmanager
def held(run: Path, requested: str | None = None) -> Iterator[Path]:
    """The checkpoint that `find` returns, which training does not prune during the block."""

    def find_and_lock() -> tuple[Path, BinaryIO]:
        path = find(run, requested)
        return path, lock_for_reading(path)

    pauses = (0.1, 0.5) if requested is None else ()  # the latest may have been pruned meanwhile: there is a newer one
    path, lock = retry(find_and_lock, pauses, lambda error: isinstance(error, ValueError | FileNotFoundError))
    with lock:
        yield path


def lock_for_reading(path: Path) -> BinaryIO:
    """A file that keeps a checkpoint from being pruned, by a shared lock, until it is closed; ValueError if the
    checkpoint is incomplete or being pruned. On file systems without locks it keeps nothing."""
    try:
        file = (path / "meta.json").open("rb")
    except FileNotFoundError:
        raise ValueError(f"{path / 'meta.json'} is missing") from None
    with suppress(OSError):
        if not try_lock(file, shared=True):
            file.close()
            raise ValueError(f"{path} is being pruned: take a newer checkpoint")
    return file


def newest_meta(run: Path) -> CheckpointMeta | None:
    """The facts of the newest readable checkpoint."""
    for path in resume_candidates(run):
        with suppress(ValueError):
            return CheckpointMeta.read(path)
    return None


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """The defects of a checkpoint, [] if it is intact. share: (n, parts), to check only every parts-th file from n."""
    try:
        meta = CheckpointMeta.read(path)
    except ValueError as error:
        return [str(error)]
    defects = []
    for name, sha in list(meta.files.items())[share[0] :: share[1]]:
        file, size = path / name, meta.bytes.get(name)
        if not file.is_file():
            defects.append(f"{file} is missing")
        elif size is not None and file.stat().st_size != size:
            defects.append(f"{file} does not match its checksum: it has {file.stat().st_size:,} of {size:,} bytes")
        elif sha256_of(file) != sha:
            defects.append(f"{file} does not match its checksum")
    return defects


# Changing -------------------------------------------------------------------------------------------------


def publish(run: Path, written: Path, step: int) -> None:
    """Give a finished checkpoint its name, then let `latest` name it: a crash between leaves the previous one."""
    target = RunFolder(run).checkpoints / checkpoint_name(step)
    old = target.with_name(f".{target.name}.old")
    if target.exists():  # of the same step, before a rollback
        target.rename(old)
    written.rename(target)
    sync_folder(target.parent)
    set_latest(run, target)
    shutil.rmtree(old, ignore_errors=True)


def set_latest(run: Path, path: Path) -> None:
    write_atomically(RunFolder(run).checkpoints / "latest", path.name.encode())


def prune(run: Path, step: int, keep: int, keep_every: int) -> None:
    """Delete the checkpoints up to `step` but the last `keep`, and those of every `keep_every`-th step (0: none). Later
    ones do not count: the run was rolled back before them. One that another process reads stays until the next time."""
    until = [path for path in list_checkpoints(run) if step_of(path) <= step]
    for path in until[:-keep]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        free = True
        with ExitStack() as stack:
            with suppress(OSError):  # damaged, or a file system without locks
                free = try_lock(stack.enter_context((path / "meta.json").open("r+b")))
            if free:
                shutil.rmtree(path, ignore_errors=True)
            else:
                log.info("%s is being read by another process: it is deleted after the next checkpoint", path)


def rename_aside(path: Path, prefix: str) -> Path:
    """Rename a checkpoint to `prefix-step-…`, so that nothing resumes from it."""
    target = path.with_name(f"{prefix}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def checkpoint_table(run: Path, check_files: bool = False) -> tuple[str, bool]:
    """The checkpoints of a run as text, and whether none is damaged, as far as was checked."""
    if not RunFolder(run).exists() and not list_checkpoints(run):
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml and no checkpoint")
    rows, intact, next_one = [], True, next(iter(resume_candidates(run)), None)
    for path in list_checkpoints(run):
        try:
            meta = CheckpointMeta.read(path)
        except ValueError as error:
            rows.append([str(step_of(path)), *[""] * 7, str(error)])
            intact = False
            continue
        defects = verify(path) if check_files else []
        intact &= not defects
        states = ["; ".join(defects)] if defects else ["whole"] * check_files + ["next"] * (path == next_one)
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / "meta.json").stat().st_mtime))
        sp, stage = meta.config["parallel.sp"], meta.config["parallel.zero.stage"]
        numbers = f"{meta.step}", f"{meta.clock:,}", f"{meta.config['train.clips']:,}", written, f"{meta.world}"
        rows.append([*numbers, str(sp), str(stage), f"{size:,.1f}", ", ".join(states)])
    header = ["step", "clips seen", "of", "written", "world", "sp", "zero", "MB", "state"]
    return text_table(rows, header, align=">>><>>>><") if rows else f"{run} has no checkpoint yet", intact
