"""Which record comes when: a pure function of (seed, mixture, position)."""

import functools
from collections.abc import Sequence

import numpy as np

# Weights are kept to this fraction of their sum, far below the 0.1 % that is promised; positions
# times this fit int64 for 10^14 records.
WEIGHT_STEPS = 1 << 16


class Order:
    """The endless order of the records of several sources.

    Every source is reshuffled in each of its epochs, by a bijection that is evaluated for the
    wanted indices alone, and the sources alternate by their weights. So any position costs the
    same, and nothing has to be remembered.

    sizes: records of each source; they are numbered through, one source after another.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        total = sum(weights)
        self._sizes, self._seed = sizes, seed
        self._shares = [max(1, round(WEIGHT_STEPS * weight / total)) for weight in weights]
        self._keys = functools.lru_cache(maxsize=256)(self._keys_of)

    def records_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns the records [N] at `positions` [N], which count from 0 without end."""
        return self.drawn_at(positions)[0]

    def drawn_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns these records, and in which epoch of its source each of them is drawn."""
        records, in_epoch = np.empty((2, len(positions)), np.int64)
        start = 0
        for source, (rows, drawn) in enumerate(self._draw(positions)):
            epochs, indices = np.divmod(drawn, self._sizes[source])
            in_epoch[rows] = epochs
            for epoch in np.unique(epochs):
                now = epochs == epoch
                keys = self._keys(source, int(epoch))
                records[rows[now]] = start + permute(indices[now], self._sizes[source], keys)
            start += self._sizes[source]
        return records, in_epoch

    def _keys_of(self, source: int, epoch: int) -> np.ndarray:
        return np.random.SeedSequence((self._seed, source, epoch)).generate_state(4, np.uint64)

    def _draw(self, positions: np.ndarray):
        """Yields for each source its rows of `positions`, and how many it gave before each.

        Source by source: of k positions, `k * rest // left` go to the sources after it, the others
        to it. Grain's mixture does the same, but rounds weights to a hundredth of the smallest,
        which makes 1 : 1 out of 1 : 1.009.
        """
        rows, before = np.arange(len(positions)), np.asarray(positions, np.int64)
        left = sum(self._shares)
        for share in self._shares:
            rest = left - share
            rest_before, rest_after = before * rest // left, (before + 1) * rest // left
            mine = rest_before == rest_after
            yield rows[mine], (before - rest_before)[mine]
            rows, before, left = rows[~mine], rest_before[~mine], rest


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Returns where a random permutation of range(size) takes `indices`.

    An alternating Feistel network over the bits of size-1, repeated for what falls outside (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): it is a bijection by construction.
    keys: one uint64 per round. Grain's `index_shuffle` is the same idea, but walks through at least
    2^16 indices: 1.6 ms per index for 12 records and 3.4 us for 11,687, against 12 and 1.6 here.
    """
    bits = max(int(size - 1).bit_length(), 2)
    low = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    values = indices.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        high, right = values[outside] >> low, values[outside] & low_mask
        for first, second in keys.reshape(-1, 2):
            high = high ^ (_mix(right + first) & high_mask)
            right = right ^ (_mix(high + second) & low_mask)
        values[outside] = (high << low) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatters 64 bits (the finalizer of SplitMix64, Steele et al. 2014); overflow is meant."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def position(number: np.ndarray | int, skipped: Sequence[tuple[int, int]]) -> np.ndarray:
    """The places in the order of the records that are read as the numbers `number`, all from 0.

    skipped: places [start, stop) that are never read; everything after them moves up.
    """
    places, reached = np.asarray(number, np.int64), 0
    for start, stop in sorted(skipped):
        start = max(start, reached)
        if stop > start:
            places = np.where(places >= start, places + stop - start, places)
            reached = stop
    return places
