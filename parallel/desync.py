"""Before anything is computed: do all ranks run the same thing?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .agreement import gather

SHOWN = 5


def disagreements(facts: Sequence[Mapping[str, Any]]) -> list[str]:
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


def agree(facts: Mapping[str, Any]) -> None:
    """ValueError on all ranks of the world if any two differ in a fact, naming the rank and the fact."""
    found = disagreements(gather(dict(facts)))
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"the ranks do not run the same: {'; '.join(found[:SHOWN])}{more}")
