"""Which clip comes when: pure functions of a seed and a position in the run.

A run can begin anywhere: what is kept of an order, if anything, is made anew from the seed. Ranks, workers and
restarts only choose who reads which positions; none of them changes what is seen.
"""

import bisect
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

ROUNDS = 8
MASK = (1 << 64) - 1
SLOTS = 1024  # positions after which sets of a mixture have come exactly as often as their weights say


def sample_at(position: int, samples: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
    """(epoch, sample) of the clip at `position` of a run over `samples` clips.

    Every epoch holds each sample once, in an order of its own. It costs the same at any position and takes
    no memory: a keyed permutation (a Feistel network, walked until inside the range), not a shuffled list.
    """
    if samples < 1:
        raise ValueError(f"there are {samples} samples to choose from")
    if position < 0:
        raise ValueError(f"position is {position}, it must not be negative")
    epoch, sample = divmod(position, samples)
    if not shuffle:
        return epoch, sample
    half = max(4, -(-(samples - 1).bit_length() // 2))  # small ranges would mix badly in fewer bits
    key = _mix(_mix(seed) ^ epoch)
    while True:
        left, right = sample >> half, sample & ((1 << half) - 1)
        for round_ in range(ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix(right * ROUNDS + round_)) >> (64 - half))
        sample = left << half | right
        if sample < samples:
            return epoch, sample


def epoch_permutation(samples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `samples` clips that is seen in `epoch`."""
    return [sample_at(epoch * samples + i, samples, seed)[1] for i in range(samples)]


def derive_seed(seed: int, number: int) -> int:
    """Seed of the `number`-th of several orders; the first has the seed itself, as if it were alone."""
    return _mix(_mix(seed) ^ number) if number else seed


def positions_of_rank(clock: int, clips: int, rank: int, ranks: int) -> range:
    """Positions read by `rank` of the batch of `clips` clips that begins at position `clock`."""
    if clips < 1 or ranks < 1 or clips % ranks:
        raise ValueError(f"{clips} clips per batch cannot be divided evenly over {ranks} data-parallel ranks")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}, there are {ranks}")
    share = clips // ranks
    return range(clock + rank * share, clock + (rank + 1) * share)


# --- several buckets, several sets -------------------------------------------------------------------------


class BucketSchedule:
    """Whose turn it is: (bucket, number of the batch among all of that bucket) of the batch at a step.

    A round holds `batches[b]` batches of each bucket b, in an order of its own. The round last asked for is kept.
    """

    def __init__(self, batches: Sequence[int], seed: int) -> None:
        self.batches, self.seed = tuple(batches), _mix(seed ^ 1)
        self._round = -1

    def __call__(self, step: int) -> tuple[int, int]:
        length = sum(self.batches)
        round_, place = divmod(step, length)
        if round_ != self._round:
            ends = list(accumulate(self.batches))
            turns = [bisect.bisect_right(ends, slot) for slot in epoch_permutation(length, self.seed, round_)]
            next_ = [round_ * batches for batches in self.batches]
            self._turns = []
            for bucket in turns:
                self._turns.append((bucket, next_[bucket]))
                next_[bucket] += 1
            self._round = round_
        return self._turns[place]


def stream_at(position: int, slots: Sequence[int], seed: int) -> tuple[int, int]:
    """(set, position in it) of the clip at `position` of a bucket that several sets share.

    Every `sum(slots)` positions hold `slots[s]` of each set s, in an order of their own.
    """
    if len(slots) == 1:
        return 0, position
    block, place = sample_at(position, sum(slots), _mix(seed ^ 2))
    ends = list(accumulate(slots))
    found = bisect.bisect_right(ends, place)
    return found, block * slots[found] + place - (ends[found] - slots[found])


def apportion(shares: Sequence[Fraction], slots: int = SLOTS) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `slots`; largest remainders round up."""
    exact = [share / sum(shares) * slots for share in shares]
    found = [int(x) for x in exact]
    left = sorted(range(len(shares)), key=lambda i: (found[i] - exact[i], i))
    for i in left[: slots - sum(found)]:
        found[i] += 1
    return found


class WindowShuffle:
    """The order where only some shards are at hand: (epoch, sample) by position, as `sample_at`.

    In every epoch the shards, of `counts` samples, come in an order of their own; the samples are shuffled within
    each `window` shards that follow each other. Two orders of shards are kept, of the epochs last begun: positions of a
    mixture go back and forth over the border of two.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int) -> None:
        self.counts, self.window, self.seed = tuple(counts), window, seed
        self.first = [0, *accumulate(counts)]
        self.samples = self.first[-1]
        self._kept: dict[int, tuple[list[int], list[int]]] = {}  # of an epoch: its shards, where each begins

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.samples)
        if epoch not in self._kept:
            shards = epoch_permutation(len(self.counts), derive_seed(self.seed, 1), epoch)
            begins = [0, *accumulate(self.counts[shard] for shard in shards)]
            self._kept = dict([*list(self._kept.items())[-1:], (epoch, (shards, begins))])
        shards, begins = self._kept[epoch]
        window = (bisect.bisect_right(begins, place) - 1) // self.window
        begin = begins[window * self.window]
        inside = begins[min((window + 1) * self.window, len(shards))] - begin
        seed = derive_seed(self.seed, 2 + epoch * len(self.counts) + window)
        place = begin + sample_at(place - begin, inside, seed)[1]
        shard = bisect.bisect_right(begins, place) - 1
        return epoch, self.first[shards[shard]] + place - begins[shard]


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every bit of the input changes half of the output's."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
