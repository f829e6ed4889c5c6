"""Records to batches as objectives want them: a pure function of (seed, epoch, record)."""

import functools
from collections.abc import Callable

import numpy as np

from batiste.data.config import DataConfig
from batiste.data.masked import masked_rows, order_rows, replaced_rows
from batiste.data.packing import Batch, unpack
from batiste.data.pairs import PAIRS, pair_rows, target_length
from batiste.data.rearranged import fill_in_the_middle, prefix_rows
from batiste.data.record_objective import OWN_KINDS, RecordObjective
from batiste.data.special_tokens import Vocabulary, vocabulary_of
from batiste.data.tokenizer import Tokenizer

# (records [B, T+1], their numbers [B], the epoch in which each is drawn [B]) -> a Batch.
Transform = Callable[[np.ndarray, np.ndarray, np.ndarray], Batch]
STREAM = 1  # Which of the random streams of a seed this is; the order's is another.


def next_tokens(tokenizer: Tokenizer) -> Transform:
    """The transform of next-token prediction, which draws nothing."""
    return lambda records, *_: unpack(records, tokenizer)


def transform_of(config: DataConfig, form: str, tokenizer: Tokenizer) -> Transform:
    """The transform of a config's objectives.

    form: of the model, one of FORMS: a prefix is part of a decoder's rows, or the source of an
    encoder's.
    """
    if not config.objectives:
        return next_tokens(tokenizer)
    vocabulary = vocabulary_of(config, tokenizer)
    def draw(objective: RecordObjective) -> Callable:
        given = dict(objective=objective, vocabulary=vocabulary)
        if form == "encoder_decoder":
            pair, target = PAIRS[objective.kind], target_length(config)
            return functools.partial(pair_rows, pair=pair, target=target, **given)
        return functools.partial((_ROWS | OWN_KINDS)[objective.kind], **given)

    draws = [draw(objective) for objective in config.objectives]
    kinds = {objective.kind for objective in config.objectives}
    absent = {}
    if "prefix" in kinds and form == "decoder":
        absent["prefix_B"] = np.zeros(1, np.int32)
    if "order" in kinds:
        absent["types_BT"] = np.zeros((1, config.sequence_length), np.int32)
    return _Drawn(config, draws, absent)


class _Drawn:
    """Applies one of several transforms to each record.

    absent: the fields that a row gets if its transform leaves them None, so that all rows of a run
    have the same, whichever process reads them.
    """

    def __init__(self, config: DataConfig, transforms: list[Callable], absent: dict):
        weights = np.array([objective.weight for objective in config.objectives])
        self._ends, self._transforms = np.cumsum(weights / weights.sum()), transforms
        self._seed, self._absent = config.seed, absent

    def __call__(self, records: np.ndarray, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        rows = [self._row(record, index, epoch) for record, index, epoch in zip(
            records, indices.tolist(), epochs.tolist(), strict=True)]
        return Batch(*(None if field[0] is None else np.concatenate(field)
                       for field in zip(*rows, strict=True)))

    def _row(self, record: np.ndarray, index: int, epoch: int) -> Batch:
        # A sequence is padded with zeros, so that (1, 2) would be (1, 2, 0): hence the spawn key.
        sequence = np.random.SeedSequence((self._seed, epoch, index), spawn_key=(STREAM,))
        random = np.random.Generator(np.random.PCG64(sequence))
        chosen = int(np.searchsorted(self._ends[:-1], random.random(), side="right"))
        row = self._transforms[chosen](record, random=random)
        return row._replace(**{name: value for name, value in self._absent.items()
                               if getattr(row, name) is None})


def _causal(record, objective: RecordObjective, vocabulary: Vocabulary, random) -> Batch:
    return unpack(record[None], vocabulary)


def _middle(record, objective, vocabulary, random) -> Batch:
    record = fill_in_the_middle(record, objective, vocabulary, random)
    return _causal(record, objective, vocabulary, random)


def _prefix(record, objective, vocabulary, random) -> Batch:
    return prefix_rows(record, vocabulary, random)


_ROWS = {
    "causal": _causal, "middle": _middle, "prefix": _prefix, "masked": masked_rows,
    "order": order_rows, "replaced": replaced_rows,
}
