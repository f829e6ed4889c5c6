"""safetensors files, one tensor at a time: mapped to memory for reading, streamed for writing.

A file is the length of its header (8 bytes), the header (JSON: name, dtype, shape, place), then the
tensors' bytes. The library that defines the format writes a whole dictionary at once.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from batiste.data.json_files import check_json, parse_json, read_json, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16),
}
# Of tensors that no weight has: how many bytes an entry takes.
OTHER_DTYPES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
                "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
MOST_DIMS = 8
LONGEST_HEADER = 100_000_000  # The format's own bound.
LARGEST_INDEX = 64_000_000  # DeepSeek-V3's has 9 MB.
SHARD_BYTES = 5_000_000_000
HEADER_KIND = dict[str, dict]
ENTRY_KIND = {"dtype": str, "shape": list[int], "data_offsets": list[int]}


class Entry(NamedTuple):
    """Where a tensor lies: its file, dtype (None for one that no weight has), shape, first byte."""

    path: pathlib.Path
    dtype: np.dtype | None
    shape: tuple[int, ...]
    start: int


class Tensors:
    """The tensors of a model's directory, or of one file, by name.

    Every header is checked whole before the first byte of a tensor is used: the tensors lie one
    after another, from the end of the header to the end of the file, and each has the bytes of its
    shape. Raises ValueError for files that are missing, or are not what the format or the index says.
    """

    def __init__(self, source: pathlib.Path):
        self.entries: dict[str, Entry] = {}
        weight_map = _weight_map(source)
        for path in _files(source, weight_map):
            found = _entries(path)
            twice = sorted(found.keys() & self.entries.keys())
            if twice:
                raise ValueError(f"{path}: {shown(twice[0])} is in "
                                 f"{self.entries[twice[0]].path.name} too")
            self.entries |= found
        if weight_map is not None:
            _check_map(source, weight_map, self.entries)

    def read(self, name: str) -> np.ndarray:
        """A tensor as it lies in its file, mapped and not yet read."""
        entry = self.entries[name]
        if entry.dtype is None:
            raise ValueError(f"{entry.path}: {name} is no float: expected {', '.join(DTYPES)}")
        if not math.prod(entry.shape):
            return np.zeros(entry.shape, entry.dtype)
        return np.memmap(entry.path, entry.dtype, "r", entry.start, entry.shape)


def _weight_map(source: pathlib.Path) -> dict[str, str] | None:
    """The file of each tensor; None without an index, or where one file has all tensors.

    A single file counts more than an index beside it, as it does for `transformers`.
    """
    if source.is_file() or (source / SINGLE).is_file() or not (source / INDEX).is_file():
        return None
    index = read_json(source / INDEX, {"weight_map": dict[str, str]}, LARGEST_INDEX)
    for name, file in index["weight_map"].items():
        if pathlib.PurePath(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise ValueError(
                f"{source / INDEX}: weight_map: {shown(name)} is in {shown(file)}: expected the name "
                "of a .safetensors file in this directory")
    return index["weight_map"]


def _check_map(
    source: pathlib.Path, weight_map: Mapping[str, str], entries: Mapping[str, Entry]
) -> None:
    """Raises ValueError where an index and the files that it names tell of different tensors."""
    for name in sorted(weight_map.keys() | entries.keys()):
        said = weight_map.get(name, "no file")
        found = entries[name].path.name if name in entries else "no file"
        if said != found:
            raise ValueError(f"{source / INDEX}: weight_map: {shown(name)} is in {said}, "
                             f"but was found in {found}")


def _files(source: pathlib.Path, weight_map: Mapping[str, str] | None) -> list[pathlib.Path]:
    if source.is_file():
        return [source]
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:
        if not (source / name).is_file():
            raise ValueError(
                f"from={source}: {name} is missing; expected {SINGLE}, or {INDEX} and the "
                "files that it names"
            )
    return [source / name for name in names]


def _entries(path: pathlib.Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path}: not a safetensors file, or cut short")
        header = parse_json(file.read(length), f"{path}: the header", HEADER_KIND)
    header.pop("__metadata__", None)
    spans = {name: _span(f"{path}: {shown(name)[1:-1]}", found) for name, found in header.items()}
    _check_spans(path, spans, size - 8 - length)
    return {
        name: Entry(path, DTYPES.get(found["dtype"]), tuple(found["shape"]),
                    8 + length + spans[name][0])
        for name, found in header.items()
    }


def _span(where: str, found: dict[str, Any]) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last, as its dtype and shape want them."""
    check_json(found, ENTRY_KIND, where)
    kind, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    bytes_each = DTYPES[kind].itemsize if kind in DTYPES else OTHER_DTYPES.get(kind)
    if bytes_each is None:
        raise ValueError(f"{where} is of dtype {shown(kind)}, which is not known here")
    if len(shape) > MOST_DIMS or any(size < 0 for size in shape):
        raise ValueError(f"{where}: shape={shape[:MOST_DIMS]}: expected at most {MOST_DIMS} sizes, "
                         "none of them negative")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"{where}: data_offsets={offsets[:3]}: expected two numbers of bytes in "
                         "order")
    if offsets[1] - offsets[0] != math.prod(shape) * bytes_each:
        raise ValueError(f"{where}: damaged: it has {offsets[1] - offsets[0]} bytes, not those of "
                         f"{kind} {tuple(shape)}")
    return offsets[0], offsets[1]


def _check_spans(path: pathlib.Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Raises ValueError unless tensors follow each other without gaps, from first to last byte."""
    last = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if end > size:
            raise ValueError(f"{path}: cut short: {shown(name)} ends at byte {end:,} of {size:,}")
        if start != last:
            problem = "overlaps the tensor before it" if start < last else "follows a gap"
            raise ValueError(f"{path}: damaged: {shown(name)} at byte {start:,} {problem}, which "
                             f"ends at byte {last:,}")
        last = end
    if last != size:
        raise ValueError(f"{path}: damaged: {size - last:,} bytes after the last tensor")


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
