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
import unicodedata
from collections.abc import Iterator

from batiste.data.config import DataConfig
from batiste.data.corpus import HeldOut, OwnValidation, Survey, by_fraction, survey
from batiste.data.encoder import Encoder, token_dtype
from batiste.data.file_hashes import hash_files, write_signed
from batiste.data.prepared import (
    MANIFEST, PIPELINE, SPLITS, Prepared, load_prepared, problem,
)
from batiste.data.quarantine import Quarantine
from batiste.data.sources import Check, Source, open_source
from batiste.data.tokenizer import (
    ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer)
from batiste.data.tokenizer_training import train

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
    brought = _brought_tokenizer(config)
    check = _check_of(config, brought)
    sources, own = ([open_source(source, check) for source in given]
                    for given in (config.sources, config.validation_sources))
    hashes = {source: source.fingerprint() for source in (*sources, *own)}
    fingerprint = _fingerprint(config, brought, *(
        [hashes[source] for source in each] for each in (sources, own)))
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
                for source in (*sources, *own):
                    if (line := source.described()) is not None:
                        print(line, file=sys.stderr, flush=True)
                given = {"sources": sources, "validation_sources": own}
                _prepare_in(work, config, brought, given, hashes, fingerprint)
                _sync_and_rename(work, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return load_prepared(target)


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as lock:  # released by the system if the process dies
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _brought_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that is there before any text is read."""
    if config.tokenizer in SAMPLE_BYTES:
        return None
    return ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)


def _check_of(config: DataConfig, brought: Tokenizer | None) -> Check:
    """What becomes of a document: normalized, as it is, or set aside for the tokenizer's sake."""
    if config.normalize:
        return lambda text: (unicodedata.normalize("NFC", text), None)
    form = None if brought is None else brought.normal_form
    if form is None:
        return lambda text: (text, None)
    problem = (f"not in Unicode's {form}, in which alone the tokenizer gives text back: "
               "data.normalize=True brings it into that")
    return lambda text: (text, None) if unicodedata.is_normalized(form, text) else ("", problem)


def _fingerprint(
    config: DataConfig, brought: Tokenizer | None, hashes: list[str], own_hashes: list[str],
) -> str:
    """Hashes what decides the records: not the seed, nor a vocabulary size nobody reads."""
    learned = config.tokenizer in SAMPLE_BYTES
    decides = {
        "pipeline": PIPELINE,
        "sources": [(content, source.weight)
                    for content, source in zip(hashes, config.sources)],
        "validation": own_hashes or config.validation_fraction,
        "normalize": config.normalize,
        "tokenizer": config.tokenizer if brought is None else brought.hash,
        "vocab_size": config.vocab_size if learned else None,
        "sequence_length": config.sequence_length,
        "packing": config.packing,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _prepare_in(
    work: pathlib.Path, config: DataConfig, brought: Tokenizer | None,
    sources: dict[str, list[Source]], hashes: dict[Source, str], fingerprint: str,
) -> None:
    # Beside the work and not in it, because it must survive when it is the reason to stop.
    quarantine = Quarantine(work.with_name(f"quarantine-{fingerprint[:12]}.jsonl"))
    quarantine.path.unlink(missing_ok=True)
    held_out = HeldOut()
    surveys = _survey_all(config, sources, held_out, quarantine)
    tokenizer = _learned(config, surveys["train"]) if brought is None else brought
    if tokenizer.model is not None:
        (work / tokenizer.file_name).write_bytes(tokenizer.model)
    stored = Encoder(config, tokenizer).write(work, surveys)
    if quarantine.total:
        shutil.move(quarantine.path, work / "quarantine.jsonl")
    own = surveys["validation"] if sources["validation_sources"] else []
    manifest = {
        "fingerprint": fingerprint,
        "pipeline": PIPELINE,
        "config": dataclasses.asdict(config),
        "sources": _described(surveys["train"], hashes),
        "validation_sources": _described(own, hashes),
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


def _described(surveys: list[Survey], hashes: dict[Source, str]) -> list[dict]:
    return [{"path": found.source.name, "hash": hashes[found.source],
             "empty_documents": found.empty_documents, "also_in_validation": found.left_out}
            for found in surveys]


def _survey_all(
    config: DataConfig, sources: dict[str, list[Source]], held_out: HeldOut,
    quarantine: Quarantine,
) -> dict[str, list[Survey]]:
    """Reads every source once; returns for each split its sources and what was found in them."""
    weights = sum(source.weight for source in config.sources)
    own, rules = [], OwnValidation()
    for source in sources["validation_sources"]:  # All of these before the others.
        own.append(survey(source, rules.validation, 0, held_out, quarantine))
        if not own[-1].counts["validation"]["documents"]:
            raise ValueError(f"data.validation_sources {source.name}: no documents with text; add "
                             "some, or leave the source out")
    rule = rules.train if own else by_fraction(config.validation_fraction)
    surveys = []
    for source, described in zip(sources["sources"], config.sources):
        share = SAMPLE_BYTES.get(config.tokenizer, 0) * described.weight / weights
        found = survey(source, rule, int(share), held_out, quarantine)
        documents = sum(counts["documents"] for counts in found.counts.values()) + found.left_out
        if found.left_out:
            print(f"{source.name}: {found.left_out} of {documents} documents are in "
                  "data.validation_sources, too, and are not trained on", file=sys.stderr, flush=True)
        if not found.counts["train"]["documents"]:
            why = "all of them in data.validation_sources, too" if own else (
                f"none of them for training at data.validation_fraction={config.validation_fraction}")
            raise ValueError(f"{source.name}: {documents} documents with text, {why}; add documents")
        surveys.append(found)
    if not own and not any(found.counts["validation"]["documents"] for found in surveys):
        documents = sum(found.counts["train"]["documents"] for found in surveys)
        raise ValueError(f"data.validation_fraction={config.validation_fraction} holds out none "
                         f"of {documents} documents; raise it or add documents")
    return {"train": surveys, "validation": own or surveys}


def _learned(config: DataConfig, surveys: list[Survey]) -> Tokenizer:
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
