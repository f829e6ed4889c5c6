"""Objectives of an encoder and a decoder: what one reads and the other writes of a document.

The decoder's rows are shorter than the records where what is written is; a document whose part does
not fit is left out.
"""

from collections.abc import Callable, Iterator

import numpy as np

from batiste.data.config import DataConfig
from batiste.data.packing import Batch
from batiste.data.rearranged import documents_in
from batiste.data.record_objective import RecordObjective
from batiste.data.special_tokens import Vocabulary

# (text, objective, vocabulary, random) -> what is read, what is written.
Pair = Callable[..., tuple[np.ndarray, np.ndarray]]


def target_length(config: DataConfig) -> int:
    """The tokens of a decoder's row: an eighth of a record, or several.

    As many as spans of one document take on average, and a sixteenth of the record more; whole
    records for objectives that write documents.
    """
    length, needed = config.sequence_length, 0.0
    for objective in config.objectives:
        share = 1.0
        if objective.kind == "spans":
            share = objective.rate * (1 + 1 / objective.mean_span) + 1 / 16
        needed = max(needed, length * share + 2)
    eighth = -(-length // 8)
    return min(length, int(-(-needed // eighth)) * eighth)


def pair_rows(
    record: np.ndarray, pair: Pair, objective: RecordObjective, vocabulary: Vocabulary,
    target: int, random: np.random.Generator,
) -> Batch:
    """Returns one row: each document's pair is a segment of the source and of the target.

    A source is what the tokenizer puts around a text, with the token of the objective's mode, if it
    has one, before the text. A target begins with the model's start token and what the tokenizer
    puts before a text, and ends with END. Text is cut where a record's BOS and END leave too little
    room for these. target: the decoder's length.
    """
    length = len(record) - 1
    mode = [] if objective.mode is None else [vocabulary.special[objective.mode]]
    before, after = [*vocabulary.source_begin_ids, *mode], vocabulary.source_end_ids
    opening = vocabulary.source_begin_ids
    needed = max(len(before) + len(after), 1 + len(opening))
    sources, targets, ended = [], [], []
    room, source_room = target, length
    for start, stop, ends in documents_in(record, vocabulary):
        has_end = stop < length and vocabulary.end_id != vocabulary.bos_id
        # Without the next record's token.
        cut = max(0, needed - (start > 0) - has_end)
        text = record[start:min(stop, length) - cut].astype(np.int32)
        if len(text) < 2:
            continue
        read, written = pair(text, objective, vocabulary, random)
        read = np.concatenate([before, read, after])
        written = np.concatenate([opening, written])
        if len(written) + 1 > room or len(read) > source_room:
            continue
        room, source_room = room - len(written) - 1, source_room - len(read)
        sources.append(read)
        targets.append(written)
        ended.append(ends or objective.kind != "prefix")
    tokens, segments, positions = _row(
        [np.append(vocabulary.start_id, written) for written in targets], target, vocabulary.pad_id)
    following, _, _ = _row(
        [np.append(written, vocabulary.end_id) for written in targets], target, vocabulary.pad_id)
    weights = (segments > 0).astype(np.float32)
    for number, end in enumerate(ended, 1):
        weights[0, np.flatnonzero(segments[0] == number)[-1]] = end
    read = _row(sources, length, vocabulary.pad_id)
    return Batch(tokens, following, weights, segments, positions, None, None, *read)


def _row(parts: list[np.ndarray], length: int, pad_id: int) -> Iterator[np.ndarray]:
    """Yields tokens, segments and positions of parts one after another, each [1, length]."""
    sizes = [len(part) for part in parts]
    arrays = (
        parts,
        [np.full(size, number, np.int32) for number, size in enumerate(sizes, 1)],
        [np.arange(size, dtype=np.int32) for size in sizes],
    )
    for fill, array in zip((pad_id, 0, 0), arrays):
        row = np.concatenate([np.zeros(0, np.int32), *array]).astype(np.int32)
        yield np.pad(row, (0, length - len(row)), constant_values=fill)[None]


def spans_pair(text, objective: RecordObjective, vocabulary: Vocabulary, random):
    """The text with spans replaced by sentinels; each sentinel and its span (T5, arXiv:1910.10683).

    A span is hidden in every text; the first tokens are not, the last are.
    """
    sentinels = vocabulary.sentinels_V
    hidden = int(np.clip(int(len(text) * objective.rate + random.random()), 1, len(text) - 1))
    count = max(1, round(hidden / objective.mean_span))
    count = min(count, hidden, len(text) - hidden, len(sentinels))
    kept, gone = _parts(len(text) - hidden, count, random), _parts(hidden, count, random)
    pieces = np.split(text, np.cumsum(np.stack([kept, gone], axis=1).reshape(-1))[:-1])
    marks = [sentinels[index:index + 1] for index in range(count)]
    read = [part for pair in zip(pieces[0::2], marks) for part in pair]
    written = [part for pair in zip(marks, pieces[1::2]) for part in pair]
    return np.concatenate(read), np.concatenate(written)


def _parts(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` random whole numbers above 0 that add up to `total`, all such equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


def prefix_pair(text, objective: RecordObjective, vocabulary: Vocabulary, random):
    """A random beginning of the text, and the rest."""
    cut = int(random.integers(1, len(text)))
    return text[:cut], text[cut:]


def denoise_pair(text, objective: RecordObjective, vocabulary: Vocabulary, random):
    """A damaged copy of the text, and the text (BART, arXiv:1910.13461).

    Spans of Poisson length become a mask each, until a share `rate` of the tokens is gone; one of
    no token is a mask more. Sentences come in random order if `shuffled`.
    """
    copy = text
    if objective.shuffled:
        ends = np.flatnonzero(vocabulary.sentence_ends_V[text[:-1]]) + 1
        sentences = np.split(text, ends)
        copy = np.concatenate([sentences[index] for index in random.permutation(len(sentences))])
    wanted = int(len(text) * objective.rate + random.random())
    lengths, masks = [], 0
    while wanted > 0:
        size = min(int(random.poisson(objective.mean_span)), wanted)
        if size == 0 and masks >= sum(lengths):
            continue  # A copy is never longer than the text.
        lengths, wanted, masks = [*lengths, size], wanted - size, masks + 1
    # Spans and kept tokens in random order: a span begins anywhere with the same probability.
    kept = len(text) - sum(lengths)
    spans = -np.array(lengths, np.int64) - 1
    units = random.permutation(np.concatenate([np.ones(kept, np.int64), spans]))
    sizes = np.where(units < 0, -units - 1, 1)
    starts = np.cumsum(sizes) - sizes
    tokens = copy[np.minimum(starts, len(text) - 1)]
    read = np.where(units < 0, vocabulary.special["<mask>"], tokens)
    return read.astype(np.int32), text


PAIRS = {"spans": spans_pair, "prefix": prefix_pair, "denoise": denoise_pair}
