"""What to convert: files, folders and manifests to a list of sources, the same on every machine.

A manifest is a `.csv`, `.jsonl` or `.parquet` file with a column `path` and optional columns `caption`, `label`,
`licence`, `start`, `end` (seconds); a `.txt` file holds one path a line. Paths in it are relative to its folder.
A `.tar` is as WebDataset writes it: `KEY.mp4` (or another kind of video), with `KEY.json` and `KEY.txt` about it.
"""

import csv
import dataclasses
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..shards.index import MOST_CLASSES
from ..shards.tar import FILE_ERRORS, Location, Member, open_bytes, retry_read, size_of, tar_members
from ..video import SUFFIXES

END_BYTES = 1 << 16  # at which files of equal size are told apart before all of them is read
TEXT_BYTES = 1 << 20  # the most that is read of a KEY.json or KEY.txt
MANIFESTS = (".csv", ".jsonl", ".parquet", ".txt")
COLUMNS = ("path", "caption", "label", "licence", "start", "end")


@dataclass(frozen=True)
class Source:
    """One video, or the part [start, end) of it in seconds, and what is known about it.

    span: the part of the file that all sources taken from it lie in; its end is what is held out. draw: a number in
    [0, 1), the same for all of them: whether it is held out whole where it is too short to be divided. size: of the
    file in bytes when it was listed; -1 for what was no file.
    """

    name: str
    path: Location
    caption: str | None = None
    label: int | None = None
    licence: str | None = None
    start: float = 0.0
    end: float = math.inf
    span: tuple[float, float] = (0.0, math.inf)
    draw: float = 0.0
    size: int = -1


@dataclass(frozen=True)
class Listing:
    """All sources in order; `classes`: number of labels, 0 for none; `names` of the labels where they have any."""

    sources: list[Source]
    classes: int = 0
    names: tuple[str, ...] = ()


def find_sources(given: tuple[str, ...]) -> Listing:
    """Every source: video files as given, folders through all levels in sorted order, rows of manifests, tars' videos.

    Hidden files and folders are left out, and a source reached twice counts once. Labels are whole numbers, or
    words that are numbered in alphabetical order; all sources have one or none has. Raises FileNotFoundError for
    what does not exist, ValueError for addresses, folders without videos and rows that make no sense.
    """
    found: dict[tuple[Location, float, float], tuple[Source, Any]] = {}
    for item in given:
        for source, label in _sources(item):
            found.setdefault((source.path, source.start, source.end), (source, label))
    spans: dict[Location, tuple[float, float]] = {}
    draws: dict[Location, float] = {}
    for (path, start, end), (source, _) in found.items():
        first, last = spans.get(path, (start, end))
        spans[path] = (min(first, start), max(last, end))
        draws[path] = min(draws.get(path, 1.0), _draw(source.name.removesuffix(_part(start, end))))
    sizes = {path: size_of(path) for path in spans}
    labels, names = _number([(source.name, label) for source, label in found.values()])
    sources = [
        dataclasses.replace(
            source, span=spans[source.path], draw=draws[source.path], size=sizes[source.path], label=label
        )
        for (source, _), label in zip(found.values(), labels, strict=True)
    ]
    return Listing(sources, max((label for label in labels if label is not None), default=-1) + 1, names)


def _sources(given: str) -> Iterator[tuple[Source, Any]]:
    """(source, label as written) of what one argument names."""
    path = _local(given, given)
    if path.is_file() and path.suffix.lower() in MANIFESTS:
        yield from _manifest(path)
    elif path.is_file() and path.suffix.lower() == ".tar":
        yield from _packed(path)
    elif path.is_file():
        yield Source(path.name, path), None
    elif path.is_dir():
        inside = list(_videos(path))
        if not inside:
            raise ValueError(f"no videos in {given}: looked for {' '.join(sorted(SUFFIXES))}")
        for video in inside:
            yield Source(f"{path.name}/{video.relative_to(path)}", video.resolve()), None
    else:
        raise FileNotFoundError(f"no such file or folder: {given}")


def _part(start: float, end: float) -> str:
    """What a part's name ends with."""
    return "" if (start, end) == (0, math.inf) else f"[{start:g}-{end:g}]"


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name of a file."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def _local(given: str, whence: str, folder: Path | None = None) -> Path:
    if "://" in given or given.startswith("pipe:"):
        raise ValueError(f"source {whence!r} is an address or a command; only local files are read")
    try:
        return ((folder or Path()) / Path(given).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # no such user after ~, or a character that no path has
        raise ValueError(f"source {whence!r} is no path: {error}") from None


def _videos(folder: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(current, name)


# --- tars ------------------------------------------------------------------------------------------------


def _packed(tar: Path) -> Iterator[tuple[Source, Any]]:
    """The videos in a tar, in its order. ValueError for a tar without any."""
    inside = tar_members(tar)
    videos = 0
    for name, member in inside.items():
        stem, dot, suffix = name.rpartition(".")
        if dot + suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in name.split("/")):
            continue
        about: dict[str, Any] = {"caption": _text(tar, f"{stem}.txt", inside)}
        if text := _text(tar, f"{stem}.json", inside):
            about |= _about(f"{tar}: {stem}.json", text)
        caption, licence = about["caption"] or None, about.get("licence")
        yield Source(f"{tar.name}/{name}", member, caption, licence=licence), about.get("label")
        videos += 1
    if not videos:
        raise ValueError(f"no videos in {tar}: looked for {' '.join(sorted(SUFFIXES))}")


def _text(tar: Path, name: str, inside: dict[str, Member]) -> str:
    """The text of a member, or nothing where there is none."""
    if name not in inside:
        return ""
    if inside[name].size > TEXT_BYTES:
        raise ValueError(f"{tar}: {name} claims {inside[name].size} bytes, at most {TEXT_BYTES} are read")
    try:
        with open_bytes(inside[name]) as file:
            return file.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{tar}: {name} is not UTF-8 text ({error})") from None


def _about(place: str, text: str) -> dict[str, Any]:
    """What a KEY.json says that we know; others' say much more."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not readable as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place} holds no table of names and values")
    found = {name: fields[name] for name in ("caption", "label", "licence") if fields.get(name) not in (None, "")}
    for name, value in found.items():
        if not isinstance(value, str) and (name != "label" or not isinstance(value, int)):
            raise ValueError(f"{place}: {name} is {value!r}, expected text" + " or a number" * (name == "label"))
    return found


# --- manifests ---------------------------------------------------------------------------------------------


def _manifest(file: Path) -> Iterator[tuple[Source, Any]]:
    rows = 0
    for place, row in _rows(file):
        if not isinstance(row, dict) or None in row or set(row) - set(COLUMNS):
            extra = sorted(map(str, set(row) - set(COLUMNS))) if isinstance(row, dict) else row
            raise ValueError(f"{place}: {extra} unknown, the columns are {', '.join(COLUMNS)}")
        row = {name: value for name, value in row.items() if value is not None and str(value).strip()}
        if not isinstance(row.get("path"), str):
            raise ValueError(f"{place}: has no path")
        try:
            start, end = float(row.get("start", 0)), float(row.get("end", math.inf))
        except (TypeError, ValueError):
            wrong = [row[name] for name in ("start", "end") if name in row]
            raise ValueError(f"{place}: start and end are in seconds, not {wrong}") from None
        if not 0 <= start < end:
            raise ValueError(f"{place}: start {start:g} and end {end:g}: expected 0 <= start < end in seconds")
        rows += 1
        path = _local(row["path"], f"{row['path']} ({place})", file.parent)
        if path.is_file() and path.suffix.lower() == ".tar":
            if len(row) > 1:
                raise ValueError(f"{place}: {row['path']} holds many videos; what is known of each belongs in it")
            yield from _packed(path)
            continue
        caption, licence = (str(row[name]) if name in row else None for name in ("caption", "licence"))
        source = Source(row["path"] + _part(start, end), path, caption, licence=licence, start=start, end=end)
        yield source, row.get("label")
    if not rows:
        raise ValueError(f"{file} lists no videos")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a manifest. A text file without table is a column of paths."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        try:
            from pyarrow import ArrowInvalid, parquet
        except ImportError:
            raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow, or write CSV") from None
        try:
            rows = parquet.read_table(file).to_pylist()
        except ArrowInvalid as error:
            raise ValueError(f"{file} is not readable as Parquet: {error}") from None
        yield from ((f"{file} row {i}", row) for i, row in enumerate(rows, 1))
        return
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if kind == ".csv":
                table = csv.DictReader(lines, restkey=None)
                yield from ((f"{file} line {table.line_num}", row) for row in table)
                return
            for number, line in enumerate(lines, 1):
                if line := line.strip():
                    yield f"{file} line {number}", json.loads(line) if kind == ".jsonl" else {"path": line}
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not readable as {kind[1:]}: {error}") from None


def _number(labels: list[tuple[str, Any]]) -> tuple[list[int | None], tuple[str, ...]]:
    """Numbers of the labels of (source, label) pairs, and their names where they are words."""
    without = [name for name, label in labels if label is None]
    if len(without) == len(labels):
        return [None] * len(labels), ()
    if without:
        raise ValueError(f"{len(without)} of {len(labels)} sources have no label, among them {without[0]}: label all")
    words = [str(label) for _, label in labels]
    if all(word.isdecimal() for word in words):
        for (name, _), word in zip(labels, words, strict=True):
            if len(word) > 20 or int(word) >= MOST_CLASSES:
                raise ValueError(
                    f"{name}: label {word[:40]} is no class below {MOST_CLASSES} but an id: number the classes from 0 "
                    "on without gaps, or write words, which msc numbers (id-1 instead of 1)"
                )
        return [int(word) for word in words], ()
    names = tuple(sorted(set(words)))
    if len(names) > MOST_CLASSES:
        raise ValueError(f"sources have {len(names)} different labels, at most {MOST_CLASSES} are read: leave them out")
    number = {word: i for i, word in enumerate(names)}
    return [number[word] for word in words], names


# --- copies ------------------------------------------------------------------------------------------------


def copies(sources: list[Source]) -> dict[int, str]:
    """Number of every source whose content an earlier one has -> name of that one. Of files of equal size the ends are
    read, and where these agree the whole, by SHA-256; files that cannot be read are no copies: they are named when they
    are cut.
    """
    groups = [{source.path for source in sources if source.size >= 0}]
    for trait in (size_of, _ends, _sha256):
        groups = [found for group in groups for found in _divided(group, trait) if len(found) > 1]
    alike = {path: number for number, group in enumerate(groups) for path in group}
    first: dict[tuple[int, float, float], str] = {}
    found = {}
    for number, source in enumerate(sources):
        if source.path in alike:
            key = (alike[source.path], source.start, source.end)
            if key in first:
                found[number] = first[key]
            else:
                first[key] = source.name
    return found


def _divided(places: set[Location], trait: Callable[[Location], Any]) -> Iterable[set[Location]]:
    """Those of equal `trait` together, without those that again and again cannot be read. OSError where that speaks of
    their disk or server: a copy must not be taken for an original because of it."""
    found: dict[Any, set[Location]] = defaultdict(set)
    for place in places:
        try:
            found[retry_read(partial(trait, place))].add(place)
        except OSError as error:
            if error.errno not in FILE_ERRORS:
                raise OSError(error.errno, error.strerror, str(place)) from None
    return found.values()


def _ends(place: Location) -> bytes:
    with open_bytes(place) as file:
        found = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, size_of(place) - END_BYTES))
        found.update(file.read(END_BYTES))
    return found.digest()


def _sha256(place: Location) -> bytes:
    with open_bytes(place) as file:
        return hashlib.file_digest(file, "sha256").digest()
