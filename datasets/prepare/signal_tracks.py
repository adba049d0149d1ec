"""Signals in a conversion: what is asked for, what all files of a signal have in common, and the rows of every clip."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load

from ..shards.index import Index, read_part, scan
from ..shards.tar import FILE_ERRORS, Location, retry_read
from ..signal_files import MOTION, WHOLE, Table, pose_matrices, read_signal, relative_motion
from ..signals import MAX_COLUMNS, NAME, TAKES, Signal
from ..video import Video

SLACK = 1e-3  # seconds: time stamps of frames and rows are rounded
LEAST_HOLD = 1.0  # seconds that a file may begin late or end early
MAX_SHIFT = 1000  # rows
MAX_COUNT = 255
Files = Iterable[tuple[str, str, Location]]  # name of the signal, name of the file, and where it is


@dataclass(frozen=True)
class SignalRequest:
    """One `--signal`. kind: "discrete", "continuous", "pose" or "" for what the files hold. shift: rows of delay."""

    name: str
    kind: str = ""
    take: str = "last"
    shift: int = 0


def parse_request(text: str) -> SignalRequest:
    """NAME[,kind=discrete|continuous|pose][,take=last|count|mean][,shift=ROWS]; ValueError for anything else."""
    name, *options = text.split(",")
    fields = dict(option.partition("=")[::2] for option in options)
    kind = fields.get("kind", {"count": "discrete", "mean": "continuous"}.get(fields.get("take", ""), ""))
    request = SignalRequest(name, kind, fields.get("take", "last"))
    takes = {"": ("last",), "pose": ("last",), **TAKES}
    shift = fields.get("shift", "0")
    if not NAME.fullmatch(name):
        problem = f"{name!r} is no name of letters, digits, - and _"
    elif unknown := fields.keys() - {"kind", "take", "shift"}:
        problem = f"{min(unknown)!r} is unknown, there are kind, take and shift"
    elif kind not in takes:
        problem = f"kind is {kind!r}, expected discrete, continuous or pose"
    elif request.take not in takes[kind]:
        problem = f"take is {request.take!r}, a {kind} signal takes {' or '.join(takes[kind])}"
    elif not shift.isdecimal() or int(shift) > MAX_SHIFT:
        problem = f"shift is {shift!r}, expected a number of rows from 0 to {MAX_SHIFT}"
    else:
        return dataclasses.replace(request, shift=int(shift))
    raise ValueError(f"signal {text!r}: {problem}")


@dataclass(frozen=True)
class SignalPlan:
    """How the files of a signal are read: `columns` are those that each must have."""

    signal: Signal
    columns: tuple[str, ...]
    shift: int
    pose: bool


def plan_signals(requests: Sequence[SignalRequest], files: Sequence[Files]) -> list[SignalPlan]:
    """Kind, columns and values of every signal, from the files of all sources: most of them decide. Invalid ones are
    left to extraction, which names them. ValueError where none is valid, or for a kind that does not fit.
    """
    plans = []
    for request in requests:
        places = dict.fromkeys(own[1:] for source in files for own in source if own[0] == request.name)
        kinds, values = Counter[tuple[tuple[str, ...], bool]](), defaultdict[tuple[str, ...], set[str]](set)
        reason = ""
        for file, place in places:
            try:
                table = open_signal(file, place)
            except ValueError as error:
                reason = reason or str(error)
                continue
            kinds[table.columns, table.is_discrete] += 1
            values[table.columns] |= set(np.unique(table.values).tolist()) if table.is_discrete else set()
        if not kinds:
            raise ValueError(f"signal {request.name}: none of its {len(places)} files can be read ({reason})")
        columns = Counter(columns for columns, _ in kinds.elements()).most_common(1)[0][0]
        discrete = kinds[columns, True] > kinds[columns, False]
        kind = request.kind or ("discrete" if discrete else "continuous")
        if kind == "discrete":
            if not discrete:
                raise ValueError(
                    f"signal {request.name}: discrete values are words or whole numbers in one column, its files have "
                    f"{', '.join(columns)[:200]}: leave out kind"
                )
            whole = all(map(WHOLE.fullmatch, values[columns]))
            names = tuple(sorted(values[columns], key=int if whole else None))
            if len(names) > MAX_COLUMNS:
                raise ValueError(
                    f"signal {request.name} has {len(names)} different values, at most {MAX_COLUMNS} are read; are "
                    "they numbers, not choices? (kind=continuous)"
                )
        else:
            names = MOTION if kind == "pose" else columns
        numbers = 0 if kind == "discrete" else len(names)  # measured at the end
        signal = Signal(
            request.name, "discrete" if kind == "discrete" else "continuous", names, request.take,
            mean=(0.0,) * numbers, std=(1.0,) * numbers,
        )  # fmt: skip
        if problem := signal.problem:
            raise ValueError(problem)
        plans.append(SignalPlan(signal, columns, request.shift, kind == "pose"))
    return plans


def open_signal(file: str, place: Location) -> Table:
    """Read a file; ValueError where it is invalid or cannot be read, OSError where the disk cannot."""
    try:
        return retry_read(partial(read_signal, place, file))
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Track:
    """A signal beside the ticks of a source.

    rows: what stands before the first row, and then every row: number of its value [R + 1] (-1 for none), float32
    [R + 1, C], or a pose [R + 1, 4, 4]. ends: how many rows have begun by the tick before the first, and by each, so
    that rows[ends] are in force: [ticks + 1].
    """

    plan: SignalPlan
    rows: np.ndarray
    ends: np.ndarray

    def clip(self, start: int, frames: int) -> np.ndarray:
        """The signal of the ticks from `start` on, [frames, width]: uint8 if discrete, or else float32."""
        signal, ends = self.plan.signal, self.ends[start : start + frames + 1]
        if self.plan.pose:
            return relative_motion(self.rows[ends])[1:]
        current = self.rows[ends[1:]]
        if signal.take == "last" and signal.kind == "continuous":
            return current
        new = self.rows[ends[0] + 1 : ends[-1] + 1]  # all rows since the tick before the first
        counts = np.diff(ends)
        if signal.kind == "continuous":
            sums = np.concatenate((np.zeros((1, signal.width)), new.cumsum(0, np.float64)))[ends - ends[0]]
            mean = np.diff(sums, axis=0) / np.maximum(counts, 1)[:, None]
            return np.where(counts[:, None] > 0, mean, current).astype(np.float32)
        numbers = np.zeros((frames, signal.width), np.int64)
        tick, number = (
            (np.arange(frames), current) if signal.take == "last" else (np.arange(frames).repeat(counts), new)
        )
        np.add.at(numbers, (tick[number >= 0], number[number >= 0]), 1)
        return numbers.clip(max=MAX_COUNT).astype(np.uint8)

    def lost(self, first: int, last: int) -> int:
        """How many rows the ticks [first, last) leave out, as they lie between frames."""
        counts = np.diff(self.ends[first : last + 1])
        return 0 if self.plan.pose or self.plan.signal.take != "last" else int((counts - (counts > 0)).sum())


def align(
    plan: SignalPlan, table: Table, video: Video, shown: Sequence[int], fps: float, part: tuple[int, int]
) -> Track:
    """The rows of a file beside the ticks of a video, whose frames `shown` are. ValueError where the table is not of
    the plan's columns and values, or does not reach over the ticks [first, last) of `part`.
    """
    if set(table.columns) != set(plan.columns):
        raise ValueError(f"has the columns {', '.join(table.columns)[:200]}, not {', '.join(plan.columns)[:200]}")
    lead = 1 + plan.shift
    if plan.signal.kind == "continuous":
        numbers = table.numbers()[:, [table.columns.index(name) for name in plan.columns]]
        values = pose_matrices(plan.columns, numbers) if plan.pose else numbers.astype(np.float32)
    else:
        if not table.is_discrete:
            raise ValueError("holds fractions, expected words or whole numbers (or kind=continuous)")
        number = {value: i for i, value in enumerate(plan.signal.columns)}
        if unknown := set(np.unique(table.values).tolist()) - number.keys():
            raise ValueError(f"holds {min(unknown)!r}, which it did not when the conversion began")
        values = np.array([number[value] for value in table.values.tolist()])
    before = np.full(lead, -1) if plan.signal.kind == "discrete" else values[:1].repeat(lead, 0)
    rows, frames = np.concatenate((before, values)), np.asarray(shown)
    first, last = part
    if table.times is None:
        count, most = len(values), len(video.pts) + 1
        if count > most:
            raise ValueError(f"has {count} rows, the video {len(video.pts)} frames: give it a column time")
        if first < last and count + plan.shift <= shown[last - 1]:
            raise ValueError(f"is too short: it has {count} rows, frame {shown[last - 1]} of the video needs one")
        return Track(plan, rows, np.concatenate((frames[:1], frames + 1)))
    times = video.origin + (np.array(video.pts, np.float64) - video.pts[0])[frames] * float(video.time_base)
    if first < last:
        hold = max(LEAST_HOLD, np.diff(table.times).max(initial=0.0))
        if table.times[0] > times[first] + hold:
            raise ValueError(f"begins at {table.times[0]:g} s, the video at {times[first]:g} s")
        if table.times[-1] + hold < times[last - 1]:
            raise ValueError(f"is too short: it ends at {table.times[-1]:g} s, the video at {times[last - 1]:g} s")
    moments = np.concatenate((times[:1] - 1 / fps, times)) + SLACK
    return Track(plan, rows[: len(values) + 1], np.searchsorted(table.times, moments, side="right"))


def measure_signals(folder: Path, index: Index) -> tuple[Signal, ...]:
    """The signals of an index with mean, deviation and share of the training clips, all of which are read."""
    sums = {x.name: torch.zeros(2, x.width, dtype=torch.float64) for x in index.signals}
    clips, frames = Counter[str](), Counter[str]()
    for shard in index.splits["train"] if index.signals else ():
        for sample in scan(folder / shard.name):
            if "signals.safetensors" in sample.parts:
                for name, values in load(read_part(folder / shard.name, sample, "signals.safetensors")).items():
                    clips[name] += 1
                    frames[name] += len(values)
                    sums[name] += torch.stack((values.double().sum(0), values.double().square().sum(0)))
    measured = []
    for signal in index.signals:
        signal = dataclasses.replace(signal, known=clips[signal.name] / max(1, index.samples("train")))
        if signal.kind == "continuous":
            mean, square = sums[signal.name] / max(1, frames[signal.name])
            variance = square - mean**2
            std = torch.where(variance > 1e-12 * (1 + mean**2), variance, 1.0).sqrt()
            signal = dataclasses.replace(signal, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
        measured.append(signal)
    return tuple(measured)
