"""A finished preparation: its manifest, tokenizer and records."""

import dataclasses
import functools
import json
import pathlib

import numpy as np

from batiste.data.file_hashes import Hashes, damage, read_signed
from batiste.data.huggingface_tokenizer import HuggingFaceTokenizer
from batiste.data.json_files import check_json, shown
from batiste.data.record_reader import RecordReader
from batiste.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
# Raise it whenever the same inputs would give other records, or records are stored otherwise.
PIPELINE = 2
# Records beyond this are not hashed at every start (a second for 4 GiB in the page cache): their
# format has hashes of its own, and of 60 flipped bytes none came through when they were read.
HASHED_BYTES = 8 << 30
RECORDS = ".array_record"
TOKENIZERS = {"sentencepiece": SentencePieceTokenizer, "huggingface": HuggingFaceTokenizer}
DTYPES = ("uint16", "int32")  # Of stored tokens.
# What is read of a manifest; see data/json_files.py for what the kinds mean.
SPLIT = {"records": int, "bytes": int, "sources": list[
    {"files": list[{"name": str, "bytes": int, "records": int}]}]}
KIND = {
    "fingerprint": str, "pipeline": int | None, "tokenizer": {"name": str, "dtype": str},
    "config": {"sequence_length": int, "sources": list[{"weight": float}]}, "train": SPLIT,
    "validation": SPLIT,
}


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
        name = self.manifest["tokenizer"]["name"]
        if name == "bytes":
            return ByteTokenizer()
        kind = TOKENIZERS[name]
        return kind((self.directory / kind.file_name).read_bytes())

    def num_records(self, split: str) -> int:
        """Returns the number of records of "train" or "validation"."""
        return self._split(split)["records"]

    def num_bytes(self, split: str) -> int:
        """Returns the bytes of text of "train" or "validation", which its targets stand for."""
        return self._split(split)["bytes"]

    def readers(self, split: str) -> list[RecordReader]:
        """Returns a reader of the records of each source, in the order of the config.

        Raises ValueError for records of another version, of which the tokenizer can still be used.
        """
        if self.manifest.get("pipeline") != PIPELINE:
            raise ValueError(f"{self.directory}: its records are of another version of batiste "
                             f"(pipeline {self.manifest.get('pipeline', 1)}, expected {PIPELINE}); "
                             "`batiste prepare` makes them again from the same text")
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
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory}: holds no finished preparation (no {MANIFEST}); "
                         "expected the directory that prepare returned")
    why = problem(directory)
    if why is not None:
        raise ValueError(f"{why}; `batiste prepare` makes it again from the same text")
    manifest = json.loads((directory / MANIFEST).read_bytes())
    check_json(manifest, KIND, str(directory / MANIFEST))
    name, dtype = manifest["tokenizer"]["name"], manifest["tokenizer"]["dtype"]
    for field, value, known in (("name", name, ("bytes", *TOKENIZERS)), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{directory / MANIFEST}: tokenizer.{field}={shown(value)}: expected "
                             f"one of {', '.join(known)}")
    return Prepared(directory, manifest)


def problem(directory: pathlib.Path) -> str | None:
    """What differs from what was prepared: the manifest, or the first file; None if nothing does."""
    path = directory / MANIFEST
    if not path.is_file():
        return f"{path} is missing"
    manifest = read_signed(path)
    if manifest is None:
        return f"{path} is damaged, or of another version of batiste"
    files: Hashes = manifest["files"]
    large = sum(size for size, _ in files.values()) > HASHED_BYTES
    return damage(directory, files, lambda name: not (large and RECORDS in name))
