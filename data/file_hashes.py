"""Sizes and hashes of the files of a directory, so that damage is found and named."""

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import xxhash

from batiste.data.json_files import check_json

HASHING_THREADS = 4  # xxh3 and reading let go of the interpreter; one core hashes 10 GB/s and more.
PIECE_BYTES = 4 * 2**20

Hashes = dict[str, list]


def hash_files(directory: pathlib.Path) -> Hashes:
    """[bytes, xxh3-128 in hex] of every file below a directory, by its path relative to it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(HASHING_THREADS) as threads:
        found = list(threads.map(_hash, paths))
    return {path.relative_to(directory).as_posix(): list(each)
            for path, each in zip(paths, found, strict=True)}


def write_signed(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a dict as JSON with a digest of itself, and waits until it is on the disk."""
    signed = value | {"digest": _digest(value)}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(signed, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_signed(path: pathlib.Path) -> dict[str, Any] | None:
    """What `write_signed` wrote, None if that is not what the file holds; FileNotFoundError."""
    try:
        value = json.loads(path.read_bytes())
        check_json(value, {"digest": str, "files": dict[str, list[int | str]]}, str(path))
    except (ValueError, RecursionError):
        return None
    whole = all([type(part) for part in each] == [int, str] for each in value["files"].values())
    return value if value.pop("digest") == _digest(value) and whole else None


def damage(
    directory: pathlib.Path, expected: Hashes, read: Callable[[str], bool] = lambda name: True
) -> str | None:
    """What is wrong with the first file that is not as `expected`, or None; sizes come first.

    read: whether to read and hash the file of this name too.
    """
    for name, (size, _) in expected.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size:,} bytes, expected {size:,}"
    names = [name for name in expected if read(name)]
    with concurrent.futures.ThreadPoolExecutor(HASHING_THREADS) as threads:
        found = threads.map(_hash, [directory / name for name in names])
        for name, (_, actual) in zip(names, found, strict=True):
            if actual != expected[name][1]:
                return (f"{directory / name} is not what was written (xxh3 {actual}, expected "
                        f"{expected[name][1]})")
    return None


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _hash(path: pathlib.Path) -> tuple[int, str]:
    digest, size = xxhash.xxh3_128(), 0
    piece = memoryview(bytearray(PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
    return size, digest.hexdigest()
