"""Examples as arrays: rows of tokens, and the labels of each head, of weight 0 where absent."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from batiste.data import Read, TextReader
from batiste.tasks.config import HeadConfig, TaskConfig
from batiste.tasks.examples import Example


class Rows(NamedTuple):
    """What the encoder reads, int32: segments are 1, and 0 for padding.

    context_BT: 1 where an answer may be.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    types_BT: np.ndarray
    context_BT: np.ndarray


class Labels(NamedTuple):
    """values: int32 B of a sequence or a similarity, BT of tags, B2 of a span (its first and last
    token), float32 BY of a multilabel. weights: float32, B, of tags BT; 0 is no label."""

    values: np.ndarray
    weights: np.ndarray


class TaskBatch(NamedTuple):
    """rows; second: the other texts, where the two of an example are read apart, None otherwise;
    labels by head."""

    rows: Rows
    second: Rows | None
    labels: dict[str, Labels]

    def take(self, indices: np.ndarray) -> "TaskBatch":
        """These examples; an index of the length and more is padding, which has no label."""
        real = indices < len(self.rows.tokens_BT)
        kept = np.where(real, indices, 0)
        rows, second, labels = _each(lambda x: x[kept], self)
        rows = rows._replace(segments_BT=rows.segments_BT * real[:, None])
        if second is not None:
            second = second._replace(segments_BT=second.segments_BT * real[:, None])
        labels = {
            name: each._replace(weights=np.where(
                real.reshape(-1, *[1] * (each.weights.ndim - 1)), each.weights, np.float32(0)))
            for name, each in labels.items()}
        return TaskBatch(rows, second, labels)


def _each(function, batch: TaskBatch) -> tuple[Rows, Rows | None, dict[str, Labels]]:
    second = None if batch.second is None else Rows(*map(function, batch.second))
    labels = {name: Labels(*map(function, each)) for name, each in batch.labels.items()}
    return Rows(*map(function, batch.rows)), second, labels


class Encoded(NamedTuple):
    """All examples of a split: as arrays, and how the reader read each."""

    batch: TaskBatch
    reads: list[Read]


def encode(config: TaskConfig, examples: Sequence[Example], reader: TextReader) -> Encoded:
    """All examples as arrays of `config.max_length` tokens; ValueError for what does not fit."""
    length, second = config.max_length, None
    keep_first = any(head.kind == "span" for head in config.heads)
    if config.apart:
        reads = [reader.read(each.text, None, length, False) for each in examples]
        others = [Read([], [], [], []) if each.text_pair is None
                  else reader.read(each.text_pair, None, length, False) for each in examples]
        second = padded_rows(others, length, reader.pad_id)
    else:
        reads = [reader.read(each.text, each.text_pair, length, keep_first) for each in examples]
    labels = {head.name: _labels(head, examples, reads, length) for head in config.heads}
    return Encoded(TaskBatch(padded_rows(reads, length, reader.pad_id), second, labels), reads)


def padded_rows(reads: Sequence[Read], length: int, pad_id: int) -> Rows:
    """Reads of at most `length` tokens, padded to it."""
    tokens_BT = np.full((len(reads), length), pad_id, np.int32)
    segments_BT, types_BT, context_BT = np.zeros((3, len(reads), length), np.int32)
    for row, read in enumerate(reads):
        size = len(read.tokens)
        tokens_BT[row, :size] = read.tokens
        segments_BT[row, :size] = 1
        types_BT[row, :size] = read.types
        context_BT[row, :size] = np.array(read.sides) == max([1, *read.sides])
    return Rows(tokens_BT, segments_BT, types_BT, context_BT)


def _labels(
    head: HeadConfig, examples: Sequence[Example], reads: Sequence[Read], length: int
) -> Labels:
    count = len(examples)
    shape = {"multilabel": (count, len(head.classes)), "tags": (count, length), "span": (count, 2)}
    kind = np.float32 if head.kind == "multilabel" else np.int32
    values = np.zeros(shape.get(head.kind, (count,)), kind)
    weights = np.zeros((count, length) if head.kind == "tags" else count, np.float32)
    for row, (example, read) in enumerate(zip(examples, reads, strict=True)):
        if head.name in example.labels:
            _label(head, example, read, (values, weights, row))
    return Labels(values, weights)


def _label(head: HeadConfig, example: Example, read: Read, into: tuple[Any, Any, int]) -> None:
    """Writes one label into the values and weights of a row."""
    label, (values, weights, row) = example.labels[head.name], into
    places = {name: index for index, name in enumerate(head.classes)}
    if head.kind == "sequence":
        values[row], weights[row] = places[label], 1
    elif head.kind == "multilabel":
        values[row, [places[name] for name in label]] = 1
        weights[row] = 1
    elif head.kind == "similarity":
        # Texts that do not belong together teach nothing but what all others of a batch do.
        values[row], weights[row] = label, label
    elif head.kind == "tags":
        for token, name in zip(first_pieces(example.text, read), label, strict=True):
            if token is not None and name is not None:
                values[row, token], weights[row, token] = places[name], 1
    else:
        found = answer_tokens(read, label[0])
        if found is not None:
            values[row], weights[row] = found, 1


def first_pieces(text: str, read: Read) -> list[int | None]:
    """The first token of each word between white space; None for a word that was cut off."""
    tokens = [token for token, side in enumerate(read.sides) if side == 1]
    ends = np.array([read.spans[token][1] for token in tokens])
    found = []
    for word in re.finditer(r"\S+", text):
        place = int(np.searchsorted(ends, word.start(), "right"))
        reaches = place < len(tokens) and read.spans[tokens[place]][0] < word.end()
        found.append(tokens[place] if reaches else None)
    return found


def answer_tokens(read: Read, answer: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last token of characters [start, end); None if some were cut off."""
    side, (start, end) = max([1, *read.sides]), answer
    inside = [token for token, (first, last) in enumerate(read.spans)
              if read.sides[token] == side and first < end and last > start]
    if not inside or read.spans[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]
