"""Layout planner: what every parallel layout of a scale would send and compute, and which costs least.

Pure functions of sizes. "halo": every rank computes its own units and is sent the past they need; "ulysses": all
units, a share of the heads; "ring": a dense scale's keys travel around. docs/parallelism.md draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from msc.parallel.context_parallel import required_transfers, shard_bounds
from msc.parallel.ring import zigzag_units

from .model.scales import Scale

ParallelLayout = Literal["halo", "ulysses", "ring"]
LayoutChoice = Literal["auto", "halo", "ulysses", "ring"]
# How much longer a ring's attention takes than another layout's: its parts are merged, and only torch's own flash
# attention computes such. Two H100, 65,536 tokens each, in 16 bits (docs/benchmarks.md); on a CPU it takes as long.
RING = 1.4


@dataclass(frozen=True)
class ClipShape:
    """What the layouts depend on of a clip and its model; grid is the full token grid (H, W)."""

    units: int
    frames_per_unit: int
    grid: tuple[int, int]
    head_width: int
    value_bytes: int = 2

    def unit_values(self, scale: Scale) -> int:
        """Numbers in one unit's queries, or keys, or values, at a scale."""
        return self.frames_per_unit * scale.tokens(self.grid) * scale.heads * self.head_width


@dataclass(frozen=True)
class Rates:
    """What a rank sends and computes in a second, and what an exchange that all ranks wait for takes besides its bytes:
    its start, and whoever comes last."""

    bytes_per_s: float
    flops_per_s: float
    wait_s: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Of one scale and layer: values that the busiest rank sends forward, FLOPs of the slowest rank forward, its
    seconds of a step (forward and backward) that it computes, and all of them, with what is not hidden behind that."""

    sent: int
    flops: int
    computing: float
    seconds: float


def halo_values(scale: Scale, edges: tuple[int, ...], unit_values: int) -> list[int]:
    """Values that each rank sends forward: keys and values of units, and of pooled groups, that later ranks need."""
    messages = required_transfers(edges, scale.fresh_before)
    messages += required_transfers(edges, scale.pooled_before, scale.time)
    sent = [0] * (len(edges) - 1)
    for source, _, first, end in messages:
        sent[source] += 2 * unit_values * (end - first)
    return sent


def ulysses_values(edges: tuple[int, ...], unit_values: int) -> list[int]:
    """Queries, keys and values of own units to the owners of the heads, and output of own heads back."""
    ranks, units = len(edges) - 1, edges[-1]
    return [unit_values * (3 * (b - a) * (ranks - 1) + units - (b - a)) // ranks for a, b in pairwise(edges)]


def ring_values(edges: tuple[int, ...], unit_values: int) -> tuple[list[int], list[int]]:
    """(queries, keys and values to their zig-zag places and output back; keys and values around the ring)."""
    held = [set(units) for units in zigzag_units(edges[-1], len(edges) - 1)]
    own = [set(range(a, b)) for a, b in pairwise(edges)]
    placed = [unit_values * (3 * len(mine - there) + len(there - mine)) for mine, there in zip(own, held, strict=True)]
    # every rank passes on all units but those of the next rank, whose keys have then been all around
    passed = [2 * unit_values * (edges[-1] - len(held[(rank + 1) % len(held)])) for rank in range(len(held))]
    return placed, passed


def estimates(scale: Scale, clip: ClipShape, ranks: int, rates: Rates) -> dict[ParallelLayout, Estimate]:
    """Every layout that can serve a scale. A backward pass computes and sends twice and once the forward's.

    Keys of the ring travel behind the ring's attention. Halos, pooled groups and Ulysses' exchanges are counted in
    full, those there and back (Ulysses, and the ring's zig-zag) also with what ranks wait for each other, each scale as
    if it were the only one; halos hide behind the placing of own queries and keys, which is not counted here.
    """
    edges, size = shard_bounds(clip.units, ranks), clip.unit_values(scale)
    work = 4 * clip.frames_per_unit**2 * scale.token_pairs(clip.grid) * scale.heads * clip.head_width  # FLOPs a block

    def compute(blocks: float) -> float:
        return 3 * blocks * work / rates.flops_per_s

    def travel(values: float, ways: float = 2) -> float:
        return ways * values * clip.value_bytes / rates.bytes_per_s

    def blocks_seen(units: Sequence[int]) -> int:
        return sum(scale.blocks_seen(unit, clip.grid) for unit in units)

    blocks = [blocks_seen(range(a, b)) for a, b in pairwise(edges)]
    sent, most = max(halo_values(scale, edges, size)), max(blocks)
    layouts: dict[ParallelLayout, Estimate] = {
        "halo": Estimate(sent, most * work, compute(most), compute(most) + travel(sent))
    }
    if scale.heads % ranks == 0:
        sent, computing = max(ulysses_values(edges, size)), compute(sum(blocks) / ranks)
        seconds = computing + travel(sent) + 4 * rates.wait_s
        layouts["ulysses"] = Estimate(sent, sum(blocks) * work // ranks, computing, seconds)
    if is_dense(scale):
        placed, passed = (max(values) for values in ring_values(edges, size))
        most = max(map(blocks_seen, zigzag_units(clip.units, ranks)))
        # backward: keys and values once more, their gradients in fp32
        around = travel(passed, 2 + 4 / clip.value_bytes)
        computing = RING * compute(most)
        seconds = travel(placed) + 4 * rates.wait_s + max(computing, around)
        layouts["ring"] = Estimate(placed + passed, most * work, computing, seconds)
    return layouts


def is_dense(scale: Scale) -> bool:
    return scale.time == 1 and scale.window is None and scale.top is None


def choose_layouts(
    scales: Sequence[Scale], clip: ClipShape, ranks: int, choice: LayoutChoice, rates: Rates
) -> tuple[ParallelLayout, ...]:
    """The layout of every scale: the cheapest where `choice` is "auto", else the one chosen.

    ValueError where that cannot be: Ulysses deals out whole heads; a ring serves dense scales (`time` 1, `window`
    and `top` null), and the others stay with halos.
    """
    check_layout(scales, ranks, choice)
    if choice == "ring":
        return tuple("ring" if is_dense(scale) else "halo" for scale in scales)
    if choice != "auto":
        return (choice,) * len(scales)
    layouts = [estimates(scale, clip, ranks, rates) for scale in scales]
    return tuple(min(costs.items(), key=lambda item: item[1].seconds)[0] for costs in layouts)


def check_layout(scales: Sequence[Scale], ranks: int, choice: LayoutChoice) -> None:
    if choice == "ring" and not any(map(is_dense, scales)):
        raise ValueError(
            "parallel.layout ring serves scales with time 1, window null and top null, and the model has none; use auto"
        )
    for index, scale in enumerate(scales):
        if choice == "ulysses" and scale.heads % ranks:
            raise ValueError(
                f"parallel.layout ulysses deals out whole heads: the {scale.heads} heads of scale {index} do not "
                f"divide by parallel.sp = {ranks}; use auto, halo, or another number of heads"
            )


def layout_table(
    scales: Sequence[Scale], clip: ClipShape, ranks: int, choice: LayoutChoice, rates: Rates
) -> list[tuple[str, str]]:
    """For people, of every scale: (its name, its layout and what each layout would take per layer and step)."""
    rows = []
    for index, layout in enumerate(choose_layouts(scales, clip, ranks, choice, rates)):
        scale = scales[index]
        costs = ", ".join(
            f"{name} {estimate.seconds * 1e3:.3g} ms, sends {estimate.sent * clip.value_bytes / 1e6:.3g} MB"
            for name, estimate in estimates(scale, clip, ranks, rates).items()
        )
        name = f"scale {index} ({scale.heads} × {scale.space}, {scale.time}, {scale.window or 'all'})"
        rows.append((name, f"{layout}  (per layer: {costs})"))
    return rows
