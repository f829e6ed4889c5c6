"""Packing: every token is a target once, and documents do not see each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batiste.data.packing import concatenate, first_fit, unpack

BOS, PAD = 1, 0
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents_of(lengths):
    """Documents in which no two tokens are alike, so that each can be followed."""
    ends = np.cumsum(lengths) + 2
    return [np.arange(end - length, end) for end, length in zip(ends, lengths)]


def packed(pack, documents, length):
    records = list(pack(iter(documents), length, BOS, PAD))
    assert all(record.shape == (length + 1,) for record in records)
    return np.stack(records)


@pytest.mark.parametrize("pack", (concatenate, first_fit))
@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 23))
def test_every_token_is_a_target_exactly_once(pack, lengths, length):
    documents = documents_of(lengths)
    batch = unpack(packed(pack, documents, length), BOS, PAD)
    targets = batch.targets_BT[batch.weights_BT == 1]
    assert sorted(targets[targets != BOS]) == sorted(np.concatenate(documents))
    assert (targets == BOS).sum() == len(documents)  # each document is ended once
    assert set(np.unique(batch.weights_BT)) <= {0.0, 1.0}


@pytest.mark.parametrize("pack", (concatenate, first_fit))
@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 23))
def test_segments_and_positions_follow_the_documents(pack, lengths, length):
    documents = documents_of(lengths)
    document_of = {token: index for index, document in enumerate(documents) for token in document}
    batch = unpack(packed(pack, documents, length), BOS, PAD)
    for tokens, targets, weights, segments, positions in zip(*batch[:5]):
        last_document, last_segment = None, 0
        for t, token in enumerate(tokens):
            if segments[t] == 0:
                assert weights[t] == 0 and targets[t] == PAD and positions[t] == 0
                assert not segments[t:].any()  # padding only follows
                break
            begins = token == BOS or t == 0
            assert weights[t] == 1
            assert segments[t] == last_segment + begins
            assert positions[t] == (0 if begins else positions[t - 1] + 1)
            document = document_of.get(token, document_of.get(targets[t]))
            if not begins:  # one segment, one document
                assert document == last_document
            if targets[t] != BOS:  # what is predicted belongs to the document that predicts
                assert document_of[targets[t]] == document
            last_document, last_segment = document, segments[t]


def test_a_small_stream_by_hand():
    documents = [np.array([5, 6, 7]), np.array([8])]
    assert packed(concatenate, documents, 4).tolist() == [[1, 5, 6, 7, 1], [1, 8, 1, 0, 0]]
    assert packed(first_fit, documents, 4).tolist() == [[1, 5, 6, 7, 1], [1, 8, 1, 0, 0]]
    batch = unpack(packed(concatenate, documents, 3), BOS, PAD)
    assert batch.tokens_BT.tolist() == [[1, 5, 6], [7, 1, 8]]
    assert batch.targets_BT.tolist() == [[5, 6, 7], [1, 8, 1]]
    assert batch.segments_BT.tolist() == [[1, 1, 1], [1, 2, 2]]
    assert batch.positions_BT.tolist() == [[0, 1, 2], [0, 0, 1]]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 23))
def test_first_fit_keeps_whole_what_fits(lengths, length):
    documents = documents_of(lengths)
    stream = packed(first_fit, documents, length).ravel().tolist()  # records end to end
    for document in documents:
        start = stream.index(document[0])
        if len(document) < length:
            assert stream[start - 1:start + len(document)] == [BOS, *document]
            assert start // (length + 1) == (start + len(document) - 1) // (length + 1)


def test_first_fit_fills_records():
    rng = np.random.default_rng(3)
    documents = documents_of(np.maximum(1, rng.lognormal(4.5, 0.8, 3000)).astype(int).tolist())
    batch = unpack(packed(first_fit, documents, 256), BOS, PAD)
    assert batch.weights_BT.mean() > 0.95
    assert unpack(packed(concatenate, documents, 256), BOS, PAD).weights_BT.mean() > 0.999


def test_batch_types_and_padding_rows():
    batch = unpack(np.full((3, 6), PAD, np.uint16), BOS, PAD)
    names = [array.dtype.name for array in batch[:5]]
    assert names == ["int32", "int32", "float32", "int32", "int32"]
    assert not batch.weights_BT.any() and not batch.segments_BT.any()
    assert list(concatenate(iter([]), 5, BOS, PAD)) == list(first_fit(iter([]), 5, BOS, PAD)) == []
