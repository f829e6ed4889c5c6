"""Objectives of a decoder that move the tokens of a record: fill-in-the-middle and prefix LM.

Each document of a record is transformed by itself.
"""

from collections.abc import Iterator

import numpy as np

from batiste.data.packing import PADDING, Batch, unpack
from batiste.data.record_objective import RecordObjective
from batiste.data.special_tokens import Vocabulary


def documents_in(record: np.ndarray, vocabulary: Vocabulary) -> Iterator[tuple[int, int, bool]]:
    """Yields [start, stop) of each document's tokens without BOS and END, and whether it ends there.

    One that does not end is cut at the record's end, and continues in another record.
    """
    used = np.count_nonzero(record != PADDING)
    begins = np.flatnonzero(record[:used] == vocabulary.bos_id)
    starts = begins + 1 if len(begins) and begins[0] == 0 else np.append(0, begins + 1)
    ends = np.append(np.flatnonzero(record[:used] == vocabulary.end_id), used)
    stops = ends[np.searchsorted(ends, starts)]
    for start, stop in zip(starts.tolist(), stops.tolist()):
        if stop > start:
            yield start, stop, stop < used


def fill_in_the_middle(
    record: np.ndarray, objective: RecordObjective, vocabulary: Vocabulary,
    random: np.random.Generator,
) -> np.ndarray:
    """Returns the record with the middle of some documents moved to their end.

    A document in three random parts becomes "<prefix> a <suffix> c <middle> b", or with the suffix
    first "<prefix><suffix> c <middle> a b" (PSM and SPM, arXiv:2207.14255, both loss on all parts).
    Special tokens take the place of the document's last three tokens, so that no middle is cut off;
    where the record's end would cut one, its last target says that it is over.
    """
    record = record.astype(np.int32)
    prefix, suffix, middle = ([vocabulary.special[name]]
                              for name in ("<prefix>", "<suffix>", "<middle>"))
    for start, stop, ends in list(documents_in(record, vocabulary)):
        room = stop - start - 3 - (not ends)
        if room < 1 or random.random() >= objective.rate:
            continue
        first, second = np.sort(random.integers(0, room + 1, 2))
        a, b, c = np.split(record[start:start + room], (first, second))
        if random.random() < objective.suffix_first:
            parts = prefix, suffix, c, middle, a, b
        else:
            parts = prefix, a, suffix, c, middle, b
        record[start:stop] = np.concatenate([*parts, [] if ends else [vocabulary.end_id]])
    return record


def prefix_rows(
    record: np.ndarray, vocabulary: Vocabulary, random: np.random.Generator,
) -> Batch:
    """Returns one row in which a random beginning of each document is seen whole, not predicted.

    The beginnings of all documents come first and the rests after them: so one number for the row
    says what the causal mask does not hide, and segments keep documents apart. Places in the row
    are then not places in the document: positions are. (T5's prefix LM, arXiv:1910.10683.)
    """
    batch = unpack(record[None], vocabulary)
    segments_T, positions_T = batch.segments_BT[0], batch.positions_BT[0]
    # An END at the start of a record is a document without inputs that predict.
    counts = np.bincount(segments_T, batch.weights_BT[0]).astype(np.int64).clip(1)
    cuts = np.append(0, random.integers(1, counts[1:] + 1))  # Inputs of each beginning.
    seen_T = (positions_T < cuts[segments_T]) & (segments_T > 0)
    predicts_T = positions_T >= cuts[segments_T] - 1
    order_T = np.argsort(np.where(segments_T == 0, 2, ~seen_T), kind="stable")
    batch = batch._replace(weights_BT=batch.weights_BT * predicts_T[None])
    moved = (array[:, order_T] for array in batch[:5])
    return Batch(*moved, prefix_B=np.array([seen_T.sum()], np.int32))
