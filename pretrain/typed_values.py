"""Typed reader: plain values of JSON or YAML as frozen dataclasses, strictly, in time and memory that the file bounds.

The one reader of config.yaml, of settings in checkpoints and on the command line, and of an export's config.json.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

# 1e-4: a number to its author, but text to YAML 1.1, which wants 1.0e-4
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
KINDS: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a table"}
MAX_PROBLEMS = 10  # shown in one message
MAX_JSON_BYTES = 64 << 20  # an index of the files of a very large model included
shown = reprlib.Repr()  # of a bounded length, whatever the value
shown.maxstring = shown.maxother = shown.maxlong = 80
T = TypeVar("T")


def read(kind: type[T], value: Any, name: str, source: object, known: Collection[str] = ()) -> T:
    """`value` as the dataclass `kind`. Keys that are left out take their default; ValueError names the source, and the
    key and value of each problem. name: of the section; known: further dotted keys to hint at for an unknown one."""
    try:
        return cast(T, _read(kind, value, name, known))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size; ValueError names the file."""
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than the {MAX_JSON_BYTES:,} bytes that a table of settings may have")
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a table of settings") from None
    except ValueError:
        raise ValueError(f"{path} is truncated or damaged: it is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def _read(kind: Any, value: Any, name: str, known: Collection[str]) -> Any:
    if dataclasses.is_dataclass(kind):
        return _table(cast(type, kind), value, name, known)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            _refuse(name, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        listed = [choice for choice in choices if typing.get_origin(choice) is tuple]
        return _read(listed[0] if listed and isinstance(value, list | tuple) else choices[0], value, name, known)
    if origin is tuple:
        items = _items(value, name, None if arguments[-1] is ... else len(arguments))
        kinds = arguments if arguments[-1] is not ... else arguments[:1] * len(items)
        return tuple(_all(lambda at, item: _read(kinds[at], item, f"{name}[{at}]", known), enumerate(items)))
    if isinstance(kind, type) and issubclass(kind, tuple):  # a NamedTuple
        hints = typing.get_type_hints(kind)
        pairs = zip(hints, _items(value, name, len(hints)), strict=True)
        return kind(*_all(lambda key, item: _read(hints[key], item, f"{name}.{key}", known), pairs))
    return _scalar(origin or kind, value, name)


def _scalar(kind: Any, value: Any, name: str) -> Any:
    if kind is str and value is None:
        return ""  # `key=` on the command line empties a text
    if kind is float and isinstance(value, str) and EXPONENT.fullmatch(value):
        value = float(value)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        _refuse(name, value, KINDS[kind])
    if kind is int and not -(2**63) <= value < 2**63:
        _refuse(name, value, "an integer that fits into 64 bits")
    if kind is float and math.isnan(value):
        _refuse(name, value, "a number")
    return value


def _table(kind: type, value: Any, name: str, known: Collection[str]) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name or 'the configuration'} must be a table of keys, not {shown.repr(value)}")
    if upgrade := getattr(kind, "from_earlier_version", None):
        value = upgrade(value)
    hints, prefix = typing.get_type_hints(kind), f"{name}." if name else ""

    def field(key: Any, item: Any) -> Any:
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{str(key)[:80]}{_hint(str(key), prefix, hints, known)}")
        return _read(hints[key], item, prefix + key, known)

    fields = dict(zip(value, _all(field, value.items()), strict=True))
    for required in dataclasses.fields(kind):
        if required.default is required.default_factory is dataclasses.MISSING and required.name not in fields:
            raise ValueError(f"{prefix}{required.name} is missing")
    return kind(**fields)


def _items(value: Any, name: str, length: int | None) -> list[Any]:
    if not isinstance(value, list | tuple):
        _refuse(name, value, "a list")
    if length is not None and len(value) != length:
        _refuse(name, value, f"a list of {length}")
    return list(value)


def _all(function: Callable[[Any, Any], Any], pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Results of all pairs; one ValueError with the first problems of them."""
    results, problems = [], []
    for pair in pairs:
        try:
            results.append(function(*pair))
        except ValueError as error:
            problems.append(str(error))
            if len(problems) == MAX_PROBLEMS:
                break
    if problems:
        raise ValueError("; ".join(problems))
    return results


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(f"{name} is {shown.repr(value)}; it must be {expected}")


def _hint(key: str, prefix: str, own: Collection[str], known: Collection[str]) -> str:
    """The nearest key of the section, else of all by the whole path or the last part."""
    by_last_part = {other.rsplit(".", 1)[-1]: other for other in known}
    best = _nearest(key[:80], own)
    best = prefix + best if best else _nearest(prefix + key[:80], known)
    best = best or by_last_part.get(_nearest(key[:80], by_last_part), "")
    return f"; did you mean {best}?" if best else ""


def _nearest(name: str, names: Collection[str]) -> str:
    return next(iter(difflib.get_close_matches(name, names, n=1)), "")
