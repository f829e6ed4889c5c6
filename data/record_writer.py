"""Records of T+1 tokens to disk, through a TFDS builder and without TensorFlow."""

import contextlib
import errno
import hashlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from batiste.data.record_reader import RecordReader

READ_AT_ONCE = 1024  # records


class TokenRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Records of T+1 tokens, in the order in which they were packed."""

    VERSION = tfds.core.Version("1.0.0")
    # No checksums to look up beside this file; in TFDS 4.9.10 the lookup needs a package that it
    # does not declare (importlib_resources).
    code_path = None

    def __init__(self, *, length: int, dtype: np.dtype, splits: dict, **kwargs):
        self._length, self._dtype, self._splits = length, dtype, splits
        self.written: dict[str, str] = {}
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        tokens = tfds.features.Tensor(
            shape=(self._length + 1,), dtype=self._dtype, encoding=tfds.features.Encoding.BYTES)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"tokens": tokens}),
            disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str):
        digest = hashlib.sha256()
        for index, record in enumerate(self._splits[split]):
            record = record.astype(self._dtype)  # In uint16, padding is 65,535.
            digest.update(record.tobytes())
            yield index, {"tokens": record}
        self.written[split] = digest.hexdigest()


def write_records(
    directory: pathlib.Path, length: int, dtype: np.dtype,
    splits: dict[str, Iterator[np.ndarray]],
) -> dict[str, dict]:
    """Writes the records of `length`+1 tokens of each split as ArrayRecord files.

    Returns for each split its files (name relative to `directory`, bytes, records), its number of
    records, and the hash of them all in order. OSError if the disk is full, or if what is read back
    is not what was written.
    """
    tfds.disable_progress_bar()  # ours shows bytes and the time left
    builder = TokenRecords(length=length, dtype=dtype, splits=splits, data_dir=directory)
    downloads = directory / "downloads"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it would announce a download
            builder.download_and_prepare(download_dir=downloads)
    except RuntimeError as error:  # how ArrayRecord reports a disk that is full or broken
        reason = " ".join(str(error).split())
        full = "No space left" in reason
        raise OSError(errno.ENOSPC if full else errno.EIO, f"cannot store records: {reason}",
                      str(directory)) from error
    shutil.rmtree(downloads, ignore_errors=True)
    return {split: _verified(directory, builder, split, length, dtype) for split in splits}


def _verified(directory, builder: TokenRecords, split: str, length: int, dtype) -> dict:
    info = builder.info.splits[split]
    files = [{"name": os.path.relpath(path, directory), "bytes": os.path.getsize(path),
              "records": records}
             for path, records in zip(info.filepaths, info.shard_lengths)]
    reader = RecordReader(directory, files, length, dtype)
    digest = hashlib.sha256()
    for start in range(0, len(reader), READ_AT_ONCE):
        indices = np.arange(start, min(start + READ_AT_ONCE, len(reader)))
        digest.update(reader.read(indices).astype(dtype).tobytes())
    if digest.hexdigest() != builder.written[split]:
        raise OSError(f"{directory}: the {split} records read back differ from those written")
    return {"files": files, "records": len(reader), "hash": digest.hexdigest()}
