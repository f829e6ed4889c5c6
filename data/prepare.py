"""Raw text to a finished directory of records: survey, tokenizer, packing, manifest."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import sys
from collections.abc import Iterator

from batiste.data.config import DataConfig
from batiste.data.corpus import HeldOut, Survey, survey
from batiste.data.encoder import Encoder, token_dtype
from batiste.data.file_hashes import hash_files, write_signed
from batiste.data.prepared import (
    MANIFEST, SPLITS, Prepared, load_prepared, problem,
)
from batiste.data.quarantine import Quarantine
from batiste.data.sources import Source, open_source
from batiste.data.tokenizer import (
    ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer)
from batiste.data.tokenizer_training import train

PIPELINE = 1  # Raise it whenever the same inputs would give other records.
UNFINISHED = ".preparing-"
# Text to learn a vocabulary from. On 2 busy cores bpe takes 4 s for the 12 MB of the standard
# library (3.91 bytes per token; 1.5 MB give 3.81), unigram 80 s, and 17 s for this much (3.35).
SAMPLE_BYTES = {"bpe": 32 << 20, "unigram": 3 << 19, "characters": 32 << 20}


def prepare(config: DataConfig, directory) -> Prepared:
    """Returns the records of `config` in `directory`/FINGERPRINT, made now or before.

    The same inputs have the same fingerprint and are read only to be hashed. A preparation that
    dies leaves nothing that looks finished; one that was damaged since is made again. Raises
    ValueError for input that cannot be used and OSError for a disk that cannot.
    """
    config.validate()
    directory = pathlib.Path(directory)
    sources = [open_source(source) for source in config.sources]
    hashes = [source.fingerprint() for source in sources]
    fingerprint = _fingerprint(config, hashes)
    target = directory / fingerprint[:12]
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):  # a second process waits here, then finds the work done
        for leftover in directory.glob(UNFINISHED + "*"):
            shutil.rmtree(leftover)
        if target.exists() and (damage := problem(target)):
            print(f"{damage}: preparing again", file=sys.stderr, flush=True)
            shutil.rmtree(target)
        if not target.exists():
            work = directory / (UNFINISHED + fingerprint[:12])
            try:
                work.mkdir()
                _prepare_in(work, config, sources, hashes, fingerprint)
                _sync_and_rename(work, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return load_prepared(target)


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as lock:  # released by the system if the process dies
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint(config: DataConfig, hashes: list[str]) -> str:
    """Hashes what decides the records: not the seed, nor a vocabulary size nobody reads."""
    learned = config.tokenizer in SAMPLE_BYTES
    existing = not learned and config.tokenizer != "bytes"
    decides = {
        "pipeline": PIPELINE,
        "sources": [(content, source.weight)
                    for content, source in zip(hashes, config.sources)],
        "validation_fraction": config.validation_fraction,
        "tokenizer": load_tokenizer(config.tokenizer).hash if existing else config.tokenizer,
        "vocab_size": config.vocab_size if learned else None,
        "sequence_length": config.sequence_length,
        "packing": config.packing,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _prepare_in(
    work: pathlib.Path, config: DataConfig, sources: list[Source], hashes: list[str],
    fingerprint: str,
) -> None:
    # Beside the work and not in it, because it must survive when it is the reason to stop.
    quarantine = Quarantine(work.with_name(f"quarantine-{fingerprint[:12]}.jsonl"))
    quarantine.path.unlink(missing_ok=True)
    held_out = HeldOut()
    surveys = _survey_all(config, sources, held_out, quarantine)
    tokenizer = _tokenizer(config, surveys)
    if tokenizer.model is not None:
        (work / tokenizer.file_name).write_bytes(tokenizer.model)
    stored = Encoder(config, tokenizer).write(work, sources, surveys)
    if quarantine.total:
        shutil.move(quarantine.path, work / "quarantine.jsonl")
    manifest = {
        "fingerprint": fingerprint,
        "config": dataclasses.asdict(config),
        "sources": [{"path": source.name, "hash": content,
                     "empty_documents": found.empty_documents}
                    for source, content, found in zip(sources, hashes, surveys)],
        "quarantined": quarantine.total,
        "tokenizer": {"kind": config.tokenizer, "name": tokenizer.name,
                      "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash,
                      "dtype": token_dtype(tokenizer).name},
        **{split: _totals(stored[split], config.sequence_length) for split in SPLITS},
        "files": hash_files(work),
        "versions": _versions(),
    }
    manifest["validation"] |= held_out.figures()
    write_signed(work / MANIFEST, manifest)


def _survey_all(
    config: DataConfig, sources: list[Source], held_out: HeldOut, quarantine: Quarantine,
) -> list[Survey]:
    weights = sum(source.weight for source in config.sources)
    surveys = []
    for source, described in zip(sources, config.sources):
        share = SAMPLE_BYTES.get(config.tokenizer, 0) * described.weight / weights
        found = survey(source, config.validation_fraction, int(share), held_out, quarantine)
        documents = sum(counts["documents"] for counts in found.counts.values())
        if not found.counts["train"]["documents"]:
            raise ValueError(f"{source.name}: {documents} documents with text, none of them for "
                             f"training at data.validation_fraction={config.validation_fraction}; "
                             "add documents")
        surveys.append(found)
    if not any(found.counts["validation"]["documents"] for found in surveys):
        documents = sum(found.counts["train"]["documents"] for found in surveys)
        raise ValueError(f"data.validation_fraction={config.validation_fraction} holds out none "
                         f"of {documents} documents; raise it or add documents")
    return surveys


def _tokenizer(config: DataConfig, surveys: list[Survey]) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer not in SAMPLE_BYTES:
        return load_tokenizer(config.tokenizer)
    texts = [text for found in surveys for text in found.sample.texts()]
    print(f"training a {config.tokenizer} tokenizer on {sum(map(len, texts)) / 1e6:.1f} M "
          f"characters of {len(texts)} documents", file=sys.stderr, flush=True)
    return SentencePieceTokenizer(train(config.tokenizer, config.vocab_size, texts))


def _totals(stored: list[dict], length: int) -> dict:
    totals = {key: sum(source[key] for source in stored)
              for key in ("documents", "bytes", "tokens", "records")}
    return totals | {
        "bytes_per_token": round(totals["bytes"] / totals["tokens"], 4),
        "fill": round(totals["tokens"] / (totals["records"] * length), 4),
        "sources": stored,
    }


def _versions() -> dict[str, str]:
    packages = ("numpy", "sentencepiece", "tensorflow-datasets", "array_record", "grain")
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages}


def _sync_and_rename(work: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `work` appear as `target`, whole or not at all, even if the power fails."""
    for path in (*work.rglob("*"), work):
        _sync(path)
    if target.exists():  # without a manifest: not made by us, or damaged
        shutil.rmtree(target)
    os.rename(work, target)
    _sync(target.parent)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
