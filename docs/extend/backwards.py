"""An objective: some rows are read from behind. --config.data.objectives[0].kind=docs/extend/backwards.py:backwards"""

import numpy as np

from batiste.data import Batch, RecordObjective
from batiste.data.packing import unpack
from batiste.data.special_tokens import Vocabulary


def backwards(
    record: np.ndarray, objective: RecordObjective, vocabulary: Vocabulary,
    random: np.random.Generator,
) -> Batch:
    """Next tokens of the record, which has its documents reversed with probability `rate`."""
    if random.random() < objective.rate:
        record = np.concatenate([record[:1], record[:0:-1]])
    return unpack(record[None], vocabulary)
