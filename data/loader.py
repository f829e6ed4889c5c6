"""The batch of a step, as a pure function of (seed, mixture, step)."""

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from batiste.data.objectives import Transform, next_tokens
from batiste.data.order import Order, position
from batiste.data.packing import PADDING, Batch
from batiste.data.prepared import Prepared

# Rows of the global batch: a slice, or their indices in ascending order; None for all.
Rows = slice | np.ndarray | None
PREFETCH_THREADS = 2
PREFETCH_BATCHES = 8


class Loader:
    """Reads batches of a prepared split by index.

    Training order: each source is shuffled anew in every epoch and repeated without end, and the
    sources alternate by their weights. Nothing is drawn from a stream, so any step costs the same,
    and processes that ask for different rows of a step get one global batch between them.

    split: "train" or "validation". batch_size: rows of the global batch. seed: of the order.
    transform: what becomes of a record; None leaves inputs and next tokens.
    Raises ValueError if the training records are fewer than one batch.
    """

    def __init__(
        self, prepared: Prepared, split: str, batch_size: int, seed: int,
        transform: Transform | None = None,
    ):
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
        self._transform = next_tokens(prepared.tokenizer) if transform is None else transform
        config = prepared.manifest["config"]
        own = split == "validation" and config["validation_sources"]
        weights = [source["weight"] for source in own or config["sources"]]
        pairs = [(reader, weight) for reader, weight in zip(prepared.readers(split), weights)
                 if len(reader)]
        self._readers = [reader for reader, _ in pairs]
        self._ends = np.cumsum([len(reader) for reader in self._readers])
        self._order = Order([len(reader) for reader in self._readers],
                            [weight for _, weight in pairs], seed)

    @property
    def num_batches(self) -> int:
        """The batches of one complete pass, the last perhaps padded."""
        return -(-self._records // self._batch_size)

    def batch(self, step: int, rows: Rows = None) -> Batch:
        """Returns the global batch of `step`, or only `rows` of it."""
        return self._batch_at(step * self._batch_size, rows, ())

    def records(
        self, start: int, count: int, skipped: Sequence[tuple[int, int]] = ()
    ) -> np.ndarray:
        """Returns the numbers of the `count` records that are read after the first `start`."""
        return self._order.records_at(position(np.arange(start, start + count), skipped))

    def iterate(
        self, start: int, rows: Rows = None, skipped: Sequence[tuple[int, int]] = ()
    ) -> Iterator[Batch]:
        """Returns the batches after the first `start` records without end, read ahead in threads.

        skipped: places [start, stop) of records that are left out of the order; those after them
        move up. `close()` on it stops the threads.
        """
        return _read_ahead(
            lambda number: self._batch_at(start + number * self._batch_size, rows, skipped),
            0, sys.maxsize)

    def _batch_at(self, start: int, rows: Rows, skipped: Sequence[tuple[int, int]]) -> Batch:
        """The global batch of the records after the first `start`, or only `rows` of it."""
        numbers = np.arange(start, start + self._batch_size)[_all_if_none(rows)]
        indices, epochs = self._order.drawn_at(position(numbers, skipped))
        return self._transform(self._read(indices), indices, epochs)

    def epoch_batches(self, rows: Rows = None) -> Iterator[Batch]:
        """Returns each record once, in the stored order; rows beyond the last have weight 0.

        What is random in them is that of epoch 0 in every pass.
        """
        return _read_ahead(lambda step: self._epoch_batch(step, rows), 0, self.num_batches)

    def _epoch_batch(self, step: int, rows: Rows) -> Batch:
        start = step * self._batch_size
        indices = np.arange(start, start + self._batch_size)[_all_if_none(rows)]
        real = indices < self._records
        records = np.full((len(indices), self._length + 1), PADDING, np.int32)
        records[real] = self._read(indices[real])
        return self._transform(records, indices, np.zeros_like(indices))

    def _read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the records at `indices`, which count through the sources one after another."""
        source_of = np.searchsorted(self._ends, indices, side="right")
        records = np.empty((len(indices), self._length + 1), np.int32)
        for source in np.unique(source_of):
            rows = source_of == source
            start = self._ends[source] - len(self._readers[source])
            records[rows] = self._readers[source].read(indices[rows] - start)
        return records


def _all_if_none(rows: Rows) -> slice | np.ndarray:
    return slice(None) if rows is None else rows


def _read_ahead(read, start: int, stop: int) -> Iterator[Batch]:
    import grain
    options = grain.ReadOptions(
        num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))
