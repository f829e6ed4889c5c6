"""How a tensor lies in a file, and how it becomes our parameters and comes back."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One tensor of a file, or one of each layer and expert, and the parameters it holds.

    theirs: its name, with {layer} and {expert}. ours: paths of parameters, the letters of which
    their names spell; several lie side by side in one tensor. layout: the letters of each of its
    dims, outermost first; several in brackets share a dim, and a digit counts the parameters. Thus
    "(NH)D" is heads times head dim by model, as `torch.nn.Linear` has it.
    rotary: the letter of which pairs that are rotated together are neighbours; ours are half a head
    apart. scaled_by: the key of their config by which the values are to be multiplied.
    always_float32: whatever the dtype of the others. skipped: first entries that no parameter has.
    gated: of feed-forwards with a gate, or of those without; None of both.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str
    rotary: str | None = None
    scaled_by: str | None = None
    always_float32: bool = False
    skipped: int = 0
    gated: bool | None = None

    @property
    def stack(self) -> str:
        """Which stack of layers it is of, or what else."""
        return self.ours[0].split("/")[0]

    @property
    def dense(self) -> bool:
        """Whether it is of the layers before those with experts."""
        return self.stack == "dense_layers"


def row(theirs: str, ours: str, layout: str, **options: Any) -> Row:
    """A row of the parameters that `ours` names, separated by spaces."""
    return Row(theirs, tuple(ours.split()), layout, **options)


def biased(theirs: str, ours: str, layout: str) -> tuple[Row, Row]:
    """A linear layer or a norm, and its bias."""
    *folders, name = ours.split("/")
    path = "/".join([*folders, ""])
    stem, letters = name.rsplit("_", 1)
    heads = letters[-2:] if stem in ("query", "key", "value") else letters[-1]
    bias = f"bias_{letters}" if stem == "scale" else f"{stem}_bias_{heads}"
    bias_layout = f"({heads})" if len(heads) > 1 else heads
    return row(theirs + ".weight", ours, layout), row(theirs + ".bias", path + bias, bias_layout)


class Sizes(NamedTuple):
    """What a row's conversion must know of a model.

    letters: the size of each letter, by parameter, where E and L are left out. rotated: the last
    entries of the rotary letter that are rotated. scale: what `scaled_by` says, or 1.
    """

    letters: Mapping[str, Mapping[str, int]]
    rotated: int
    scale: float


def letters_of(path: str) -> str:
    """The letters that a parameter's name ends with, without those that the file has by name."""
    return path.rsplit("_", 1)[1].replace("E", "") if _by_expert(path) else path.rsplit("_", 1)[1]


def _by_expert(path: str) -> bool:
    return re.search(r"_E[A-Z]+$", path) is not None


def file_shape(row: Row, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a row's tensor in a file."""
    return tuple(math.prod(dims) for dims in _grouped(row, sizes))


def to_ours(row: Row, tensor: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
    """The parameters of one tensor (of one layer, of one expert), in the order of `row.ours`."""
    split = tensor.reshape([size for dims in _grouped(row, sizes) for size in dims])
    flat = _flat(row)
    parts = [split] if len(row.ours) == 1 else np.moveaxis(split, _digit(flat), 0)
    flat = [letter for letter in flat if not letter.isdigit()]
    found = []
    for path, part in zip(row.ours, parts, strict=True):
        letters = letters_of(path)
        part = part.transpose([flat.index(_alias(letter, flat)) for letter in letters])
        if row.rotary is not None:
            part = _apart(part, letters.index(row.rotary), sizes.rotated)
        found.append(part if sizes.scale == 1 else part * part.dtype.type(sizes.scale))
    return found


def to_theirs(row: Row, parameters: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
    """The tensor of these parameters; the inverse of `to_ours`, contiguous."""
    flat = [letter for letter in _flat(row) if not letter.isdigit()]
    parts = []
    for path, part in zip(row.ours, parameters, strict=True):
        letters = letters_of(path)
        if row.rotary is not None:
            part = _together(part, letters.index(row.rotary), sizes.rotated)
        aliased = [_alias(letter, flat) for letter in letters]
        parts.append(part.transpose([aliased.index(letter) for letter in flat]))
    tensor = parts[0] if len(parts) == 1 else np.stack(parts, _digit(_flat(row)))
    if sizes.scale != 1:
        tensor = tensor / tensor.dtype.type(sizes.scale)
    return np.ascontiguousarray(tensor).reshape(file_shape(row, sizes))


def _flat(row: Row) -> list[str]:
    return [letter for letter in row.layout if letter not in "()"]


def _digit(flat: list[str]) -> int:
    return next(index for index, letter in enumerate(flat) if letter.isdigit())


def _alias(letter: str, flat: list[str]) -> str:
    """Where queries and keys lie side by side, there are as many heads of one as of the other."""
    return letter if letter in flat else {"K": "N", "N": "K"}[letter]


def _grouped(row: Row, sizes: Sizes) -> list[list[int]]:
    """The sizes of the letters in each dim of the tensor."""
    known = sizes.letters[row.ours[0]]
    groups = re.findall(r"\((\w+)\)|(\w)", row.layout)
    return [
        [int(letter) if letter.isdigit() else known[_alias(letter, list(known))] for letter in dim]
        for dim in (several or single for several, single in groups)
    ]


def _apart(x: np.ndarray, dim: int, rotated: int) -> np.ndarray:
    """Of the last entries along a dim, every second one before the others."""
    return _reordered(x, dim, rotated, np.arange(rotated).reshape(-1, 2).T.reshape(-1))


def _together(x: np.ndarray, dim: int, rotated: int) -> np.ndarray:
    return _reordered(x, dim, rotated, np.arange(rotated).reshape(2, -1).T.reshape(-1))


def _reordered(x: np.ndarray, dim: int, rotated: int, order: np.ndarray) -> np.ndarray:
    start = x.shape[dim] - rotated
    return np.take(x, np.concatenate([np.arange(start), start + order]), axis=dim)
