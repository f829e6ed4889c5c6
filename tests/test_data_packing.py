"""Packing: every token and every end is a target once, and documents do not see each other."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batiste.data.packing import PADDING, concatenate, first_fit, unpack


class Boundaries(NamedTuple):
    bos_id: int
    end_id: int
    pad_id: int


# As vocabularies that are learned here have them, GPT-2 and Qwen, Llama 3, Llama 2 with its pad, and
# one that pads with BOS.
KINDS = {"one": Boundaries(1, 1, 0), "gpt2": Boundaries(1, 1, 1), "llama3": Boundaries(1, 2, 2),
         "llama2": Boundaries(1, 2, 0), "bos": Boundaries(1, 2, 1)}
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
PACKS = pytest.mark.parametrize("pack", (concatenate, first_fit))
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def documents_of(lengths):
    """Documents in which no two tokens are alike, so that each can be followed."""
    ends = np.cumsum(lengths) + 3
    return [np.arange(end - length, end) for end, length in zip(ends, lengths)]


def packed(pack, documents, length, kind):
    records = list(pack(iter(documents), length, kind))
    assert all(record.shape == (length + 1,) for record in records)
    return np.stack(records)


@EVERY
@PACKS
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 23))
def test_every_token_and_every_end_is_a_target_exactly_once(pack, kind, lengths, length):
    documents = documents_of(lengths)
    batch = unpack(packed(pack, documents, length, kind), kind)
    targets = batch.targets_BT[batch.weights_BT == 1]
    assert sorted(targets[targets > 2]) == sorted(np.concatenate(documents))
    assert (targets == kind.end_id).sum() == len(documents)  # each document is ended once
    assert len(targets) == sum(lengths) + len(documents)
    assert set(np.unique(batch.weights_BT)) <= {0.0, 1.0}


@EVERY
@PACKS
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 23))
def test_segments_and_positions_follow_the_documents(pack, kind, lengths, length):
    documents = documents_of(lengths)
    document_of = {token: index for index, document in enumerate(documents) for token in document}
    batch = unpack(packed(pack, documents, length, kind), kind)
    for tokens, targets, weights, segments, positions in zip(*batch[:5]):
        last_document, last_segment = None, 0
        for t, (token, target) in enumerate(zip(tokens, targets)):
            if segments[t] == 0:
                assert weights[t] == 0 and target == kind.pad_id and positions[t] == 0
                assert not segments[t:].any()  # padding only follows
                break
            begins = token == kind.bos_id or t == 0
            ended = token == kind.end_id != kind.bos_id
            assert weights[t] == (not ended)
            assert segments[t] == last_segment + begins
            assert positions[t] == (0 if begins else positions[t - 1] + 1)
            document = document_of.get(token, last_document if ended else document_of.get(target))
            if not begins:  # one segment, one document
                assert document == last_document
            if not ended and target != kind.end_id:  # it belongs to the document that predicts it
                assert document_of[target] == document
            last_document, last_segment = document, segments[t]


def test_a_small_stream_by_hand():
    documents = [np.array([5, 6, 7]), np.array([8])]
    for kind in (KINDS["one"], KINDS["gpt2"]):
        for pack in (concatenate, first_fit):
            assert packed(pack, documents, 4, kind).tolist() == [
                [1, 5, 6, 7, 1], [1, 8, 1, PADDING, PADDING]]
        batch = unpack(packed(concatenate, documents, 3, kind), kind)
        assert batch.tokens_BT.tolist() == [[1, 5, 6], [7, 1, 8]]
        assert batch.targets_BT.tolist() == [[5, 6, 7], [1, 8, 1]]
        assert batch.segments_BT.tolist() == [[1, 1, 1], [1, 2, 2]]
        assert batch.positions_BT.tolist() == [[0, 1, 2], [0, 0, 1]]
    two = KINDS["llama3"]
    assert packed(concatenate, documents, 4, two).tolist() == [[1, 5, 6, 7, 2], [2, 1, 8, 2, PADDING]]
    assert packed(first_fit, documents, 4, two).tolist() == [
        [1, 5, 6, 7, 2], [1, 8, 2, PADDING, PADDING]]
    batch = unpack(packed(concatenate, documents, 4, two), two)
    assert batch.targets_BT.tolist() == [[5, 6, 7, 2], [1, 8, 2, 2]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [0, 1, 1, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 1], [1, 2, 2, 2]]


@EVERY
@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 23))
def test_first_fit_keeps_whole_what_fits(kind, lengths, length):
    documents = documents_of(lengths)
    stream = packed(first_fit, documents, length, kind).ravel().tolist()  # records end to end
    for document in documents:
        start = stream.index(document[0])
        if len(document) < length:
            whole = [kind.bos_id, *document, kind.end_id]
            assert stream[start - 1:start + len(document) + 1] == whole
            assert start // (length + 1) == (start + len(document)) // (length + 1)


def test_first_fit_fills_records():
    rng, kind = np.random.default_rng(3), KINDS["one"]
    documents = documents_of(np.maximum(1, rng.lognormal(4.5, 0.8, 3000)).astype(int).tolist())
    batch = unpack(packed(first_fit, documents, 256, kind), kind)
    assert batch.weights_BT.mean() > 0.95
    assert unpack(packed(concatenate, documents, 256, kind), kind).weights_BT.mean() > 0.999


def test_batch_types_and_padding_rows():
    kind = KINDS["gpt2"]
    batch = unpack(np.full((3, 6), PADDING, np.int32), kind)
    names = [array.dtype.name for array in batch[:5]]
    assert names == ["int32", "int32", "float32", "int32", "int32"]
    assert not batch.weights_BT.any() and not batch.segments_BT.any()
    assert (batch.tokens_BT == kind.pad_id).all()
    assert list(concatenate(iter([]), 5, kind)) == list(first_fit(iter([]), 5, kind)) == []
