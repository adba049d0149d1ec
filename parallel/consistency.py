"""Consistency check: before training starts, do all ranks run the same code with the same settings on the same data?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .control_plane import gather_objects

SHOWN = 5


def inconsistencies(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a rank differs from the majority (in a tie, from the first rank): one text per rank and fact."""
    texts = []
    for name in dict.fromkeys(name for own in facts for name in own):
        values = [repr(own.get(name)) for own in facts]
        usual = Counter(values).most_common(1)[0][0]
        texts += [
            f"rank {rank} has {name} = {value}, rank {values.index(usual)} has {usual}"
            for rank, value in enumerate(values)
            if value != usual
        ]
    return texts


def source_digest(folders: Iterable[Path]) -> str:
    """A checksum of the Python files in some folders, their names included."""
    sha = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("[!.]*.py")):  # hidden ones may be an editor's dangling lock links
            sha.update(f"{folder.name}/{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()[:12]


def check_consistency(facts: Mapping[str, Any]) -> None:
    """ValueError on all ranks if any two differ in a fact, naming rank and fact. A collective."""
    texts = inconsistencies(gather_objects(dict(facts)))
    if texts:
        more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
        raise ValueError(f"the ranks do not run the same: {'; '.join(texts[:SHOWN])}{more}")
