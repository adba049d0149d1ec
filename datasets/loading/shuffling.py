"""Shuffling: which clip comes when, as pure functions of a seed and a position in the run.

A run can start anywhere: whatever is cached of a permutation is derived again from the seed. Ranks, workers and
restarts only decide who reads which positions, never what is seen.
"""

import bisect
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

FEISTEL_ROUNDS = 8
MASK = (1 << 64) - 1
SLOTS = 1024  # positions after which the sets of a mixture have come exactly in proportion to their weights


def sample_at(position: int, samples: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
    """(epoch, sample) of the clip at `position` of a run over `samples` clips.

    Every epoch holds each sample once, in a permutation of its own. Constant time and no memory at any position: a
    keyed permutation (a Feistel network, repeated until its result is in range) instead of a shuffled list.
    """
    if samples < 1:
        raise ValueError(f"there are {samples} samples to choose from")
    if position < 0:
        raise ValueError(f"position is {position}, it must not be negative")
    epoch, sample = divmod(position, samples)
    if not shuffle:
        return epoch, sample
    half = max(4, -(-(samples - 1).bit_length() // 2))  # fewer bits would mix small ranges badly
    key = _mix(_mix(seed) ^ epoch)
    while True:
        left, right = sample >> half, sample & ((1 << half) - 1)
        for i in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix(right * FEISTEL_ROUNDS + i)) >> (64 - half))
        sample = left << half | right
        if sample < samples:
            return epoch, sample


def epoch_permutation(samples: int, seed: int, epoch: int) -> list[int]:
    return [sample_at(epoch * samples + i, samples, seed)[1] for i in range(samples)]


def derive_seed(seed: int, number: int) -> int:
    """Seed of the `number`-th of several permutations; the first has `seed` itself, as if it were alone."""
    return _mix(_mix(seed) ^ number) if number else seed


def positions_of_rank(clock: int, clips: int, rank: int, ranks: int) -> range:
    """Positions that `rank` reads of the batch of `clips` clips that begins at position `clock`."""
    if clips < 1 or ranks < 1 or clips % ranks:
        raise ValueError(f"{clips} clips per batch cannot be divided evenly over {ranks} data-parallel ranks")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}, there are {ranks}")
    share = clips // ranks
    return range(clock + rank * share, clock + (rank + 1) * share)


# --- several buckets, several sets -------------------------------------------------------------------------


class BucketSchedule:
    """(bucket, number of the batch within that bucket) of the batch at a step.

    Every epoch round holds `batches[b]` batches of each bucket b, in a permutation of its own. The last is cached.
    """

    def __init__(self, batches: Sequence[int], seed: int) -> None:
        self.batches, self.seed = tuple(batches), _mix(seed ^ 1)
        self._round, self._schedule = -1, list[tuple[int, int]]()

    def __call__(self, step: int) -> tuple[int, int]:
        number, place = divmod(step, sum(self.batches))
        if number != self._round:
            ends = list(accumulate(self.batches))
            following = [number * batches for batches in self.batches]
            self._round, self._schedule = number, []
            for slot in epoch_permutation(sum(self.batches), self.seed, number):
                bucket = bisect.bisect_right(ends, slot)
                self._schedule.append((bucket, following[bucket]))
                following[bucket] += 1
        return self._schedule[place]


def stream_at(position: int, slots: Sequence[int], seed: int) -> tuple[int, int]:
    """(stream, position in it) of the clip at `position` of a bucket. Every `sum(slots)` positions hold `slots[s]` of
    each stream s, in a permutation of their own.
    """
    if len(slots) == 1:
        return 0, position
    block, place = sample_at(position, sum(slots), _mix(seed ^ 2))
    ends = list(accumulate(slots))
    stream = bisect.bisect_right(ends, place)
    return stream, block * slots[stream] + place - (ends[stream] - slots[stream])


def apportion(shares: Sequence[Fraction], slots: int = SLOTS) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `slots`; largest remainders round up."""
    exact = [share / sum(shares) * slots for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: slots - sum(counts)]:
        counts[i] += 1
    return counts


class WindowShuffle:
    """(epoch, sample) by position, like `sample_at`, where only some shards are at hand.

    In every epoch the shards, of `counts` samples, come in a permutation of their own; samples are shuffled within each
    `window` consecutive shards. The permutations of two epochs are cached: positions of a mixture go back and forth
    over their border.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int) -> None:
        self.counts, self.window, self.seed = tuple(counts), window, seed
        self.first = [0, *accumulate(counts)]
        self.samples = self.first[-1]
        self._epochs: dict[int, tuple[list[int], list[int]]] = {}  # epoch -> shards, where each begins

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.samples)
        if epoch not in self._epochs:
            shards = epoch_permutation(len(self.counts), derive_seed(self.seed, 1), epoch)
            begins = [0, *accumulate(self.counts[shard] for shard in shards)]
            self._epochs = dict([*list(self._epochs.items())[-1:], (epoch, (shards, begins))])
        shards, begins = self._epochs[epoch]
        window = (bisect.bisect_right(begins, place) - 1) // self.window
        begin = begins[window * self.window]
        size = begins[min((window + 1) * self.window, len(shards))] - begin
        seed = derive_seed(self.seed, 2 + epoch * len(self.counts) + window)
        place = begin + sample_at(place - begin, size, seed)[1]
        shard = bisect.bisect_right(begins, place) - 1
        return epoch, self.first[shards[shard]] + place - begins[shard]


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every bit of the input changes half of the output's."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
