"""safetensors files, one tensor at a time: mapped to memory for reading, streamed for writing.

A file is the length of its header (8 bytes), the header (JSON: name, dtype, shape, place), then the
tensors' bytes. The library that defines the format writes a whole dictionary at once.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16),
}
OTHER_DTYPES = ("F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3",
                "F8_E5M2")
LONGEST_HEADER = 100_000_000
SHARD_BYTES = 5_000_000_000


class Entry(NamedTuple):
    """Where a tensor lies: its file, dtype (None for one that no weight has), shape, first byte."""

    path: pathlib.Path
    dtype: np.dtype | None
    shape: tuple[int, ...]
    start: int


class Tensors:
    """The tensors of a model's directory, or of one file, by name.

    Raises ValueError for files that are missing, or are not what the format says.
    """

    def __init__(self, source: pathlib.Path):
        self.entries: dict[str, Entry] = {}
        for path in _files(source):
            self.entries |= _entries(path)

    def read(self, name: str) -> np.ndarray:
        """A tensor as it lies in its file, mapped and not yet read."""
        entry = self.entries[name]
        if not math.prod(entry.shape):
            return np.zeros(entry.shape, entry.dtype)
        return np.memmap(entry.path, entry.dtype, "r", entry.start, entry.shape)


def _files(source: pathlib.Path) -> list[pathlib.Path]:
    if source.is_file():
        return [source]
    index = source / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [source / name for name in names]
    else:
        paths = [source / SINGLE]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"from={source}: {path.name} is missing; expected {SINGLE}, or {INDEX} and the "
                "files that it names"
            )
    return paths


def _entries(path: pathlib.Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path}: not a safetensors file, or cut short")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path}: not a safetensors file: its header is no JSON") from None
    header.pop("__metadata__", None)
    return {name: _entry(path, size, 8 + length, name, found) for name, found in header.items()}


def _entry(path: pathlib.Path, size: int, data: int, name: str, found: dict[str, Any]) -> Entry:
    kind, shape, (start, end) = found["dtype"], tuple(found["shape"]), found["data_offsets"]
    dtype = DTYPES.get(kind)
    if dtype is None and kind not in OTHER_DTYPES:
        raise ValueError(f"{path}: {name} is of dtype {kind}, which is not known here")
    if data + end > size:
        raise ValueError(f"{path}: cut short: {name} ends at byte {data + end:,} of {size:,}")
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: damaged: {name} has {end - start} bytes, not those of {shape}")
    return Entry(path, dtype, shape, data + start)


class Planned(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    folder: pathlib.Path, planned: list[Planned], tensors: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors, in the order that is planned, to one file or, above shard_bytes, to several.

    `tensors` is asked for one after another; none is kept.
    """
    shards = list(_shards(planned, shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))
    ]
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for expected in shard:
                tensor = next(source)
                if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
                    raise ValueError(f"{expected.name}: got {tensor.dtype} {tensor.shape}, planned "
                                     f"{expected.dtype} {expected.shape}")
                file.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data)
    if len(shards) == 1:
        return
    weight_map = {each.name: name for name, shard in zip(names, shards) for each in shard}
    index = {"metadata": {"total_size": sum(each.bytes for each in planned)},
             "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(planned: list[Planned], limit: int) -> Iterator[list[Planned]]:
    shard, size = [], 0
    for each in planned:
        if shard and size + each.bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(each)
        size += each.bytes
    yield shard


def _header(shard: list[Planned]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for each in shard:
        header[each.name] = {"dtype": names[each.dtype], "shape": each.shape,
                             "data_offsets": [start, start + each.bytes]}
        start += each.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
