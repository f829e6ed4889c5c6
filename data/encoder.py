"""Documents to stored records: encoded, packed and counted on the way."""

import pathlib
from collections.abc import Iterator

import numpy as np

from batiste.data import packing
from batiste.data.config import DataConfig
from batiste.data.corpus import Survey, documents_of
from batiste.data.prepared import SPLITS
from batiste.data.progress import Progress
from batiste.data.tokenizer import Tokenizer

ENCODE_BYTES = 1 << 20  # text encoded at a time
PACK = {"concatenate": packing.concatenate, "first_fit": packing.first_fit}


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the type that records store tokens in, and padding as its -1."""
    return np.dtype(np.uint16 if tokenizer.vocab_size < 1 << 16 else np.int32)


class Encoder:
    """Encodes and packs every split of every source, counting tokens on the way."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self._tokens: dict[str, int] = {}

    def write(
        self, directory: pathlib.Path, surveys: dict[str, list[Survey]],
    ) -> dict[str, list[dict]]:
        """Stores everything; returns for each split what there is of each of its sources: documents,
        bytes, tokens, records, files and a hash. ValueError if a source has changed since."""
        from batiste.data.record_writer import write_records
        records = {
            f"{split}_{index}": self._records(found, split, f"{split}_{index}")
            for split in SPLITS for index, found in enumerate(surveys[split])
            if found.counts[split]["documents"]}
        written = write_records(
            directory, self._config.sequence_length, token_dtype(self._tokenizer), records)
        nothing = {"files": [], "records": 0, "hash": None}
        return {split: [
            found.counts[split] | {"tokens": self._tokens.get(f"{split}_{index}", 0)}
            | written.get(f"{split}_{index}", nothing)
            for index, found in enumerate(surveys[split])] for split in SPLITS}

    def _records(self, found: Survey, split: str, name: str) -> Iterator[np.ndarray]:
        """Returns the records of one split of one source."""
        pack = PACK[self._config.packing]
        documents = self._encoded(found, split, name)
        return pack(documents, self._config.sequence_length, self._tokenizer)

    def _encoded(self, found: Survey, split: str, name: str) -> Iterator[np.ndarray]:
        seen, counts, source = {"documents": 0, "bytes": 0}, found.counts[split], found.source
        self._tokens[name] = 0
        documents = documents_of(source, split, found.rule)
        with Progress(f"encoding {split} of {source.name}", counts["bytes"]) as progress:
            for texts, size in _grouped(documents):
                for ids in self._tokenizer.encode_batch(texts):
                    self._tokens[name] += 1 + len(ids)  # with its end
                    yield np.array(ids, np.int32)
                seen["documents"] += len(texts)
                seen["bytes"] += size
                progress.update(size)
        if seen != counts:
            raise ValueError(f"{source.name}: changed while it was being read (first {counts}, "
                             f"then {seen}); prepare again")


def _grouped(documents: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """Yields documents in groups of about ENCODE_BYTES, with the bytes of each group."""
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text.encode())
        if size >= ENCODE_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size
