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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from msc.datasets.files import sha256_of, sync_folder, write_atomically

FORMAT = 2  # 1: rotary embedding paired other channels of a head, so that its weights would compute something else
NAME = re.compile(r"step-\d{8,}")


def checkpoints_dir(run: Path) -> Path:
    return run / "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """All published checkpoints, oldest first, whole or not."""
    there = checkpoints_dir(run).glob("step-*") if checkpoints_dir(run).is_dir() else ()
    return sorted((path for path in there if NAME.fullmatch(path.name)), key=step_of)


def resume_candidates(run: Path) -> list[Path]:
    """What training may go on from, best first: the one that `latest` names, then ever older ones."""
    pointer = checkpoints_dir(run) / "latest"
    named = pointer.read_text().strip() if pointer.is_file() else ""
    newest = int(named.removeprefix("step-")) if NAME.fullmatch(named) else None
    return [path for path in reversed(list_checkpoints(run)) if newest is None or step_of(path) <= newest]


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, None where there is none; ValueError if it is not complete."""
    pointer = checkpoints_dir(run) / "latest"
    if not pointer.is_file():
        return None
    path = checkpoints_dir(run) / pointer.read_text().strip()
    if not (path / "meta.json").is_file():
        raise ValueError(
            f"{pointer} names {path.name}, which is not a complete checkpoint; `msc train --resume` finds an older one"
        )
    return path


def named(wanted: str) -> str:
    """The name of the checkpoint that a user names by step or folder."""
    return checkpoint_name(int(wanted)) if wanted.isdecimal() else Path(wanted).name


def find(run: Path, wanted: str) -> Path:
    """The checkpoint of a run that a user names by step or folder; ValueError if there is no such."""
    name = named(wanted)
    for path in list_checkpoints(run):
        if path.name == name and (wanted.isdecimal() or path.resolve() == Path(wanted).resolve()):
            return path
    steps = ", ".join(str(step_of(path)) for path in list_checkpoints(run)) or "none"
    raise ValueError(f"{wanted} is not a checkpoint of {run}; it has those of steps: {steps}")


# What a checkpoint says of itself ------------------------------------------------------------------------


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

    def to_json(self) -> str:
        """The text of meta.json, with its own checksum."""
        facts = {"format": FORMAT, **asdict(self)}
        return json.dumps({**facts, "sha256": _checksum(facts)}, indent=1)

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
            raise ValueError(
                f"{checkpoint} has checkpoint format {number}, and this version reads {FORMAT}: "
                "use the msc that wrote it"
            )
        if missing := {"step", "clock"} - facts.keys():
            raise ValueError(f"{file} has no {' and no '.join(sorted(missing))}")
        facts["parameters"] = {name: tuple(shape) for name, shape in facts.get("parameters", {}).items()}
        return cls(**{each.name: facts[each.name] for each in fields(cls) if each.name in facts})


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def newest_meta(run: Path) -> CheckpointMeta | None:
    """The facts of the newest readable checkpoint."""
    for path in resume_candidates(run):
        with suppress(ValueError):
            return CheckpointMeta.read(path)
    return None


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, nothing if it is whole. share: (n, parts), to read only that part of it."""
    try:
        meta = CheckpointMeta.read(path)
    except ValueError as error:
        return [str(error)]
    found = []
    for i, (name, sha) in enumerate(meta.files.items()):
        if i % share[1] != share[0]:
            continue
        file, size = path / name, meta.bytes.get(name)
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
    target, old = checkpoints_dir(run) / checkpoint_name(step), checkpoints_dir(run) / f".{checkpoint_name(step)}.old"
    if target.exists():  # of the same step, before the run went back
        target.rename(old)
    aside.rename(target)
    sync_folder(target.parent)
    set_latest(run, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def set_latest(run: Path, path: Path) -> None:
    write_atomically(checkpoints_dir(run) / "latest", path.name.encode())


def steps_to_prune(steps: list[int], step: int, keep: int, keep_every: int) -> list[int]:
    """Which checkpoints go when that of `step` is whole: all but the last `keep` and those of every
    `keep_every`-th step (0: none). Later ones than `step` are not counted: the run has gone back before them."""
    until = sorted(s for s in steps if s <= step)
    return [s for s in until[:-keep] if not keep_every or s % keep_every]


def prune(run: Path, step: int, keep: int, keep_every: int) -> None:
    for old in steps_to_prune([step_of(path) for path in list_checkpoints(run)], step, keep, keep_every):
        shutil.rmtree(checkpoints_dir(run) / checkpoint_name(old), ignore_errors=True)


def rename_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint to `why-step-…`, so that nothing goes on from it."""
    target = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def remove_unfinished(run: Path) -> None:
    """What a killed run was writing."""
    if checkpoints_dir(run).is_dir():
        for pattern in (".step-*.writing*", ".step-*.old"):
            for aside in checkpoints_dir(run).glob(pattern):
                shutil.rmtree(aside, ignore_errors=True)


# `msc checkpoints` ---------------------------------------------------------------------------------------


def checkpoint_table(run: Path, check_files: bool = False) -> tuple[str, bool]:
    """The checkpoints of a run as text, and whether all are whole as far as was looked."""
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml")
    next_one = next(iter(resume_candidates(run)), None)
    lines = [
        f"{'step':>9} {'clips seen':>12} {'of':>12} {'written':<19} {'world':>5} {'sp':>3} {'zero':>4} {'MB':>9}  state"
    ]
    good = True
    for path in list_checkpoints(run):
        problems = verify(path) if check_files else []
        try:
            meta = CheckpointMeta.read(path)
        except ValueError as error:
            lines.append(f"{step_of(path):>9} {'':>78}  {error}")
            good = False
            continue
        config = meta.config
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / "meta.json").stat().st_mtime))
        state = "; ".join(problems) or ("whole" if check_files else "") + (", next" if path == next_one else "")
        lines.append(
            f"{meta.step:>9} {meta.clock:>12,} {config['train.clips']:>12,} {written:<19} {meta.world:>5} "
            f"{config['parallel.sp']:>3} {config['parallel.zero.stage']:>4} {size:>9,.1f}  {state.removeprefix(', ')}"
        )
        good &= not problems
    return "\n".join(lines if len(lines) > 1 else [f"{run} has no checkpoint yet"]), good
