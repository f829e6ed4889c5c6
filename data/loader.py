"""The batch of a step, as a pure function of (seed, mixture, step)."""

import collections
import concurrent.futures
import itertools
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from batiste.data.packing import Batch, unpack
from batiste.data.prepared import Prepared

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 8
WEIGHT_STEPS = 1 << 20  # weights are rounded to this fraction, far below the 0.1 % that is promised


class Loader:
    """Reads batches of a prepared split by index.

    Training order: each source is shuffled anew in every epoch and repeated without end, and the
    sources alternate by their weights. Nothing is drawn from a stream, so any step costs the same,
    and processes that ask for different rows of a step get one global batch between them.

    split: "train" or "validation". batch_size: rows of the global batch. seed: of the order.
    Raises ValueError if the training records are fewer than one batch.
    """

    def __init__(self, prepared: Prepared, split: str, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed}: expected at least 0")
        self._records = prepared.num_records(split)
        self._length = prepared.sequence_length
        if split == "train" and self._records < batch_size:
            raise ValueError(
                f"the train split has {self._records} records of {self._length} tokens, fewer than "
                f"one batch of {batch_size}; lower the batch size or data.sequence_length, "
                "or add text")
        self._batch_size = batch_size
        self._bos_id, self._pad_id = prepared.tokenizer.bos_id, prepared.tokenizer.pad_id
        weights = [source["weight"] for source in prepared.manifest["config"]["sources"]]
        pairs = [(reader, weight) for reader, weight in zip(prepared.readers(split), weights)
                 if len(reader)]
        self._readers = [reader for reader, _ in pairs]
        self._ends = np.cumsum([len(reader) for reader in self._readers])
        self._order = _order([len(reader) for reader in self._readers],
                             [weight for _, weight in pairs], seed)

    @property
    def num_batches(self) -> int:
        """The batches of one complete pass, the last perhaps padded."""
        return -(-self._records // self._batch_size)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the global batch of `step`, or only `rows` of it."""
        start = step * self._batch_size
        indices = range(start, start + self._batch_size)[rows or slice(None)]
        return self._unpack(self._read(np.array([self._order[index] for index in indices], int)))

    def iterate(self, start_step: int, rows: slice | None = None) -> Iterator[Batch]:
        """Yields the batches from `start_step` on without end, read ahead in threads.

        It is a generator: its `close()` stops the threads.
        """
        return self._ahead(lambda step: self.batch(step, rows), itertools.count(start_step))

    def epoch_batches(self, rows: slice | None = None) -> Iterator[Batch]:
        """Yields each record once, in the stored order; rows beyond the last have weight 0."""
        return self._ahead(lambda step: self._epoch_batch(step, rows), range(self.num_batches))

    def _epoch_batch(self, step: int, rows: slice | None) -> Batch:
        start = step * self._batch_size
        indices = np.arange(start, start + self._batch_size)[rows or slice(None)]
        real = indices < self._records
        records = np.full((len(indices), self._length + 1), self._pad_id, np.int32)
        records[real] = self._read(indices[real])
        return self._unpack(records)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the records at `indices`, which count through the sources one after another."""
        source_of = np.searchsorted(self._ends, indices, side="right")
        records = np.empty((len(indices), self._length + 1), np.int32)
        for source in np.unique(source_of):
            rows = source_of == source
            start = self._ends[source] - len(self._readers[source])
            records[rows] = self._readers[source].read(indices[rows] - start)
        return records

    def _unpack(self, records: np.ndarray) -> Batch:
        return unpack(records, self._bos_id, self._pad_id)

    @staticmethod
    def _ahead(read, steps) -> Iterator[Batch]:
        steps = iter(steps)
        with concurrent.futures.ThreadPoolExecutor(PREFETCH_THREADS) as threads:
            waiting = collections.deque(
                threads.submit(read, step) for step in itertools.islice(steps, PREFETCH_BATCHES))
            try:
                while waiting:
                    batch = waiting.popleft().result()
                    waiting.extend(threads.submit(read, step)
                                   for step in itertools.islice(steps, 1))
                    yield batch
            finally:
                threads.shutdown(wait=True, cancel_futures=True)


def _order(sizes: Sequence[int], weights: Sequence[float], seed: int):
    """Returns a Grain data set whose element k is the index of record k of the training order."""
    import grain
    # Grain shuffles epoch e with seed + e, so neighbouring seeds, and sources, would share orders.
    seeds = [int(np.random.SeedSequence((seed, source)).generate_state(1)[0])
             for source in range(len(sizes))]
    starts = np.cumsum([0, *sizes])
    shuffled = [
        grain.MapDataset.range(int(start), int(start) + size).shuffle(seed=source_seed).repeat()
        for start, size, source_seed in zip(starts, sizes, seeds)]
    return grain.MapDataset.select_from_datasets(shuffled, _Mixture(weights))


class _Mixture:
    """Grain's selection map with weights kept to a millionth.

    `MapDataset.mix` rounds them to the hundredth of the smallest: 1 : 1.009 becomes 1 : 1.
    """

    def __init__(self, weights: Sequence[float]):
        total = sum(weights)
        self._shares = [max(1, round(WEIGHT_STEPS * weight / total)) for weight in weights]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Returns the source of element `index`, and how many that source gave before it.

        Source by source: of the first k elements left over, the source has k minus what the rest
        have, and `rest / left` of them, rounded down, are the rest's.
        """
        left, before, after = sum(self._shares), index, index + 1
        for source, share in enumerate(self._shares):
            rest = left - share
            rest_before, rest_after = before * rest // left, after * rest // left
            if rest_before == rest_after:
                return source, before - rest_before
            left, before, after = rest, rest_before, rest_after
        raise IndexError(index)
