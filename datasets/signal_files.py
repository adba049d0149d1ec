"""Files of signals: tables of numbers or words, a row a frame or with time stamps; and poses of a camera in them."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .shards.tar import Location, open_bytes
from .signals import MAX_NAME

MAX_FILE_BYTES, MAX_CELLS = 64 << 20, 1 << 24  # of a file of signals
SUFFIXES = (".csv", ".jsonl", ".npy", ".parquet")
TIME = "time"  # the column of time stamps, in seconds
WHOLE = re.compile(r"[+-]?\d{1,18}")


@dataclass(frozen=True)
class Table:
    """What a file of signals holds, R rows of C columns without `time`.

    times: seconds [R], not descending; None where each row is of a video frame. values: finite float64 [R, C], or text
    [R] where a single column holds words or whole numbers.
    """

    columns: tuple[str, ...]
    times: np.ndarray | None
    values: np.ndarray

    @property
    def is_discrete(self) -> bool:
        return self.values.dtype.kind == "U"

    def numbers(self) -> np.ndarray:
        """float64 [R, C]; ValueError for words."""
        return _numbers(self.columns[0], self.values)[:, None] if self.is_discrete else self.values


def read_signal(place: Location, name: str = "") -> Table:
    """Read a `.csv` (with a header), `.jsonl` (objects), `.npy` (an array [R, C], [R] or [R, 4, 4], or named fields) or
    `.parquet` file. name: of the file, its suffix says how it is read. ValueError, starting with the name, where it is
    not valid; OSError where it cannot be read.
    """
    name = name or str(place)
    suffix = Path(name).suffix.lower()
    try:
        if suffix not in SUFFIXES:
            raise ValueError(f"is no {', '.join(SUFFIXES)} file")
        if isinstance(place, Path) and not place.is_file():  # whoever opened a named pipe would wait for ever
            raise ValueError("is not there" if not place.exists() else "is not a file")
        with open_bytes(place) as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"has more than the {MAX_FILE_BYTES} bytes that are read")
        return _table(_read_columns(content, suffix))
    except ImportError:
        raise ValueError(f"{name}: reading Parquet needs pyarrow: pip install pyarrow, or write CSV") from None
    except Exception as error:  # NumPy's and pyarrow's parsers raise all kinds
        if isinstance(error, OSError) and error.errno:  # of the disk; pyarrow's own, of a damaged file, have no number
            raise
        raise ValueError(f"{name}: {str(error).partition(chr(10))[0][:300] or 'is damaged'}") from None


def _read_columns(content: bytes, suffix: str) -> dict[str, Any]:
    """Name of each column -> its cells."""
    if suffix == ".parquet":
        from pyarrow import parquet

        file = parquet.ParquetFile(io.BytesIO(content))
        if file.metadata.num_rows * file.metadata.num_columns > MAX_CELLS:
            raise ValueError(f"has more than the {MAX_CELLS} cells that are read")
        return dict(file.read().to_pydict())
    if suffix == ".npy":
        return _read_array(content)
    text = content.decode("utf-8-sig")
    if suffix == ".jsonl":
        objects = [json.loads(line) for line in text.split("\n") if line.strip()]
        for number, row in enumerate(objects, 1):
            if not isinstance(row, dict) or row.keys() != objects[0].keys():
                raise ValueError(f"row {number} is no JSON object with the names of the first")
        return {name: [row[name] for row in objects] for name in (objects[0] if objects else ())}
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    header = [name.strip() for name in rows[0]] if rows else []
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}")
    if len(set(header)) < len(header) or any(map(_is_number, header)):
        raise ValueError(f"has no header of different names, its first line is {','.join(header)[:MAX_NAME]}")
    return {name: [row[place] for row in rows[1:]] for place, name in enumerate(header)}


def _read_array(content: bytes) -> dict[str, np.ndarray]:
    """The columns of an array in NumPy's format; pickles are not read."""
    file = io.BytesIO(content)
    first = np.lib.format.read_magic(file) == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > len(content):  # numpy would allocate what it claims
        raise ValueError("claims more than it holds")
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(array, np.ndarray) and array.dtype.names and array.ndim == 1:
        return {name: array[name] for name in array.dtype.names}
    if not isinstance(array, np.ndarray) or (array.ndim not in (1, 2) and array.shape[1:] != (4, 4)):
        raise ValueError("is no array [rows], [rows, columns] or [rows, 4, 4]")
    return {str(number): column for number, column in enumerate(array.reshape(len(array), -1).T)}


def _table(cells: dict[str, Any]) -> Table:
    arrays = {name: _checked(name, values) for name, values in cells.items()}
    times = arrays.pop(TIME, None)
    if times is not None:
        times = _numbers(TIME, times)
        if (wrong := np.flatnonzero(np.diff(times) < 0)).size:
            before, after = times[wrong[0] : wrong[0] + 2]
            raise ValueError(f"time goes back in row {wrong[0] + 2}, from {before:g} to {after:g} s")
    if not arrays or not len(next(iter(arrays.values()))):
        raise ValueError("has no rows" if arrays else f"has no column beside {TIME}" if cells else "is empty")
    (name, first), *others = arrays.items()
    if not others and first.dtype.kind == "U":
        return Table((name,), times, first)
    return Table(tuple(arrays), times, np.stack([_numbers(name, array) for name, array in arrays.items()], 1))


def _checked(name: str, cells: Any) -> np.ndarray:
    """The cells of a column: text where all are whole numbers or some are words, otherwise float64."""
    if any(isinstance(cell, str) and len(cell) > MAX_NAME for cell in cells):  # all would take as much memory
        raise ValueError(f"column {name} has a cell of more than {MAX_NAME} characters")
    array = np.asarray(cells)
    if array.ndim != 1 or array.dtype.kind not in "biufU":
        raise ValueError(f"column {name} holds other things than numbers or words, or misses some")
    if array.dtype.kind == "f":
        return _numbers(name, array)
    if array.dtype.kind != "U":
        return array.astype(np.int8 if array.dtype.kind == "b" else array.dtype).astype(np.str_)
    texts = [cell.strip() for cell in array.tolist()]
    if missing := next((row for row, text in enumerate(texts, 1) if text.lower() in ("", "nan")), 0):
        raise ValueError(f"row {missing} of column {name} is {texts[missing - 1] or 'empty'}")
    if all(map(WHOLE.fullmatch, texts)):
        return np.array([str(int(text)) for text in texts])
    return _numbers(name, np.array(texts)) if all(map(_is_number, texts)) else np.array(texts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    """A column as float64; ValueError for words and what is not finite."""
    try:
        numbers = array.astype(np.float64)
    except ValueError:
        word = next(text for text in array.tolist() if not _is_number(text))
        raise ValueError(f"column {name} holds {word[:MAX_NAME]!r}, expected numbers") from None
    # what 32 bits cannot hold either
    if (wrong := np.flatnonzero(~(np.abs(numbers) <= np.finfo(np.float32).max))).size:
        raise ValueError(f"row {wrong[0] + 1} of column {name} is {numbers[wrong[0]]:g}")
    return numbers


# --- poses -------------------------------------------------------------------------------------------------

POSITION, QUATERNION = ("x", "y", "z"), ("qx", "qy", "qz", "qw")
MOTION = ("x", "y", "z", "rx", "ry", "rz")


def pose_matrices(columns: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Poses of a camera, camera to world, float64 [R, 4, 4], from 16 columns (a matrix, row by row) or 7: `x y z qx qy
    qz qw`, found by these names, or in this order where they are numbered. ValueError for what is no rigid motion.
    """
    names = (*POSITION, *QUATERNION)
    if values.shape[1] == 16:
        poses = values.reshape(-1, 4, 4)
        turn = poses[:, :3, :3]
        rigid = np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max((1, 2)) < 1e-2
        rigid &= (np.linalg.det(turn) > 0) & (np.abs(poses[:, 3] - (0, 0, 0, 1)).max(1) < 1e-6)
    elif set(columns) == set(names) or list(columns) == [str(number) for number in range(7)]:
        if "x" in columns:
            values = values[:, [columns.index(name) for name in names]]
        norm = np.linalg.norm(values[:, 3:], axis=1)
        rigid = np.abs(norm - 1) < 1e-2
        x, y, z, w = values[:, 3:].T / np.maximum(norm, 1e-12)
        poses = np.tile(np.eye(4), (len(values), 1, 1))
        poses[:, :3, 3] = values[:, :3]
        poses[:, :3, :3] = np.array([
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]).transpose(2, 0, 1)  # fmt: skip
    else:
        raise ValueError(f"a pose has the columns {' '.join(names)}, or 16, not {' '.join(columns)[:200]}")
    if not rigid.all():
        raise ValueError(f"row {np.flatnonzero(~rigid)[0] + 1} is no pose: its rotation is none")
    return poses


def relative_motion(poses: np.ndarray) -> np.ndarray:
    """Motion of a camera from each frame to the next, float32 [T, 6], from poses (camera to world) [T, 4, 4].

    The first three numbers are the translation in the axes of the camera's previous frame, the others the rotation
    vector in radians. The first frame has not moved.
    """
    rotation, position = poses[:, :3, :3], poses[:, :3, 3]
    back = np.concatenate((rotation[:1], rotation[:-1])).transpose(0, 2, 1)
    moved = back @ np.diff(position, axis=0, prepend=position[:1])[..., None]
    turned = back @ rotation
    # The quaternion is the eigenvector of the greatest eigenvalue (Bar-Itzhack 2000): exact for half turns, too.
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = turned.transpose(1, 2, 0)
    matrix = np.array([
        [xx - yy - zz, xy + yx, xz + zx, zy - yz],
        [xy + yx, yy - xx - zz, yz + zy, xz - zx],
        [xz + zx, yz + zy, zz - xx - yy, yx - xy],
        [zy - yz, xz - zx, yx - xy, xx + yy + zz],
    ]).transpose(2, 0, 1)  # fmt: skip
    quaternion = np.linalg.eigh(matrix)[1][..., -1]
    quaternion *= np.where(quaternion[:, 3:] < 0, -1, 1)
    sine = np.linalg.norm(quaternion[:, :3], axis=1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[:, 3:])
    vector = quaternion[:, :3] * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2)
    return np.concatenate((moved[..., 0], vector), 1).astype(np.float32)
