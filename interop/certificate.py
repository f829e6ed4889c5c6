"""What an exported model answers to a few fixed tokens, so that its files can be held to it."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from batiste.data import damage, hash_files
from batiste.data.json_files import read_json

CERTIFICATE = "certificate.json"
ROWS, LENGTH, ENTRIES = 2, 16, 8
# What a certificate holds; see data/json_files.py for what the kinds mean.
KIND = {
    "tolerance": float, "files": dict[str, list[int | str]],
    "fingerprint": {"tokens": list[list[int]], "entries": list[int],
                    "logits": list[list[list[float]]], "log_sum_exp": list[list[float]]},
}
TOLERANCE = 1e-4  # Of float32 logits, relative to the largest: another mesh adds up otherwise.
LOGITS = ("logits", "log_sum_exp")


def probe(vocab_size: int, max_length: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of two rows, and of so many classes those of which logits are kept; always the same."""
    random = np.random.default_rng(0)
    shape = (ROWS, min(LENGTH, max_length))
    tokens_BT = random.integers(0, vocab_size, shape).astype(np.int32)
    entries = np.sort(random.choice(classes, min(ENTRIES, classes), replace=False))
    return tokens_BT, entries


def fingerprint(
    logits_of: Callable[[np.ndarray], np.ndarray], vocab_size: int, max_length: int, classes: int
) -> dict[str, Any]:
    """Tokens, and of the logits at each of them a few and the logarithm of the sum of all.

    logits_of: float32 logits of tokens_BT, of so many classes each: of the vocabulary, or of a
    discriminator's two.
    """
    tokens_BT, entries = probe(vocab_size, max_length, classes)
    logits_BTV = np.asarray(logits_of(tokens_BT), np.float64)
    peak_BT1 = logits_BTV.max(axis=-1, keepdims=True)
    normalizer_BT = np.log(np.exp(logits_BTV - peak_BT1).sum(axis=-1)) + peak_BT1[..., 0]
    return {
        "tokens": tokens_BT.tolist(), "entries": entries.tolist(),
        "logits": logits_BTV[:, :, entries].tolist(), "log_sum_exp": normalizer_BT.tolist(),
        "likeliest": logits_BTV.argmax(axis=-1).tolist(),
    }


def write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes the certificate of a directory: the fingerprint, and every file's size and hash."""
    certificate = {"fingerprint": found, "tolerance": TOLERANCE, "files": hash_files(folder)}
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=1) + "\n")


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The certificate of a directory, of which every file is what was written, or ValueError."""
    path = folder / CERTIFICATE
    if not path.is_file():
        raise ValueError(f"verify={folder}: no {CERTIFICATE} there; expected what `batiste export` "
                         "wrote")
    certificate = read_json(path, KIND)
    problem = damage(folder, certificate["files"])
    if problem is not None:
        raise ValueError(f"verify={folder}: {problem}")
    return certificate


def check(certificate: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest difference of logits, relative to the largest; ValueError above the tolerance."""
    expected = certificate["fingerprint"]
    same = all(found[name] == expected[name] for name in ("tokens", "entries"))
    if not same or any(_sizes(found[name]) != _sizes(expected[name]) for name in LOGITS):
        raise ValueError(f"{CERTIFICATE} is of another vocabulary, or another version of batiste")
    largest = np.abs(expected["log_sum_exp"]).max()
    error = max(
        float(np.abs(np.subtract(found[name], expected[name])).max())
        for name in LOGITS
    ) / max(float(largest), float(np.abs(expected["logits"]).max()))
    if not error <= certificate["tolerance"]:
        raise ValueError(
            f"the logits differ by {error:.1e} of the largest from {CERTIFICATE}, which allows "
            f"{certificate['tolerance']:.0e}: these are not the weights that were exported"
        )
    return error


def _sizes(values: Any) -> Any:
    """The length of each list inside a list, which need not be alike."""
    return [_sizes(value) for value in values] if isinstance(values, list) else ()
