"""Sources of a conversion: files, folders, tars and manifests as one list of videos, the same on every machine.

A manifest is a `.csv`, `.jsonl` or `.parquet` file with a column `path` and optional columns `caption`, `label`,
`licence`, `group`, `start`, `end` (seconds); a `.txt` file holds one path a line. Paths in it are relative to its
folder. A `.tar` has the WebDataset layout: `KEY.mp4` (or another video format, or `KEY.VIEW.mp4`), with optional
`KEY.json`, `KEY.txt` and `KEY.cls`. A signal NAME is a file `STEM.NAME.csv` (or another of its formats) beside the
video, one that a column NAME of the manifest names, or `KEY.NAME.csv` in the tar.
"""

import csv
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

from ..files import sha256_of
from ..shards.index import MAX_CLASSES
from ..shards.tar import FILE_ERRORS, Location, Member, open_bytes, retry_read, size_of, tar_members
from ..signal_files import SUFFIXES as SIGNAL_SUFFIXES
from ..video import SUFFIXES

END_BYTES = 1 << 16  # read from both ends of files of equal size, before all of them is read
TEXT_BYTES = 1 << 20  # the most that is read of a KEY.json, KEY.txt or KEY.cls
MANIFESTS = (".csv", ".jsonl", ".parquet", ".txt")
TEXTS = ("caption", "licence", "group")
COLUMNS = ("path", "caption", "label", "licence", "group", "start", "end")
# The name of a piece, without suffix: any recording, then a word and a number (holiday-Scene-001), or a recording with
# a digit, then the number (video3_12, v_Bowling_g01_c02). Times (20260105_174500) and single numbers (img_12) are none.
PIECE = re.compile(
    r"(?P<named>.+)[-_. ](?:scene|part|piece|segment|chunk)[-_. ]?\d{1,5}|(?P<numbered>.*\d.*)_c?\d{1,5}", re.IGNORECASE
)
Entry = tuple["Source", Any, Path]  # a source, its label as written, the folder that its name is relative to
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One video, or the part [start, end) of it in seconds, with its metadata.

    group: the recording of which this and other files are pieces, "" for none; it is held out whole or not at all.
    span: the part of the file that all sources taken from it lie in; its end is what is held out. draw: a number in
    [0, 1), the same for all of them and for a group: decides about what is not divided. size: of the file in bytes when
    it was listed; -1 where there was no file. signals: name, file's name and place of every signal that it has.
    """

    name: str
    path: Location
    caption: str | None = None
    label: int | None = None
    licence: str | None = None
    group: str = ""
    start: float = 0.0
    end: float = math.inf
    span: tuple[float, float] = (0.0, math.inf)
    draw: float = 0.0
    size: int = -1
    signals: tuple[tuple[str, str, Location], ...] = ()


@dataclass(frozen=True)
class Listing:
    """All sources in order; `classes`: number of labels, 0 for none; `names` of the labels where they are text."""

    sources: list[Source]
    classes: int = 0
    names: tuple[str, ...] = ()


def find_sources(arguments: tuple[str, ...], signals: Sequence[str] = ()) -> Listing:
    """Every source: video files, folders through all levels in sorted order, rows of manifests, videos in tars.

    Hidden files and folders are skipped, and a source reached twice counts once. Labels are whole numbers, or text,
    which is numbered in alphabetical order; all sources have one or none has. signals: their names; a source may lack
    any of them. Raises FileNotFoundError for missing files, ValueError for addresses, folders without videos and
    invalid rows.
    """
    unique: dict[tuple[Location, float, float], Entry] = {}
    for argument in arguments:
        for source, label, folder in _sources_of(argument, signals):
            unique.setdefault((source.path, source.start, source.end), (source, label, folder))
    entries = list(unique.values())
    parts: dict[Location, list[Source]] = defaultdict(list)
    for source, _, _ in entries:
        parts[source.path].append(source)
    spans = {path: (min(x.start for x in own), max(x.end for x in own)) for path, own in parts.items()}
    draws = {path: min(_draw(_file_name(x)) for x in own) for path, own in parts.items()}
    groups = _groups(parts)
    draws |= {path: _draw(group) for path, group in groups.items()}
    if len(groups) == len(parts):  # otherwise few recordings might leave a split without clips
        least = min(draws.values())
        draws = {path: draw if draw > least else 0.0 for path, draw in draws.items()}
    sizes = {path: size_of(path) for path in parts}
    names = _distinct_names(entries)
    labels, classes = _number_labels([(name, label) for name, (_, label, _) in zip(names, entries, strict=True)])
    sources = [
        dataclasses.replace(
            source, name=name, label=label, group=groups.get(source.path, ""),
            span=spans[source.path], draw=draws[source.path], size=sizes[source.path],
            signals=_signals_of(source, signals),
        )
        for name, label, (source, _, _) in zip(names, labels, entries, strict=True)
    ]  # fmt: skip
    return Listing(sources, max((label for label in labels if label is not None), default=-1) + 1, classes)


def _sources_of(argument: str, signals: Sequence[str]) -> Iterator[Entry]:
    """What one argument names."""
    path = _local_path(argument, argument)
    if path.is_file() and path.suffix.lower() in MANIFESTS:
        yield from _manifest_sources(path, signals)
    elif path.is_file() and path.suffix.lower() == ".tar":
        yield from _tar_sources(path, signals)
    elif path.is_file():
        yield Source(path.name, path), None, path.parent
    elif path.is_dir():
        videos = list(_videos_in(path))
        if not videos:
            raise ValueError(f"no videos in {argument}: looked for {' '.join(sorted(SUFFIXES))}")
        for video in videos:
            yield Source(f"{path.name}/{video.relative_to(path)}", video.resolve()), None, path.parent
    else:
        raise FileNotFoundError(f"no such file or folder: {argument}")


def _signals_of(source: Source, names: Sequence[str]) -> tuple[tuple[str, str, Location], ...]:
    """The files of a source's signals: those that came with it, or else those beside it. ValueError where one signal
    has several."""
    files = {name: [own for own in source.signals if own[0] == name] for name in names}
    if isinstance(source.path, Path):
        for name in names:
            beside = [source.path.with_name(f"{source.path.stem}.{name}{suffix}") for suffix in SIGNAL_SUFFIXES]
            files[name] = files[name] or [(name, path.name, path) for path in beside if path.exists()]
    for own in files.values():
        if len(own) > 1:
            raise ValueError(f"{source.name}: {' and '.join(name for _, name, _ in own)} are one signal: remove one")
    return tuple(one for own in files.values() for one in own)


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def _file_name(source: Source) -> str:
    """A source's name without the part that is taken."""
    return source.name.removesuffix(_part_suffix(source.start, source.end))


def _groups(parts: dict[Location, list[Source]]) -> dict[Location, str]:
    """The group of every file that has one, by its rows or its name; a group has two files at least.

    Pieces of one recording may lie in several tars, but not in several folders.
    """
    groups: dict[Location, str] = {}
    for path, own in parts.items():
        by_rows = sorted({source.group for source in own if source.group})
        if len(by_rows) > 1:
            raise ValueError(f"{_file_name(own[0])} is in several groups, {by_rows}: parts of one file must be in one")
        name = _file_name(own[0]).rpartition(".")[0]
        groups[path] = (
            by_rows[0] if by_rows else _recording(name.partition("/")[2] if isinstance(path, Member) else name)
        )
    files = Counter(groups.values())
    if len(parts) > 1 and len(files) == 1 and "" not in files:
        log.warning("all %d videos are pieces of one recording, %s: both splits are of it", len(parts), *files)
        return {}
    return {path: group for path, group in groups.items() if group and files[group] > 1}


def _recording(name: str) -> str:
    """The folder and name of the recording of which a video of this name, without suffix, is a piece; "" for none."""
    folder, slash, stem = name.rpartition("/")
    piece = PIECE.fullmatch(stem)
    return f"{folder}{slash}{piece['named'] or piece['numbered']}" if piece else ""


def _distinct_names(entries: list[Entry]) -> list[str]:
    """Names of the sources: of those with one name, with as many of the folders before it as tell them apart."""
    names = [source.name for source, _, _ in entries]
    for depth in range(max(len(folder.parts) for _, _, folder in entries) + 2):
        repeated = {name for name, count in Counter(names).items() if count > 1}
        if not repeated:
            break
        for i, (source, _, folder) in enumerate(entries):
            if names[i] in repeated:  # first by all digits of its part, of which a name usually has six
                part = f"[{source.start!r}-{source.end!r}]" * bool(_part_suffix(source.start, source.end))
                names[i] = f"{Path(*folder.parts[-depth:])}/" * bool(depth) + _file_name(source) + part
    return names


def _part_suffix(start: float, end: float) -> str:
    """What the name of a part of a video ends with."""
    return "" if (start, end) == (0, math.inf) else f"[{start:g}-{end:g}]"


def _local_path(path: str, description: str, folder: Path | None = None) -> Path:
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"source {description!r} is an address or a command; only local files are read")
    try:
        return ((folder or Path()) / Path(path).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # no such user after ~, or a character that no path has
        raise ValueError(f"source {description!r} is not a valid path: {error}") from None


def _videos_in(folder: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(current, name)


# --- tars ------------------------------------------------------------------------------------------------


def _tar_sources(tar: Path, signals: Sequence[str]) -> Iterator[Entry]:
    """The videos in a tar, in its order. ValueError for a tar without any.

    The key of a video ends at the first dot of its file name, as in WebDataset, or at its last one, as where files are
    packed that belong together by their names; what the longer key says is preferred.
    """
    files = tar_members(tar)
    texts: dict[str, str] = {}  # a name with its extension in small letters -> as it is
    for name in files:
        stem, _, extension = name.rpartition(".")
        other = texts.setdefault(f"{stem}.{extension.lower()}", name)
        if other != name and extension.lower() in ("json", "txt", "cls"):
            raise ValueError(f"{tar}: {other!r} and {name!r} differ in capitals only; remove one of them")
    videos = 0
    for name, member in files.items():
        stem, dot, suffix = name.rpartition(".")
        if dot + suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in name.split("/")):
            continue
        folder, slash, base = name.rpartition("/")
        key = f"{folder}{slash}{base.partition('.')[0]}"
        metadata: dict[str, Any] = {}
        for one, kind in product(dict.fromkeys((key, stem)), ("txt", "cls", "json")):
            if place := texts.get(f"{one}.{kind}"):
                metadata |= _read_metadata(tar, place, files[place])
                if one != stem:  # there may be several views of this sample
                    metadata["group"] = _recording(key) or key
        own: dict[str, list[tuple[str, str, Location]]] = {}
        for one, signal in product(dict.fromkeys((key, stem)), signals):
            if places := [place for suffix in SIGNAL_SUFFIXES if (place := f"{one}.{signal}{suffix}") in files]:
                own[signal] = [(signal, place.rpartition("/")[2], files[place]) for place in places]
        source = Source(
            f"{tar.name}/{name}", member, **{**metadata, "label": None}, signals=tuple(chain(*own.values()))
        )
        yield source, metadata.get("label"), tar.parent
        videos += 1
    if not videos:
        raise ValueError(f"no videos in {tar}: looked for {' '.join(sorted(SUFFIXES))}")


def _read_metadata(tar: Path, name: str, member: Member) -> dict[str, Any]:
    """What KEY.txt, KEY.cls or KEY.json says of its video; other fields than caption, label and licence are ignored."""
    if member.size > TEXT_BYTES:
        raise ValueError(f"{tar}: {name} claims {member.size} bytes, at most {TEXT_BYTES} are read")
    try:
        with open_bytes(member) as file:
            text = file.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{tar}: {name} is not UTF-8 text ({error})") from None
    extension = name[-4:].lower()
    if not text or extension in (".txt", ".cls"):
        return {"caption" if extension == ".txt" else "label": text} if text else {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{tar}: {name} is not readable as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{tar}: {name} is not a JSON object of names and values")
    fields = {field: fields[field] for field in ("caption", "label", "licence") if fields.get(field) not in (None, "")}
    _check_texts(f"{tar}: {name}", fields)
    return fields


def _check_texts(place: str, fields: dict[str, Any]) -> None:
    """ValueError where a field is no text, or is one that cannot be written as UTF-8; a label may be a number."""
    for name, value in fields.items():
        if not isinstance(value, str):
            if name != "label" or not isinstance(value, int):
                raise ValueError(f"{place}: {name} is {value!r}, expected text" + " or a number" * (name == "label"))
        elif half := re.search("[\ud800-\udfff]", value):
            raise ValueError(
                f"{place}: {name} holds U+{ord(half[0]):04X} at character {half.start() + 1}, half of a surrogate "
                "pair, as of text cut by its UTF-16 length: cut it before that character, or write both halves"
            )


# --- manifests ---------------------------------------------------------------------------------------------


def _manifest_sources(file: Path, signals: Sequence[str]) -> Iterator[Entry]:
    rows, columns = 0, (*COLUMNS, *signals)
    for place, row in _rows(file):
        if not isinstance(row, dict) or None in row or set(row) - set(columns):
            extra = sorted(map(str, set(row) - set(columns))) if isinstance(row, dict) else row
            raise ValueError(f"{place}: {extra} unknown, the columns are {', '.join(columns)} (signals: --signal NAME)")
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
        path = _local_path(row["path"], f"{row['path']} ({place})", file.parent)
        if path.is_file() and path.suffix.lower() == ".tar":
            if len(row) > 1:
                raise ValueError(f"{place}: {row['path']} holds many videos; put the metadata of each into the tar")
            yield from _tar_sources(path, signals)
            continue
        fields = {name: row[name] for name in (*TEXTS, "label") if name in row}
        _check_texts(place, {name: value for name, value in fields.items() if not isinstance(value, int | float)})
        label, texts = fields.pop("label", None), {name: str(value) for name, value in fields.items()}
        own = [(name, row[name]) for name in signals if name in row]
        if wrong := [value for _, value in own if not isinstance(value, str)]:
            raise ValueError(f"{place}: a signal is {wrong[0]!r}, expected the name of its file")
        named = tuple(
            (name, Path(text).name, _local_path(text, f"{text} ({place})", file.parent)) for name, text in own
        )
        source = Source(row["path"] + _part_suffix(start, end), path, start=start, end=end, signals=named)
        yield dataclasses.replace(source, **texts), label, file.parent  # type: ignore[arg-type]
    if not rows:
        raise ValueError(f"{file} lists no videos")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a manifest; the lines of a text file are paths."""
    kind, place = file.suffix.lower(), str(file)
    try:
        if kind == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(file).to_pylist()
            yield from ((f"{file} row {number}", row) for number, row in enumerate(rows, 1))
            return
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if kind == ".csv":
                table = csv.DictReader(lines, restkey=None)
                yield from ((f"{file} line {table.line_num}", row) for row in table)
                return
            for number, line in enumerate(lines, 1):
                place = f"{file} line {number}"
                if line := line.strip():
                    yield place, json.loads(line) if kind == ".jsonl" else {"path": line}
    except ImportError:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow, or write CSV") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from None
    except (csv.Error, ValueError, RecursionError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk; pyarrow's own, of a damaged file, have no number
            raise
        raise ValueError(
            f"{place} is not readable as {'Parquet' if kind == '.parquet' else kind[1:]}: {error}"
        ) from None


def _number_labels(labels: list[tuple[str, Any]]) -> tuple[list[int | None], tuple[str, ...]]:
    """Numbers of the labels of (source, label) pairs, and their names where they are text."""
    unlabelled = [name for name, label in labels if label is None]
    if len(unlabelled) == len(labels):
        return [None] * len(labels), ()
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(labels)} sources have no label, among them {unlabelled[0]}: label all or none"
        )
    texts = [str(label) for _, label in labels]
    if all(text.isdecimal() for text in texts):
        for (name, _), text in zip(labels, texts, strict=True):
            if len(text) > 20 or int(text) >= MAX_CLASSES:
                raise ValueError(
                    f"{name}: label {text[:40]} is not a class number below {MAX_CLASSES}: number the classes from 0 "
                    "without gaps, or use text labels, which msc numbers (id-1 instead of 1)"
                )
        return [int(text) for text in texts], ()
    names = tuple(sorted(set(texts)))
    if len(names) > MAX_CLASSES:
        raise ValueError(f"sources have {len(names)} different labels, at most {MAX_CLASSES} are read: leave them out")
    number = {text: i for i, text in enumerate(names)}
    return [number[text] for text in texts], names


# --- duplicates --------------------------------------------------------------------------------------------


def find_copies(sources: list[Source]) -> dict[int, str]:
    """Number of every source with the content of an earlier one -> name of that one. Of files of equal size the ends
    are read, and where these agree the whole, by SHA-256. Files that cannot be read are no copies: extraction names
    them.
    """
    groups = [{source.path for source in sources if source.size >= 0}]
    for trait in (size_of, _hash_of_ends, _hash_of_all):
        groups = [equal for group in groups for equal in _group_by(group, trait) if len(equal) > 1]
    group_of = {path: number for number, group in enumerate(groups) for path in group}
    originals: dict[tuple[int, float, float], str] = {}
    copies = {}
    for number, source in enumerate(sources):
        if source.path in group_of:
            key = (group_of[source.path], source.start, source.end)
            if key in originals:
                copies[number] = originals[key]
            else:
                originals[key] = source.name
    return copies


def _group_by(places: set[Location], trait: Callable[[Location], Any]) -> Iterable[set[Location]]:
    """Sets of places of equal trait, without single files that repeatedly cannot be read. OSError where a disk or
    server fails: a copy must not be taken for an original because of it."""
    groups: dict[Any, set[Location]] = defaultdict(set)
    for place in places:
        try:
            groups[retry_read(partial(trait, place))].add(place)
        except OSError as error:
            if error.errno not in FILE_ERRORS:
                raise OSError(error.errno, error.strerror, str(place)) from None
    return groups.values()


def _hash_of_ends(place: Location) -> bytes:
    with open_bytes(place) as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, size_of(place) - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.digest()


def _hash_of_all(place: Location) -> str:
    with open_bytes(place) as file:
        return sha256_of(file)
