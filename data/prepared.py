"""A finished preparation: its manifest, tokenizer and records."""

import dataclasses
import functools
import json
import pathlib

import numpy as np

from batiste.data.record_reader import RecordReader
from batiste.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` made of a corpus.

    manifest: sources, counts per split, hashes, tokenizer and versions, as in manifest.json.
    """

    directory: pathlib.Path
    manifest: dict

    @property
    def fingerprint(self) -> str:
        """The hash of everything that decides the records."""
        return self.manifest["fingerprint"]

    @property
    def sequence_length(self) -> int:
        """T, the inputs of a record."""
        return self.manifest["config"]["sequence_length"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that encoded the records."""
        if self.manifest["tokenizer"]["name"] == "bytes":
            return ByteTokenizer()
        return SentencePieceTokenizer((self.directory / TOKENIZER_FILE).read_bytes())

    def num_records(self, split: str) -> int:
        """Returns the number of records of "train" or "validation"."""
        return self._split(split)["records"]

    def num_bytes(self, split: str) -> int:
        """Returns the bytes of text of "train" or "validation", which its targets stand for."""
        return self._split(split)["bytes"]

    def readers(self, split: str) -> list[RecordReader]:
        """Returns a reader of the records of each source, in the order of the config."""
        dtype = np.dtype(self.manifest["tokenizer"]["dtype"])
        return [RecordReader(self.directory, source["files"], self.sequence_length, dtype)
                for source in self._split(split)["sources"]]

    def _split(self, split: str) -> dict:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        return self.manifest[split]


def load_prepared(directory) -> Prepared:
    """Returns the preparation in `directory`; ValueError if it is not a finished, whole one."""
    directory = pathlib.Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory}: holds no finished preparation (no {MANIFEST}); "
                         "expected the directory that prepare returned")
    prepared = Prepared(directory, json.loads(path.read_text()))
    for file in prepared.manifest["files"]:
        stored = directory / file["name"]
        size = stored.stat().st_size if stored.is_file() else None
        if size != file["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise ValueError(f"{stored}: expected {file['bytes']} bytes, found {found}; "
                             f"delete {directory} and prepare again")
    return prepared
