"""Before anything is computed: do all ranks run the same thing?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .control_plane import gather_objects

SHOWN = 5


def inconsistencies(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where ranks differ from what most of them have (in a tie, from the first of them): one text per rank and fact."""
    found = []
    for name in dict.fromkeys(name for own in facts for name in own):
        values = [repr(own.get(name)) for own in facts]
        usual = Counter(values).most_common(1)[0][0]
        shared = values.index(usual)
        found += [
            f"rank {rank} has {name} = {value}, rank {shared} has {usual}"
            for rank, value in enumerate(values)
            if value != usual
        ]
    return found


def source_digest(folders: Iterable[Path]) -> str:
    """Of the Python files in some folders, their names and what is in them: what a rank would run."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("[!.]*.py")):  # an editor's locks are links to nowhere
            found.update(f"{folder.name}/{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def check_consistency(facts: Mapping[str, Any]) -> None:
    """ValueError on all ranks of the world if any two differ in a fact, naming the rank and the fact."""
    found = inconsistencies(gather_objects(dict(facts)))
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"the ranks do not run the same: {'; '.join(found[:SHOWN])}{more}")
