"""Records of T+1 tokens from disk, by index."""

import pathlib
from collections.abc import Sequence

import numpy as np

from batiste.data.packing import PADDING


class RecordReader:
    """Reads records from ArrayRecord files as rows of one array.

    files: name relative to `directory`, and number of records, of each. Safe to use from several
    threads.
    """

    def __init__(
        self, directory: pathlib.Path, files: Sequence[dict], length: int, dtype: np.dtype,
    ):
        from array_record.python.array_record_module import ArrayRecordReader
        # No readahead: the order is random.
        options = "readahead_buffer_size:0,max_parallelism:0"
        self._readers = [ArrayRecordReader(str(directory / file["name"]), options)
                         for file in files]
        self._ends = np.cumsum([file["records"] for file in files])
        self._length, self._dtype = length, dtype

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the records [N, T+1] at `indices` [N], int32, padding as PADDING."""
        stored = self._stored(indices)
        records = stored.astype(np.int32)
        records[stored == np.array(PADDING).astype(self._dtype)] = PADDING
        return records

    def _stored(self, indices: np.ndarray) -> np.ndarray:
        records = np.empty((len(indices), self._length + 1), self._dtype)
        file_of = np.searchsorted(self._ends, indices, side="right")
        for file in np.unique(file_of):
            rows = np.flatnonzero(file_of == file)
            start = self._ends[file - 1] if file else 0
            messages = self._readers[file].read((indices[rows] - start).tolist())
            records[rows] = self._tokens(messages)
        return records

    def _tokens(self, messages: list[bytes]) -> np.ndarray:
        # A record is a serialized tf.train.Example with one feature of one fixed-length value,
        # which protobuf puts last. Taking it from there is 20 times faster than parsing; the
        # writer's check that what it reads back is what it wrote covers this shortcut.
        rows = np.frombuffer(b"".join(messages), np.uint8).reshape(len(messages), -1)
        payload = (self._length + 1) * self._dtype.itemsize
        return np.ascontiguousarray(rows[:, -payload:]).view(self._dtype)
