"""Past context: how attention reaches what it needs of a video but does not hold. Two small protocols.

A `PastContext` says where a run of units lies and brings its past. It may name a `Placement` for a scale: another
place where that scale's attention is computed. Neither tells who else there is; the parallel package
(context_parallel.py) and the generation cache (sampler.py) provide them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..kernels.dispatch import Attend


@dataclass(frozen=True)
class Layer:
    """Number of a layer, inside of an object: a compiler would compile anew for every bare number."""

    number: int

    def __str__(self) -> str:
        return str(self.number)


Key = tuple[str | Layer | int, ...]  # of a tensor that is exchanged: its name, layer and scale


class Placement(Protocol):
    """Computing a scale's attention not where its frames lie: on these units and heads, seen as a whole video.

    units: the units computed here, ascending; they attend to each other as if none lay between.
    heads: which of the scale's heads are computed here.
    attend: attention that sees more than what lies here (None: a kernel will do).
    """

    @property
    def units(self) -> range | tuple[int, ...]: ...

    @property
    def heads(self) -> slice: ...

    @property
    def attend(self) -> Attend | None: ...

    def enter(self, x_BUhd: Tensor) -> Tensor:
        """`[B, own units, ..., all heads, d] -> [B, these units, ..., these heads, d]`; differentiable."""
        ...

    def leave(self, x_BUhd: Tensor) -> Tensor:
        """The way back of `enter`."""
        ...


class PastContext(Protocol):
    """Where a run of units lies in its video, and how to get at what comes before it.

    first: the first unit of the run. grows: whether the past has another length at every call, so that it does not pay
    to compile for one.
    """

    @property
    def first(self) -> int: ...

    @property
    def grows(self) -> bool: ...

    def exchange(
        self, key: Key, x_BU: Tensor, before: Callable[[int], int], kept: int | None, every: int = 1
    ) -> Callable[[], Tensor | None]:
        """Hand on the own items and request earlier ones. Returns at once; its result waits for them (None: none).

        An item (of dimension 1) covers `every` units and belongs to whoever holds the last of them;
        `before(first)` is how many earlier items a run that starts at unit `first` needs; no later run ever
        needs more than `kept` of them (None: all may be needed). `key` names the tensor across calls.
        """
        ...

    def noise_levels(self, t_BUF: Tensor, kept: int | None) -> tuple[Tensor, int]:
        """Hand on the noise levels of the own units; levels of a run of units, and its first unit. No gradient.

        The run holds all units whose attention is computed here and all that they see: those before the own ones that
        were ever handed on, of which no later run needs more than the last `kept` (None: all may be needed).
        """
        ...

    def placement(self, scale: int) -> Placement | None:
        """Where the attention of this scale is computed, if not here."""
        ...


class WholeVideo:
    """Past context of a video that lies here from its first frame: nothing comes before it."""

    first = 0
    grows = False

    def exchange(self, *_: object, **__: object) -> Callable[[], Tensor | None]:
        return lambda: None

    def noise_levels(self, t_BUF: Tensor, kept: int | None) -> tuple[Tensor, int]:
        return t_BUF, 0

    def placement(self, scale: int) -> Placement | None:
        return None
