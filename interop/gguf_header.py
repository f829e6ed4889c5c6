"""The header of a GGUF file: metadata and where tensors lie, each number checked before it is used.

Lengths and counts are whatever the file says, up to 2^64: none is trusted beyond the bytes that are
there (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; version 2 and 3, little-endian).
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from batiste.data.json_files import shown

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), "general.alignment"
USUAL_ALIGNMENT, LARGEST_ALIGNMENT, MOST_DIMS = 32, 2**16, 4
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
           11: "<i8", 12: "<f8"}


class GGUFTensor(NamedTuple):
    """A tensor's name, the number of its type, its shape (outermost first) and its bytes."""

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFHeader(NamedTuple):
    """A file's metadata by key, and its tensors."""

    metadata: dict[str, Any]
    tensors: list[GGUFTensor]


def read_header(path: pathlib.Path, sizes: Mapping[int, tuple[int, int]]) -> GGUFHeader:
    """Reads and checks the header of a GGUF file.

    Args:
        path: The file.
        sizes: Of each type of tensor, by number: entries and bytes of a block.

    Raises:
        ValueError: For what is no GGUF file, is cut short, or whose tensors are not all inside the
            file, each in a place of its own.
    """
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: not a GGUF file, or cut short: it has {path.stat().st_size} bytes")
    cursor = _Cursor(path, np.memmap(path, np.uint8, "r"))
    if bytes(cursor.take(4)) != MAGIC:
        raise cursor.fault("it does not begin with GGUF")
    version = cursor.number("<u4")
    if version not in VERSIONS:
        raise cursor.fault(f"version {version}: expected one of {VERSIONS}, little-endian")
    tensors, keys = cursor.count("tensors", 24), cursor.count("keys", 12)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text("a key")
        if name in metadata:
            raise cursor.fault(f"the key {shown(name)} is there twice")
        metadata[name] = cursor.value(name, cursor.number("<u4"))
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = metadata.get(ALIGNMENT, USUAL_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= LARGEST_ALIGNMENT:
        raise cursor.fault(f"{ALIGNMENT}={shown(alignment)}: expected 1 to {LARGEST_ALIGNMENT}")
    begin = -(-cursor.place // alignment) * alignment
    return GGUFHeader(metadata, _placed(cursor, infos, begin, alignment, sizes))


def _info(cursor: "_Cursor") -> GGUFTensor:
    """A tensor as the header has it: the start counts from the first, and the size is not known."""
    name = cursor.text("a tensor's name")
    dims = cursor.number("<u4")
    if not 1 <= dims <= MOST_DIMS:
        raise cursor.fault(f"{shown(name)} has {dims} dims: expected 1 to {MOST_DIMS}")
    shape = tuple(cursor.number("<u8") for _ in range(dims))[::-1]
    return GGUFTensor(name, cursor.number("<u4"), shape, cursor.number("<u8"), 0)


def _placed(
    cursor: "_Cursor", infos: list[GGUFTensor], begin: int, alignment: int,
    sizes: Mapping[int, tuple[int, int]],
) -> list[GGUFTensor]:
    """The tensors with the bytes that they have, none of which another has too."""
    placed, end = [], 0
    for each in infos:
        where = shown(each.name)
        if each.kind not in sizes:
            raise cursor.fault(f"{where} is of type {each.kind}, which is not known here")
        block, size_of_block = sizes[each.kind]
        if math.prod(each.shape) == 0 or each.shape[-1] % block:
            raise cursor.fault(f"{where} has shape {each.shape}: expected rows of blocks of {block}")
        if each.start % alignment:
            raise cursor.fault(f"{where} begins at byte {each.start}: expected a multiple of "
                               f"{alignment}")
        size = math.prod(each.shape) // block * size_of_block
        placed.append(each._replace(start=begin + each.start, size=size))
    names = set()
    for each in sorted(placed, key=lambda tensor: tensor.start):
        if each.name in names:
            raise cursor.fault(f"a tensor {shown(each.name)} is there twice")
        if each.start + each.size > cursor.size:
            raise cursor.fault(f"{shown(each.name)} ends at byte {each.start + each.size:,} of "
                               f"{cursor.size:,}")
        if each.start < end:
            raise cursor.fault(f"{shown(each.name)} overlaps the tensor before it")
        names.add(each.name)
        end = each.start + each.size
    return placed


class _Cursor:
    """Reads a file from its first byte on; whatever would leave the file is an error."""

    def __init__(self, path: pathlib.Path, data: np.ndarray):
        self._path, self._data = path, data
        self.place, self.size = 0, len(data)

    def fault(self, problem: str) -> ValueError:
        """The error that says what is wrong with the file."""
        return ValueError(f"{self._path}: not a GGUF file, or cut short: {problem}")

    def take(self, size: int) -> np.ndarray:
        """The next bytes."""
        if size > self.size - self.place:
            raise self.fault(f"{size:,} bytes are wanted at byte {self.place:,} of {self.size:,}")
        self.place += size
        return self._data[self.place - size:self.place]

    def numbers(self, dtype: str, count: int) -> list:
        """The next numbers of a type."""
        return self.take(count * np.dtype(dtype).itemsize).view(dtype).tolist()

    def number(self, dtype: str) -> Any:
        """The next number of a type."""
        return self.numbers(dtype, 1)[0]

    def count(self, what: str, smallest: int) -> int:
        """The next number, of things of which each takes at least so many bytes."""
        count = self.number("<u8")
        if count > (self.size - self.place) // smallest:
            raise self.fault(f"{count:,} {what}, for which {self.size - self.place:,} bytes are left")
        return count

    def text(self, what: str) -> str:
        """The next text."""
        data = bytes(self.take(self.count(f"bytes of {shown(what)}", 1)))
        try:
            return data.decode()
        except UnicodeError:
            raise self.fault(f"{shown(what)} is not UTF-8") from None

    def value(self, name: str, kind: int) -> Any:
        """The next value of metadata, of a type by its number."""
        if kind == STRING:
            return self.text(name)
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise self.fault(f"{shown(name)} is of type {kind}, which there is not")
        inner = self.number("<u4")
        if inner == STRING:
            return [self.text(name) for _ in range(self.count(f"texts of {shown(name)}", 8))]
        if inner not in SCALARS:
            raise self.fault(f"{shown(name)} is an array of type {inner}: expected numbers or texts")
        width = np.dtype(SCALARS[inner]).itemsize
        return self.numbers(SCALARS[inner], self.count(f"numbers of {shown(name)}", width))
