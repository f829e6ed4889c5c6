"""Objectives of an encoder: hidden and replaced tokens, and whether halves are swapped."""

import numpy as np

from batiste.data.packing import Batch, unpack
from batiste.data.rearranged import documents_in
from batiste.data.record_objective import RecordObjective
from batiste.data.special_tokens import Vocabulary

# Of the hidden tokens, so many are replaced by the mask, and so many by a random token of the text;
# the others stay what they are (BERT, arXiv:1810.04805).
MASKED, RANDOM = 0.8, 0.1


def masked_rows(
    record: np.ndarray, objective: RecordObjective, vocabulary: Vocabulary,
    random: np.random.Generator, masked: float = MASKED,
) -> Batch:
    """Returns one row with a share `rate` of its tokens hidden; these alone have weight 1.

    masked: the share of the hidden ones that the mask replaces.
    """
    batch = unpack(record[None], vocabulary)
    tokens_T = batch.tokens_BT[0]
    text_T = (batch.segments_BT[0] > 0) & vocabulary.is_text(tokens_T)
    places = np.flatnonzero(text_T)
    if objective.whole_words:
        after_text_T = np.append(False, text_T[:-1])
        starts_T = vocabulary.word_starts_V[tokens_T * text_T] | ~after_text_T
        places = _some(np.cumsum(starts_T)[places], places, objective.rate, random)
    else:
        places = _some(places, places, objective.rate, random)
    hidden_T, draw = tokens_T.copy(), random.random(len(places))
    hidden_T[places[draw < masked]] = vocabulary.special["<mask>"]
    replaced = places[(draw >= masked) & (draw < masked + RANDOM)]
    hidden_T[replaced] = random.choice(vocabulary.text_ids_V, len(replaced))
    weights_T = np.zeros(len(tokens_T), np.float32)
    weights_T[places] = 1
    return batch._replace(
        tokens_BT=hidden_T[None], targets_BT=tokens_T[None], weights_BT=weights_T[None])


def replaced_rows(
    record: np.ndarray, objective: RecordObjective, vocabulary: Vocabulary,
    random: np.random.Generator,
) -> Batch:
    """Returns a row whose hidden tokens are all masks, for a generator to replace (ELECTRA)."""
    return masked_rows(record, objective, vocabulary, random, masked=1.0)


def _some(
    words: np.ndarray, places: np.ndarray, rate: float, random: np.random.Generator,
) -> np.ndarray:
    """Random places, a share `rate` on average; those with the same number in `words` together."""
    wanted = int(rate * len(places) + random.random())
    _, word_of, sizes = np.unique(words, return_inverse=True, return_counts=True)
    order = random.permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    # The last word comes along as often as keeps the average.
    taken = order[(wanted - before) / sizes[order] > random.random()]
    return places[np.isin(word_of, taken)]


def order_rows(
    record: np.ndarray, objective: RecordObjective, vocabulary: Vocabulary,
    random: np.random.Generator,
) -> Batch:
    """Returns a masked row whose documents are in two parts, half of them swapped.

    A document is "BOS a <separator> b" or "BOS b <separator> a", also one that continues from
    another record; it loses a token or two for that. Types are 1 after the separator. At BOS the
    target says which it is, and weighs as much as the document's hidden tokens together: sentence
    order prediction beside masked tokens (ALBERT, arXiv:1909.11942).
    """
    record, special = record.astype(np.int32), vocabulary.special
    types_T, labels = np.zeros(len(record) - 1, np.int32), {}
    for start, stop, _ in list(documents_in(record, vocabulary)):
        stop = min(stop, len(record) - 1)
        begins = int(start == 0)  # A document that continues has no BOS yet.
        room = stop - start - 1 - begins
        if room < 2:
            continue
        text = record[start:start + room]
        cuts = np.flatnonzero(vocabulary.word_starts_V[text[1:]]) + 1
        cut = int(random.choice(cuts)) if len(cuts) else int(random.integers(1, room))
        swapped = random.random() < 0.5
        first, second = (text[cut:], text[:cut]) if swapped else (text[:cut], text[cut:])
        parts = [vocabulary.bos_id] * begins, first, [special["<separator>"]], second
        record[start:stop] = np.concatenate(parts)
        types_T[stop - len(second):stop] = 1
        labels[start - 1 + begins] = special["<swapped>" if swapped else "<in_order>"]
    batch = masked_rows(record, objective, vocabulary, random)
    for place, label in labels.items():
        batch.targets_BT[0, place] = label
        of_document = batch.segments_BT == batch.segments_BT[0, place]
        batch.weights_BT[0, place] = (batch.weights_BT * of_document).sum()
    return batch._replace(types_BT=types_T[None])
